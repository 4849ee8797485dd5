"""The answers that a prompt itself lists, in FLAN's form."""

from __future__ import annotations

import re

_HEADING = re.compile(r"OPTIONS:[ \t]*\r?\n")
_OPTION = re.compile(r"[ \t]*-[ \t]+(?P<text>.*\S)[ \t]*")


def options_of(text: str) -> list[str]:
    r"""The options that a prompt lists, in order; empty where it lists none.

    A list is the line "OPTIONS:" and then lines "- option" (FLAN; Wei et al. 2022, §2.2, "OPTIONS token"). Of
    several lists, as in few-shot prompts, the last counts.

    >>> options_of("Is it?\nOPTIONS:\n- yes\n- no\n\n### Response:\n")
    ['yes', 'no']
    """
    headings = list(_HEADING.finditer(text))
    if not headings:
        return []
    options: list[str] = []
    for line in text[headings[-1].end() :].split("\n"):
        match = _OPTION.fullmatch(line.rstrip("\r"))
        if match:
            options.append(match["text"])
        elif options or line.strip():
            break
    return options
