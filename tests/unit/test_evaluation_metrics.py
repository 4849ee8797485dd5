"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from manylora.evaluation import chosen_option, exact_match, normalise, option_accuracy, rouge1
from manylora.evaluation.metrics import words_of

WORDS = st.lists(st.sampled_from(["the", "a", "cat", "dog", "sat", "on", "mat"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 100.0),
        ("the cat", "the cat sat on", 100 * 2 * 1.0 * 0.5 / 1.5),  # precision 1, recall 1/2
        (
            "the the the",
            "the cat",
            100 * 2 * (1 / 3) * (1 / 2) / (5 / 6),
        ),  # a word counts as often as it stands
        ("sat cat the", "the cat sat", 100.0),  # order does not count
        ("The CAT, sat!", "the cat sat", 100.0),  # nor do case and punctuation
        ("running", "run", 0.0),  # no stemming
        ("dog", "cat", 0.0),
        ("", "the cat", 0.0),
        ("the cat", "", 0.0),
        ("", "", 0.0),
        ("?!", "?!", 0.0),  # no word
    ],
)
def test_rouge1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert rouge1(prediction, reference) == pytest.approx(expected)
    assert rouge1(prediction, reference, words="published") == pytest.approx(expected)


RIGHT = ["לחם", "面包", "хліб", "😀", "pan", "हिन्दी", "ภาษาไทย", "한국어", "カタカナ", "مرحبا", "Öl"]


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_answer_scores_100_in_every_script(text: str) -> None:
    assert rouge1(text, text) == 100.0
    others = [other for other in RIGHT if other != text]
    assert [rouge1(other, text) for other in others] == [0.0] * len(others)


def test_the_published_words_are_those_of_a_to_z() -> None:
    assert rouge1("да", "да", words="published") == 0.0
    assert rouge1("l", "Öl", words="published") == 100.0
    assert rouge1("l", "Öl") == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Grüße, don't!", ["grüsse", "don", "t"]),
        ("东京2020年に", ["东", "京", "2020", "年", "に"]),  # no blanks: a word each
        ("हिन्दी में", ["हिन्दी", "में"]),  # marks belong to their letters
        ("E\u0301 \u00e9", ["é", "é"]),  # one form of a letter
        ("ＡＢ １", ["ab", "1"]),
        ("👍🏽 👩\u200d👧 ☀️", ["👍🏽", "👩\u200d👧", "☀️"]),
        ("5 € → 6 + $ =", ["5", "€", "→", "6"]),  # ASCII signs are none, as published
        ("a_b ་ «x»", ["a", "b", "x"]),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_on_ascii_text_the_words_are_the_published_ones(text: str) -> None:
    assert words_of(text) == tokenize(text, None)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(max_codepoint=127), max_size=20),
    st.text(st.characters(max_codepoint=127), max_size=20),
)
def test_on_ascii_text_both_scores_are_equal(one: str, other: str) -> None:
    assert rouge1(one, other) == rouge1(one, other, words="published")


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_rouge1_f1_is_symmetric_and_bounded(one: str, other: str) -> None:
    value = rouge1(one, other)
    assert 0.0 <= value <= 100.0 + 1e-9
    assert value == pytest.approx(rouge1(other, one))


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ("yes", "yes", True),
        ("  it is\tnot \n possible ", "it is not possible", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("", "yes", False),
        ("", "", True),
    ],
)
def test_exact_match_normalises_white_space_alone(prediction: str, reference: str, equal: bool) -> None:
    assert exact_match(prediction, reference) == 100.0 * equal


def test_normalise_joins_words_with_single_blanks() -> None:
    assert normalise(" a \n\n b\u00a0c ") == "a b c"


OPTIONS = ["yes", "it is not possible to tell", "no"]


@pytest.mark.parametrize(
    ("prediction", "chosen"),
    [
        ("yes", "yes"),
        (" YES ", "yes"),
        ("it is  not possible\nto tell", "it is not possible to tell"),
        ("yes, it is", None),
        ("not", None),
        ("- no", None),
        ("", None),
    ],
)
def test_a_prediction_names_an_option_only_as_a_whole(prediction: str, chosen: str | None) -> None:
    assert chosen_option(prediction, OPTIONS) == chosen


def test_case_counts_where_two_options_differ_in_case_alone() -> None:
    assert chosen_option("Polish", ["polish", "Polish"]) == "Polish"
    assert chosen_option("POLISH", ["polish", "Polish"]) is None


def test_option_accuracy_is_right_wrong_or_not_measured() -> None:
    assert option_accuracy("No", "no", OPTIONS) == 100.0
    assert option_accuracy("yes", "no", OPTIONS) == 0.0
    assert option_accuracy("no, never", "no", OPTIONS) == 0.0
    assert option_accuracy("maybe", "maybe", OPTIONS) is None
