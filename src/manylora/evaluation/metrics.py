"""Metrics of one prediction against one reference, each between 0 and 100, and the list of those that are measured.

A new one is a function and an entry of `METRICS`: it then stands in predictions.jsonl and scores.json, in the tables
of `train` and `evaluate`, on the pages, and in the cells and tables of a study.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import regex

from manylora.data import Words
from manylora.evaluation.rules import AnswerRule

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
"""Scripts that put no blank between words."""

_WORD = regex.compile(
    rf"(?:[[\p{{L}}\p{{N}}]&&[{_UNSPACED}]]\p{{M}}*)"  # one character with its marks
    rf"|(?:[[\p{{L}}\p{{N}}]--[{_UNSPACED}]][\p{{M}}\p{{Join_Control}}]*)+"  # a run of letters and digits
    r"|(?:[[\p{Sc}\p{Sm}\p{So}]--\p{ASCII}](?:[\p{M}\p{Sk}]|\u200d\p{So})*)",  # a symbol, with what is joined to it
    flags=regex.VERSION1,
)


def normalise(text: str) -> str:
    """The text without outer white space and with one blank for each inner run of it."""
    return " ".join(text.split())


def rouge1(prediction: str, reference: str, *, words: Words = "all") -> float:
    """ROUGE-1 F1 × 100 of Google's rouge_score, without stemming (Lin 2004).

    Case and punctuation do not count. A text without a word (empty, punctuation alone) scores 0 against everything.

    Args:
        prediction: what the model wrote.
        reference: what it should have written.
        words: "all": words of every script, see `words_of`. "published": as rouge_score reads them, runs of a–z and 0–9
            after lower-casing, to which other scripts are nothing ("Öl" is "l"). On ASCII text both are equal.
    """
    return 100.0 * float(_scorer(words).score(reference, prediction)["rouge1"].fmeasure)


def words_of(text: str) -> list[str]:
    """The words of a text, whatever its script.

    Runs of letters, their marks and digits are words, case folded and in one normal form (NFKC); in scripts that put no
    blank between words each character is one (with its marks), and so is every emoji or other symbol beyond ASCII.

    >>> words_of("Grüße an 面包, don't! 😀")
    ['grüsse', 'an', '面', '包', 'don', 't', '😀']
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _WORD.findall(folded)


def has_word(text: str, *, words: Words = "all") -> bool:
    """Whether ROUGE-1 sees anything in the text."""
    return bool(_scorer(words).score(text, text)["rouge1"].fmeasure)


def exact_match(prediction: str, reference: str) -> float:
    """100 where both are equal once white space is normalised, else 0; case and punctuation count."""
    return 100.0 * (normalise(prediction) == normalise(reference))


def chosen_option(prediction: str, options: Sequence[str]) -> str | None:
    """The option that a prediction names; `None` where it names none.

    A prediction names an option when it is equal to it as a whole once white space is normalised; failing
    that, when it is equal but for case to one option alone. Longer answers that contain an option name none.
    """
    wanted = normalise(prediction)
    exact = [option for option in options if normalise(option) == wanted]
    if exact:
        return exact[0]
    alike = [option for option in options if normalise(option).casefold() == wanted.casefold()]
    return alike[0] if len(alike) == 1 else None


def option_accuracy(prediction: str, reference: str, options: Sequence[str]) -> float | None:
    """100 where the prediction names the same option as the reference, else 0 (see `chosen_option`).

    `None` where the reference itself names none of the options: the row then says nothing about choosing.
    """
    right = chosen_option(reference, options)
    if right is None:
        return None
    chosen = chosen_option(prediction, options)
    return 100.0 * (chosen is not None and normalise(chosen) == normalise(right))


@cache
def _scorer(words: Words) -> RougeScorer:
    # Imported here: rouge_score brings nltk, which takes a second or two to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False, tokenizer=_EveryScript() if words == "all" else None)


class _EveryScript:
    """What `RougeScorer` asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """The words."""
        return words_of(text)


# ---- what is measured


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prediction, and all that a metric may want beside it."""

    prediction: str
    reference: str
    """What should have been written."""
    prompt: str = ""
    options: Sequence[str] = ()
    """What the prompt lets choose from; empty where it lists nothing."""
    answer: str | None = None
    """Gold label, where the row has one."""
    rule: AnswerRule | None = None
    """How the label is read out of a prediction; `None` where there is no label."""
    strictly: bool = False
    """Whether a row of the task has a rule with a strict reading."""
    rouge: Words = "all"
    """What ROUGE-1 takes for words in this run."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One entry of `METRICS`."""

    label: str
    """As tables call it."""
    measure: Callable[[Answered], float | None]
    """0 to 100; `None` where the row says nothing about it, so that it does not count."""
    leads: bool = False
    """Whether it can be a task's main metric, so that tables name it in a column and show its value as the score. The
    last such metric that a task's rows have leads."""


ACCURACY = "accuracy"
"""Share of rows that are right by the task's answer rule (see `manylora.evaluation.rules`)."""
STRICT_ACCURACY = "strict_accuracy"
"""The same under the rule's strict reading, where it has one (AQuA)."""
ROUGE1 = "rouge1_all"
"""ROUGE-1 over the words of every script."""
ROUGE1_PUBLISHED = "rouge1"
"""ROUGE-1 as published and as earlier versions measured it: words of a–z and 0–9 alone. A name of its own, so that
scores under the two are never taken for one."""
EXACT_MATCH = "exact_match"
OPTION_ACCURACY = "option_accuracy"
"""Share of rows that name the right option, over the rows whose prompt lists it under OPTIONS."""


def _measure_rouge(words: Words) -> Callable[[Answered], float | None]:
    return lambda row: rouge1(row.prediction, row.reference, words=words) if row.rouge == words else None


def _measure_options(row: Answered) -> float | None:
    return option_accuracy(row.prediction, row.reference, row.options) if row.options else None


def _measure_rule(row: Answered) -> float | None:
    if row.rule is None or row.answer is None:
        return None
    return 100.0 * row.rule.correct(row.prediction, row.answer)


def _measure_rule_strictly(row: Answered) -> float | None:
    if row.rule is None or row.answer is None or not row.strictly:
        return None
    return 100.0 * row.rule.strictly_correct(row.prediction, row.answer)


METRICS: dict[str, Metric] = {
    ROUGE1: Metric(label="ROUGE-1", measure=_measure_rouge("all"), leads=True),
    ROUGE1_PUBLISHED: Metric(label="ROUGE-1 a–z", measure=_measure_rouge("published"), leads=True),
    EXACT_MATCH: Metric(label="exact match", measure=lambda row: exact_match(row.prediction, row.reference)),
    OPTION_ACCURACY: Metric(label="option accuracy", measure=_measure_options),
    ACCURACY: Metric(label="accuracy", measure=_measure_rule, leads=True),
    STRICT_ACCURACY: Metric(label="strict accuracy", measure=_measure_rule_strictly),
}
"""Name in files to metric, in the order of columns."""


def measure_row(row: Answered) -> dict[str, float]:
    """Every metric that the row says something about."""
    found = {name: metric.measure(row) for name, metric in METRICS.items()}
    return {name: value for name, value in found.items() if value is not None}


def leading_metric(measured: Sequence[str]) -> str:
    """The main one of the metrics that a task's rows have."""
    return [name for name, metric in METRICS.items() if metric.leads and name in measured][-1]


def metric_label(name: str) -> str:
    """A metric as tables call it; one of another version keeps its name."""
    return METRICS[name].label if name in METRICS else name
