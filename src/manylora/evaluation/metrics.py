"""Metrics of one prediction against one reference, each between 0 and 100."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


def normalise(text: str) -> str:
    """The text without outer white space and with one blank for each inner run of it."""
    return " ".join(text.split())


def rouge1(prediction: str, reference: str) -> float:
    """ROUGE-1 F1 × 100 of Google's rouge_score, without stemming (Lin 2004).

    Words are runs of a–z and 0–9 after lower-casing, so punctuation and case do not count, and a text that
    has no such word (empty, punctuation alone, a script other than Latin) scores 0 against everything.
    """
    return 100.0 * float(_scorer().score(reference, prediction)["rouge1"].fmeasure)


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
def _scorer() -> RougeScorer:
    # Imported here: rouge_score brings nltk, which takes a second or two to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=False)
