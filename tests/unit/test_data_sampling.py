"""A limit keeps a sample in which every answer has its share, the same in every verb, and a plan says what is alike."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.data import Example, load_examples, load_splits, sample_rows, single_answers


def rows(*outputs: str) -> list[Example]:
    return [Example(task="t", instruction=str(i), output=output) for i, output in enumerate(outputs)]


SORTED = rows(*["yes"] * 150, *["no"] * 150)


def test_a_file_sorted_by_answer_gives_both_answers() -> None:
    kept = sample_rows(SORTED, 20, task="paraphrase")
    assert len(kept) == 20
    assert all(9 <= count <= 11 for count in Counter(row.output for row in kept).values())
    assert kept == [row for row in SORTED if row in kept]  # in their order


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abbcccc"), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 20))
def test_each_answer_keeps_its_share_and_less_is_a_part_of_more(
    outputs: list[str], limit: int, more: int
) -> None:
    data = rows(*outputs)
    kept, larger = (sample_rows(data, n, task="t") for n in (limit, limit + more))
    assert len(kept) == min(limit, len(data))
    assert {row.instruction for row in kept} <= {row.instruction for row in larger}
    counts, own = Counter(outputs), Counter(row.output for row in kept)
    for answer, count in counts.items():
        assert abs(own[answer] - count * min(1, limit / len(data))) <= len(counts)
    if len(counts) == 2:
        assert all(abs(own[a] - n * min(1, limit / len(data))) <= 1 + 1e-9 for a, n in counts.items())


def test_free_text_is_sampled_from_all_over_the_rows() -> None:
    kept = sample_rows(rows(*map(str, range(300))), 30, task="t")
    thirds = Counter(int(row.output) // 100 for row in kept)
    assert set(thirds) == {0, 1, 2}
    mixed = sample_rows(rows(*["yes"] * 150, *map(str, range(150))), 40, task="t")
    assert 10 <= sum(row.output == "yes" for row in mixed) <= 30


def test_the_choice_is_the_tasks_own_and_always_the_same() -> None:
    assert sample_rows(SORTED, 9, task="a") == sample_rows(SORTED, 9, task="a")
    assert sample_rows(SORTED, 9, task="a") != sample_rows(SORTED, 9, task="b")
    assert sample_rows(SORTED, None, task="a") == sample_rows(SORTED, 300, task="a") == SORTED


def test_files_and_splits_are_limited_by_the_same_sample(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": row.instruction, "output": row.output}) for row in SORTED]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "pair.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wanted = [row.instruction for row in sample_rows(SORTED, 20, task="pair")]
    assert [row.instruction for row in load_examples(tmp_path, split="test", limit=20)["pair"]] == wanted
    splits = [load_splits(data=tmp_path, limit=20, seed=seed) for seed in (0, 1)]
    for (
        found
    ) in splits:  # the seed of a run cuts the validation rows, and does not choose what it is tested on
        assert [row.instruction for row in found.test["pair"]] == wanted
        train = [*found.train["pair"], *found.validation["pair"]]
        assert sorted(int(row.instruction) for row in train) == sorted(map(int, wanted))


def test_one_answer_for_all_is_said(tmp_path: Path) -> None:
    data = {"alike": rows("yes", "yes "), "apart": rows("yes", "no"), "alone": rows("yes")}
    assert single_answers(data, what="test") == ["all 2 test rows of task alike have one answer, 'yes'"]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": str(i), "output": "ja"}) for i in range(30)))
    assert "all 27 training rows of task x have one answer, 'ja'" in load_splits(data=path).notes
