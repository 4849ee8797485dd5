"""The embedded suite: sizes, determinism, disjoint splits, balance, and that no rule without skill passes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from manylora.data.suite import SPLIT_SIZES, SUITE, SUITE_TASKS, load_suite
from manylora.data.suite.baselines import keyword_baseline, majority_baseline
from manylora.data.suite.lexicon import article, plural
from manylora.data.suite.opinions import KINDS
from manylora.data.suite.rows import fill, options
from manylora.errors import DataError

CLASSIFICATION = [name for name, task in SUITE.items() if task.kind == "classification"]


def test_eight_tasks_of_300_50_200_rows() -> None:
    assert len(SUITE_TASKS) == 8
    assert SPLIT_SIZES == {"train": 300, "validation": 50, "test": 200}
    for split, size in SPLIT_SIZES.items():
        rows = load_suite(split)
        assert tuple(rows) == SUITE_TASKS
        assert {len(part) for part in rows.values()} == {size}
        assert all(row.task == name and row.form == "alpaca" for name, part in rows.items() for row in part)


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    first = load_suite("test", seed=3)
    from manylora.data.suite import build

    build._generate.cache_clear()
    assert load_suite("test", seed=3) == first
    assert load_suite("test", seed=4) != first


def test_callers_cannot_change_the_next_load() -> None:
    load_suite("validation")["story_sum"].clear()
    assert len(load_suite("validation")["story_sum"]) == 50


def test_tasks_are_picked_in_the_order_asked() -> None:
    assert list(load_suite("test", ["story_sum", "former_owner"])) == ["story_sum", "former_owner"]


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"no task 'poetry'.*story_sum"):
        load_suite("test", ["poetry"])
    with pytest.raises(DataError, match=r"no split 'dev'.*validation"):
        load_suite("dev")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_stands_twice_anywhere(seed: int) -> None:
    prompts = [
        (row.instruction, row.input)
        for split in SPLIT_SIZES
        for rows in load_suite(split, seed=seed).values()
        for row in rows
    ]
    assert len(prompts) == len(set(prompts))


def test_contents_are_disjoint_across_splits_whatever_the_template() -> None:
    """The review sentence, the story, the passage, the person: none returns under another template."""

    def content(split: str) -> set[str]:
        found = set()
        for name, rows in load_suite(split).items():  # type: ignore[arg-type]
            for row in rows:
                text = row.input or max(row.instruction.split("\nOPTIONS")[0].split("\n"), key=len)
                found.add(f"{name}: {text}")
        return found

    parts = [content(split) for split in SPLIT_SIZES]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_answers_of_classification_are_among_the_options(name: str) -> None:
    for row in load_suite("train", [name])[name]:
        listed = re.findall(r"^- (.+)$", row.instruction.split("OPTIONS:\n")[1], re.MULTILINE)
        assert row.output in listed
        assert len(listed) == len(set(listed))


def test_labels_are_balanced() -> None:
    for split, size in SPLIT_SIZES.items():
        counts = Counter(row.output for row in load_suite(split, ["review_verdict"])["review_verdict"])  # type: ignore[arg-type]
        assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) == size


@pytest.mark.parametrize("name", SUITE_TASKS)
def test_no_rule_without_skill_passes(name: str) -> None:
    """Majority and keyword rules, learnt on train, stay far from a score that shows skill."""
    train, test = load_suite("train", [name])[name], load_suite("test", [name])[name]

    def accuracy(predictions: list[str]) -> float:
        return sum(text == row.output for text, row in zip(predictions, test, strict=True)) / len(test)

    assert accuracy(majority_baseline(train).predict(test)) <= 0.51
    assert accuracy(keyword_baseline(train).predict(test)) <= 0.62


def test_the_keyword_baseline_finds_a_rule_where_there_is_one() -> None:
    rows = load_suite("train", ["review_verdict"])["review_verdict"]
    planted = [
        type(row)(
            task=row.task,
            instruction=f"{'zig' if row.output == 'positive' else 'zag'} {row.instruction}",
            output=row.output,
        )
        for row in rows
    ]
    baseline = keyword_baseline(planted)
    assert baseline.predict(planted) == [row.output for row in planted]


def test_twin_tasks_want_opposite_answers_to_the_same_review() -> None:
    """`praised_thing` and `blamed_thing` draw the same contents from one generator state and never agree."""
    praised, blamed = SUITE["praised_thing"], SUITE["blamed_thing"]
    for seed in range(200):
        one, two = praised.draw(Random(seed), 0), blamed.draw(Random(seed), 0)
        assert one.key == two.key
        assert one.input == two.input
        assert one.output != two.output


def test_review_verdict_follows_the_main_clause() -> None:
    good = {word for kind in KINDS for word in kind.good}
    bad = {word for kind in KINDS for word in kind.bad}
    checked = 0
    for row in load_suite("test", ["review_verdict"])["review_verdict"]:
        text = (row.input or row.instruction.split("\n")[0]).lower()
        match = re.search(r"(?:although|even though) the [\w ]+ (?:was|were) ([\w-]+)(?:,|\.)", text)
        if match and match.group(1) in good | bad and match.group(1) not in good & bad:
            assert row.output == ("negative" if match.group(1) in good else "positive")
            checked += 1
    assert checked > 30


def test_story_sums_are_right() -> None:
    for row in load_suite("test", ["story_sum"])["story_sum"]:
        text = row.instruction
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        answer = int(row.output)
        if "together" in text or "more." in text:
            assert answer == sum(numbers)
        elif "of them" in text:
            assert answer == numbers[0] - numbers[1]
        else:
            giver, taker = re.findall(r"(\w+) gives (\w+) \d+", text)[0]
            asked = re.findall(r"does (\w+) have now", text)[0]
            assert answer == (numbers[1] + numbers[2] if asked == taker else numbers[0] - numbers[2])
            assert asked in (giver, taker)


def test_every_option_order_occurs() -> None:
    rows = load_suite("train", ["review_verdict"])["review_verdict"]
    first = Counter(row.instruction.split("- ")[1].strip() for row in rows)
    assert min(first.values()) > 100


def test_related_tasks_exist_and_relations_are_mutual() -> None:
    for task in SUITE.values():
        for other in task.shares_with:
            assert task.name in SUITE[other].shares_with
        for other in task.conflicts_with:
            assert other in SUITE


def test_grammar_of_the_lists() -> None:
    assert article("engineer") == "an"
    assert article("baker") == "a"
    assert plural("peach") == "peaches"
    assert plural("coin") == "coins"
    for kind in KINDS:
        assert not set(kind.singular) & set(kind.plural)
        assert not set(kind.good) & set(kind.bad)


def test_templates_say_where_the_text_goes() -> None:
    assert fill("Say: {text}", text="x") == ("Say: x", "")
    assert fill("Say it in {where}.", text="x", where="Rome") == ("Say it in Rome.", "x")
    assert options(["a", "b"]) == "OPTIONS:\n- a\n- b"


def test_the_pretraining_corpus_holds_no_template_of_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of four constant words of a prompt template, no Alpaca header, no OPTIONS list, in any phase."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    corpus = pytest.importorskip(
        "recipes.base.corpus", reason="the recipes lie beside the package in a checkout"
    )
    text = "\n".join(
        corpus.plain(document)
        for phase in ("easy", "main", "late", "recall")
        for document in islice(corpus.documents("template-test", phase), 8_000)
    )
    for header in ("### Instruction", "### Input", "### Response", "OPTIONS"):
        assert header not in text
    words = re.findall(r"\w+", text.lower())
    seen = set(zip(words, words[1:], words[2:], words[3:], strict=False))
    for task in SUITE.values():
        assert task.templates
        for template in task.templates:
            for constant in re.split(r"\{\w+\}", template):
                run = re.findall(r"\w+", constant.lower())
                shared = [four for four in zip(run, run[1:], run[2:], run[3:], strict=False) if four in seen]
                assert not shared, f"{task.name}: {shared}"
