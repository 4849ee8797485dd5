"""Answer rules: how the gold label of a reasoning data set is read out of a generated text.

The rules are those of LLM-Adapters (arXiv 2304.01933), which papers on commonsense and math report:

commonsense  the first match of the task's pattern in the output, case-sensitive; none is wrong.
numbers      commas removed, the last number in the output, right within 1e-3 of the label.
letters      (AQuA) the first of A to E anywhere, so that "According" counts as A. A strict reading, which
             only takes a letter given as the answer, stands beside it.

The rule is chosen by the task's name where it is one of the known data sets, else by the form of the labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from manylora.errors import DataError

NUMBER_TOLERANCE = 1e-3
"""Largest distance between a right number and its label (LLM-Adapters, evaluate.py)."""

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[A-E]")
# Only one part may take a run of white space: with two side by side the time grows with its square.
_LETTER_AS_ANSWER = re.compile(r"\b[Aa]nswer\s*(?:is|:|=)\s*(?::\s*)?(?:[Oo]ption\s*)?\(?([A-E])(?![\w'’])")
_LETTER_IN_BRACKETS = re.compile(r"\(([A-E])\)")
_LETTER_ALONE = re.compile(r"\(?([A-E])[).:]?")
_SPLIT_SUFFIX = re.compile(r"\.(?:train|validation|valid|val|dev|test)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class AnswerRule:
    """How to read a label out of a text, and when it is right."""

    name: str
    read: Callable[[str], str | None]
    """The label that a generated text gives; `None` where it gives none."""
    is_label: Callable[[str], bool]
    """Whether a gold label has the form that this rule can compare."""
    equal: Callable[[str, str], bool]
    """Whether a label that was read equals the gold label."""
    read_strictly: Callable[[str], str | None] | None = None
    """A stricter reading, reported beside the first; `None` where there is no second one."""

    def correct(self, prediction: str, answer: str) -> bool:
        """Whether the prediction gives the gold label."""
        return self._right(self.read(prediction), answer)

    def strictly_correct(self, prediction: str, answer: str) -> bool:
        """Whether it does under the strict reading; the same as `correct` where there is none."""
        return self._right((self.read_strictly or self.read)(prediction), answer)

    def _right(self, label: str | None, answer: str) -> bool:
        return label is not None and self.equal(label, answer.strip())


def _first_match(name: str, pattern: str) -> AnswerRule:
    compiled = re.compile(pattern)

    def read(text: str) -> str | None:
        match = compiled.search(text)
        return match[0] if match else None

    return AnswerRule(
        name=name,
        read=read,
        is_label=lambda label: compiled.fullmatch(label.strip()) is not None,
        equal=str.__eq__,
    )


def last_number(text: str) -> str | None:
    """The last number in a text, commas removed ("1,000" is 1000); `None` without one."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else None


def first_letter(text: str) -> str | None:
    """The first capital A to E anywhere, inside a word too, as LLM-Adapters reads AQuA."""
    match = _LETTER.search(text)
    return match[0] if match else None


def stated_letter(text: str) -> str | None:
    """The letter A to E that a text gives as its answer; `None` where it gives none or several.

    In this order: the last "answer is X", "answer: X" or "answer is (X)"; the one letter in brackets, "(X)",
    if only one stands in the text; the text itself, if it is a letter and nothing else ("X", "X.", "X)").
    """
    stated = _LETTER_AS_ANSWER.findall(text)
    if stated:
        return str(stated[-1])
    bracketed = set(_LETTER_IN_BRACKETS.findall(text))
    if bracketed:
        return str(bracketed.pop()) if len(bracketed) == 1 else None
    alone = _LETTER_ALONE.fullmatch(text.strip())
    return alone[1] if alone else None


def _as_number(label: str) -> float:
    try:
        return float(label.replace(",", ""))
    except ValueError:
        return math.nan


BOOLEAN = _first_match("boolean", "true|false")
SOLUTION = _first_match("solution", "solution1|solution2")
ANSWER = _first_match("answer", "answer1|answer2|answer3|answer4|answer5")
ENDING = _first_match("ending", "ending1|ending2|ending3|ending4")
OPTION = _first_match("option", "option1|option2")
NUMBER = AnswerRule(
    name="number",
    read=last_number,
    is_label=lambda label: math.isfinite(_as_number(label)),
    equal=lambda read, answer: abs(_as_number(read) - _as_number(answer)) <= NUMBER_TOLERANCE,
)
LETTER = AnswerRule(
    name="letter",
    read=first_letter,
    is_label=lambda label: _LETTER.fullmatch(label.strip()) is not None,
    equal=str.__eq__,
    read_strictly=stated_letter,
)

RULES: tuple[AnswerRule, ...] = (BOOLEAN, SOLUTION, ANSWER, ENDING, OPTION, LETTER, NUMBER)
"""Every rule. The forms of their labels exclude each other."""

TASK_RULES: Mapping[str, tuple[AnswerRule, ...]] = {
    "boolq": (BOOLEAN,),
    "piqa": (SOLUTION,),
    "social_i_qa": (ANSWER,),
    "arc-challenge": (ANSWER,),
    "arc-easy": (ANSWER,),
    "openbookqa": (ANSWER,),
    "hellaswag": (ENDING,),
    "winogrande": (OPTION,),
    "gsm8k": (NUMBER,),
    "addsub": (NUMBER,),
    "multiarith": (NUMBER,),
    "svamp": (NUMBER,),
    "singleeq": (NUMBER,),
    "math_data": (NUMBER, LETTER),
    "aqua": (LETTER,),
}
"""Known data sets by lower-case name (the files of LLM-Adapters). The training set math_data mixes rows of
numbers with AQuA's letters, so each of its rows is read by the form of its label."""


def rules_for(task: str, answers: Sequence[str]) -> list[AnswerRule] | None:
    """The rule that scores each row of a task, or `None` where the task has no rule.

    A known data set's name decides (any case; ".test" and the like at its end do not count). Any other task,
    and one of a known name whose labels have another form throughout, gets the one rule whose label form all
    of `answers` have, for example "true" and "false" only, or numbers only; labels of no such form, or of
    several, have no rule and the task is scored by its output text.

    Args:
        task: the task's name.
        answers: the gold label of each row.

    Raises:
        DataError: the name is a known data set's, but only some of the labels are of its form.
    """
    if not answers:
        return None
    known = TASK_RULES.get(_SPLIT_SUFFIX.sub("", task).lower(), ())
    found = [next((rule for rule in known if rule.is_label(answer)), None) for answer in answers]
    rules = [rule for rule in found if rule is not None]
    if len(rules) == len(answers):
        return rules
    if rules:
        wrong = [answer for answer, rule in zip(answers, found, strict=True) if rule is None]
        raise DataError(
            f"Task {task!r} is scored by the rule {rules[0].name!r}, but {len(wrong)} of its {len(answers)} "
            f"answers are not of that form, such as {wrong[0]!r}. Correct those answers."
        )
    common = next((rule for rule in RULES if all(map(rule.is_label, answers))), None)
    return None if common is None else [common] * len(answers)
