"""The real files that `$MANYLORA_DATA` names: FLAN-8 and the reasoning sets load as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manylora.data import load_examples, load_splits, options_of, prompt_text

pytestmark = pytest.mark.skipif(not os.environ.get("MANYLORA_DATA"), reason="MANYLORA_DATA is not set")

WITH_OPTIONS = {
    "coreference",
    "entailment",
    "linguistic_acceptability",
    "paraphrase",
    "question_classification",
    "word_disambiguation",
}


@pytest.fixture
def root() -> Path:
    return Path(os.environ["MANYLORA_DATA"])


def test_flan8_has_8_tasks_of_300_and_200_rows(root: Path) -> None:
    splits = load_splits(data=root / "flan8" / "train", test=root / "flan8" / "test", seed=0)
    assert len(splits.train) == 8
    assert list(splits.train) == list(splits.validation) == list(splits.test)
    for task in splits.train:
        assert (len(splits.train[task]), len(splits.validation[task])) == (270, 30)
        assert len(splits.test[task]) == 200
    assert (splits.leaks, splits.dropped) == (0, 0)
    assert splits == load_splits(data=root / "flan8", seed=0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_flan8_options_hold_the_answer(root: Path, split: str) -> None:
    for task, rows in load_examples(root / "flan8", split=split).items():
        for row in rows:
            options = options_of(prompt_text(row))
            assert bool(options) == (task in WITH_OPTIONS)
            assert not options or row.output in options, row.origin
            assert not options or len(options) == len(set(options)) >= 2, row.origin


@pytest.mark.parametrize(
    ("file", "n"),
    [
        ("commonsense/boolq.test.json", 3270),
        ("commonsense/piqa.test.json", 1838),
        ("commonsense/social_i_qa.test.json", 1954),
        ("commonsense/winogrande.test.json", 1267),
        ("commonsense/openbookqa.test.json", 500),
        ("commonsense/ARC-Easy.test.json", 2376),
        ("commonsense/ARC-Challenge.test.json", 1172),
        ("math/gsm8k.test.json", 1319),
        ("math/AQuA.test.json", 254),
        ("math/SVAMP.test.json", 1000),
    ],
)
def test_reasoning_files_load_under_their_own_name(root: Path, file: str, n: int) -> None:
    [(task, rows)] = load_examples(root / "reasoning" / file).items()
    assert task == Path(file).name.split(".")[0]
    assert len(rows) == n
    assert all(row.answer for row in rows)


def test_math_training_rows_all_stand_in_the_test_files(root: Path) -> None:
    """The published training mix is four fifths of the six test sets, so a plan must show its leaks."""
    splits = load_splits(data=root / "reasoning" / "math", seed=0)
    assert splits.dropped == 3
    assert sum(map(len, splits.test.values())) == 4076
    tested = {prompt_text(row) for rows in splits.test.values() for row in rows}
    assert all(prompt_text(row) in tested for row in splits.train["math_data"])
    assert splits.leaks == 3268
