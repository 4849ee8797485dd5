"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.evaluation import chosen_option, exact_match, normalise, option_accuracy, rouge1

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
        ("?!", "?!", 0.0),  # no word of a-z, 0-9
        ("да", "да", 0.0),
    ],
)
def test_rouge1_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert rouge1(prediction, reference) == pytest.approx(expected)


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
