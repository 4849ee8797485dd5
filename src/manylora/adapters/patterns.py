"""Regular expressions of an adapter's settings: tried on the model's names under a time limit before PEFT uses them.

An adapter's settings may be a stranger's, and a short expression can backtrack for ever. Python's `re` has no limit and
holds its whole process, so expressions that could backtrack are tried in a process of their own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from manylora.errors import ConfigError

LONGEST = 2_000
"""Characters of an expression."""
_SECONDS = 5.0
"""For all expressions over all names. Honest ones take milliseconds, and the process some tens."""
_REPEATS = re.compile(r"[*+{]")
_TRIAL = """\
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    compiled = re.compile(pattern)
    for name in names:
        compiled.fullmatch(name)
"""


def check_pattern(setting: str, pattern: object) -> None:
    """Refuse what is no regular expression, or one of absurd length.

    Args:
        setting: how the message begins, such as "target_modules=".
        pattern: the expression.

    Raises:
        ConfigError: naming the setting and the expression.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"{setting}{pattern!r:.80} is no regular expression; give text.")
    if len(pattern) > LONGEST:
        raise ConfigError(
            f"{setting}{pattern[:40]!r}… has {len(pattern):,} characters; give at most {LONGEST:,}."
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = str(error) if isinstance(error, re.error) else "it is nested too deeply or repeats too often"
        raise ConfigError(f"{setting}{pattern!r:.80} is no regular expression: {reason}.") from error


def expressions_of(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """The regular expressions in an adapter's settings, as PEFT matches them in full, by setting.

    Args:
        values: settings of any PEFT method, by name; those of another type than PEFT's are left out.
    """

    def texts(setting: str) -> list[str]:
        value = values.get(setting) or ()
        found = [value] if isinstance(value, str) else value
        return [one for one in found if isinstance(one, str)] if isinstance(found, Iterable) else []

    targets, excluded = (
        [value] if isinstance(value := values.get(setting), str) else []
        for setting in ("target_modules", "exclude_modules")
    )
    return {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_pattern": [rf"(?:^|.*?\.){one}\.\d+\..*" for one in texts("layers_pattern")],
        "rank_pattern": [rf"(.*\.)?({key})" for key in texts("rank_pattern")],
        "alpha_pattern": [rf"(.*\.)?({key})" for key in texts("alpha_pattern")],
        "modules_to_save": [rf"(^|.*\.){name}($|\..*)" for name in texts("modules_to_save")],
    }


def check_time(patterns: Mapping[str, Collection[str]], names: Collection[str]) -> None:
    """Refuse expressions that take too long on any of the names.

    Args:
        patterns: setting to its expressions, as they will be matched in full.
        names: what they will be matched with.

    Raises:
        ConfigError: naming the settings.
    """
    # With one repeat the time is at most quadratic in the length of a name.
    risky = {
        setting: [pattern for pattern in found if len(_REPEATS.findall(pattern)) > 1]
        for setting, found in patterns.items()
    }
    for setting, found in risky.items():
        if found and sys.executable and not _ends(found, names):
            raise ConfigError(
                f"{setting} {found[0]!r:.80} takes more than {_SECONDS:g} s over the model's {len(names)} names: it "
                'backtracks. Give names, or an expression without repeats inside repeats such as "(a+)+".'
            )


def _ends(patterns: Collection[str], names: Collection[str]) -> bool:
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([list(patterns), list(names)]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError:  # no process can be started here
        return True
    return True
