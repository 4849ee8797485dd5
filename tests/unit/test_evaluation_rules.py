"""Answer rules of the reasoning data sets: what is read out of a text, and which rule a task gets."""

from __future__ import annotations

import time

import pytest

from manylora.errors import DataError
from manylora.evaluation import RULES, TASK_RULES, AnswerRule, rules_for

BY_NAME = {rule.name: rule for rule in RULES}


@pytest.mark.parametrize(
    ("rule", "text", "label"),
    [
        ("boolean", "the correct answer is true", "true"),
        ("boolean", "false, not true", "false"),  # the first match
        ("boolean", "True", None),  # case counts
        ("boolean", "it is untrue", "true"),  # inside a word too, as published
        ("boolean", "", None),
        ("solution", "the correct answer is solution2", "solution2"),
        ("solution", "solution3", None),
        ("answer", "the correct answer is answer5", "answer5"),
        ("answer", "answer6 or answer1", "answer1"),
        ("answer", "Answer1", None),
        ("ending", "the correct answer is ending4", "ending4"),
        ("ending", "ending5", None),
        ("ending", "ending1 ending2", "ending1"),
        ("ending", "the ending is 3", None),
        ("option", "I take option2 over option1", "option2"),
        ("option", "option 1", None),
        ("number", "3 + 4 = 7 apples", "7"),
        ("number", "The answer is $1,234.50.", "1234.50"),
        ("number", "it fell to -12.", "-12."),
        ("number", "no digits", None),
        ("number", "", None),
        ("letter", "The answer is (C).", "C"),
        ("letter", "According to (B), it is B", "A"),  # the published reading falls for this
        ("letter", "it is f", None),
    ],
)
def test_a_rule_reads(rule: str, text: str, label: str | None) -> None:
    assert BY_NAME[rule].read(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("According to the table the answer is (B).", "B"),
        ("Answer: D", "D"),
        ("First the answer is A, but no: the answer is C", "C"),  # the last statement
        ("Rationale: 3 * 4 = 12.\nThe answer is option E.", "E"),
        ("The answer is Clear", None),  # a word, no letter
        ("The answer is A's total", None),
        ("Because of all this, (D) holds", "D"),
        ("Either (A) or (D)", None),
        ("B", "B"),
        (" (E). ", "E"),
        ("(E)", "E"),
        ("A train runs", None),
        ("According", None),
        ("b", None),
        ("", None),
    ],
)
def test_the_strict_reading_of_letters(text: str, label: str | None) -> None:
    read = BY_NAME["letter"].read_strictly
    assert read is not None
    assert read(text) == label


def test_according_is_right_for_the_published_reading_and_wrong_for_the_strict_one() -> None:
    letter = BY_NAME["letter"]
    assert letter.correct("According to me", "A")
    assert not letter.strictly_correct("According to me", "A")
    assert not letter.correct("According to me the answer is (B)", "B")
    assert letter.strictly_correct("According to me the answer is (B)", "B")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The answer is 15.", "15.0", True),
        ("9.801", "9.8", True),  # within 1e-3, the bound included up to rounding
        ("9.8012", "9.8", False),
        ("1,024", "1024", True),
        ("1024", "1,024", True),
        ("-3", "3", False),
        ("4 then 5", "4", False),
        ("nothing", "4", False),
        ("1" * 400, "4", False),
    ],
)
def test_a_number_is_right_within_a_thousandth(text: str, answer: str, right: bool) -> None:
    assert BY_NAME["number"].correct(text, answer) is right


def names(task: str, answers: list[str]) -> list[str] | None:
    rules = rules_for(task, answers)
    return None if rules is None else [rule.name for rule in rules]


@pytest.mark.parametrize(
    ("task", "answer", "rule"),
    [
        ("boolq", "true", "boolean"),
        ("piqa", "solution1", "solution"),
        ("social_i_qa", "answer3", "answer"),
        ("ARC-Challenge", "answer4", "answer"),
        ("ARC-Easy.test", "answer5", "answer"),
        ("openbookqa", "answer1", "answer"),
        ("hellaswag", "ending4", "ending"),
        ("winogrande", "option2", "option"),
        ("gsm8k", "18.0", "number"),
        ("AddSub", "9.8", "number"),
        ("MultiArith", "1,000", "number"),
        ("SVAMP", "-2", "number"),
        ("SingleEq", "5", "number"),
        ("math_data", "5", "number"),
        ("math_data", "C", "letter"),
        ("AQuA", "E", "letter"),
    ],
)
def test_known_data_sets_have_their_rule_by_name_and_by_form(task: str, answer: str, rule: str) -> None:
    assert names(task, [answer]) == [rule]
    assert names("my own task", [answer]) == [rule]


def test_every_label_form_belongs_to_one_rule() -> None:
    labels = ["true", "solution2", "answer5", "ending1", "option1", "A", "3.5"]
    assert [[rule.name for rule in RULES if rule.is_label(label)] for label in labels] == [
        [rule.name] for rule in RULES
    ]
    assert {rule for rules in TASK_RULES.values() for rule in rules} == set(RULES)


@pytest.mark.parametrize(
    "answers", [[], ["yes", "no"], ["true", "1"], ["answer1", "option1"], ["A", "F"], ["nan"], ["inf"], [""]]
)
def test_other_labels_have_no_rule(answers: list[str]) -> None:
    assert rules_for("my own task", answers) is None


def test_the_mixed_training_set_reads_each_row_by_its_label() -> None:
    rules = rules_for("math_data", ["4.0", "B"])
    assert rules is not None
    assert [rule.correct("B is 4", answer) for rule, answer in zip(rules, ["4.0", "B"], strict=True)] == [
        True
    ] * 2


def test_a_known_name_with_some_foreign_labels_is_an_error_and_with_all_foreign_ones_another_data_set() -> (
    None
):
    with pytest.raises(DataError, match=r"'boolq'.*'boolean'.*1 of its 2 answers.*'maybe'"):
        rules_for("boolq", ["true", "maybe"])
    assert rules_for("boolq", ["yes", "no"]) is None
    assert names("boolq", ["answer1", "answer2"]) == ["answer", "answer"]


@pytest.mark.parametrize(
    "text",
    [
        "answer is" + " " * 200_000,
        "answer:" + " " * 200_000 + "x",
        "answer " * 30_000,
        "(" * 200_000,
        "1." * 100_000,
    ],
)
def test_a_long_text_is_read_in_a_moment(text: str) -> None:
    began = time.perf_counter()
    for rule in RULES:
        rule.correct(text, "1")
        rule.strictly_correct(text, "1")
    assert time.perf_counter() - began < 5  # of one that grows with the square: minutes


def test_rules_are_values() -> None:
    assert isinstance(RULES[0], AnswerRule)
    with pytest.raises(AttributeError):
        RULES[0].name = "other"  # type: ignore[misc]
