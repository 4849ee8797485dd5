"""Metrics of one prediction against one reference, each between 0 and 100."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import regex

from manylora.training.settings import Words

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
