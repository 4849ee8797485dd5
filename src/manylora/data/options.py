"""The answers that a prompt itself lists, in FLAN's form."""

from __future__ import annotations

import re

_HEADING = re.compile(r"OPTIONS:[ \t]*\r?\n")
# The text begins with no blank, so that no blank can stand on either side of the border: the time stays linear.
_OPTION = re.compile(r"[ \t]*-[ \t]+(?P<text>(?![ \t]).*\S)[ \t]*")


def options_of(text: str) -> list[str]:
    r"""The options that a prompt lists, in order; empty where it lists none.

    A list is the line "OPTIONS:" and then lines "- option" (FLAN; Wei et al. 2022, §2.2, "OPTIONS token"). Of
    several lists, as in few-shot prompts, the last counts.

    >>> options_of("Is it?\nOPTIONS:\n- yes\n- no\n\n### Response:\n")
    ['yes', 'no']
    """
    return _last_list(text)[0]


def without_options(text: str) -> str:
    r"""The text without the list that `options_of` reads, and without white space at its end.

    >>> without_options("Is it?\n\nOPTIONS:\n- yes\n- no")
    'Is it?'
    """
    options, start, end = _last_list(text)
    return (text[:start] + text[end:]).rstrip() if options else text.rstrip()


def _last_list(text: str) -> tuple[list[str], int, int]:
    """The options of the last list, and where it starts and ends in the text."""
    headings = list(_HEADING.finditer(text))
    if not headings:
        return [], 0, 0
    options: list[str] = []
    end = headings[-1].end()
    for line in text[end:].split("\n"):
        match = _OPTION.fullmatch(line.rstrip("\r"))
        if match:
            options.append(match["text"])
        elif options or line.strip():
            break
        end += len(line) + 1
    return options, headings[-1].start(), min(end, len(text))
