"""Where matrices begin, how they wait on disk, and how a round's training fits into the whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from federation import bench_for, rows_of, settings
from manylora.errors import RunError
from manylora.federated.home import VersionedState, folder_name
from manylora.federated.parts import initial_state
from manylora.training.passes import _shifted, train_pass

SHAPES = {"q": (20, 30), "k": (10, 30)}


def begin(
    rank: int, *, seed: int = 0, who: str = "", parts: str = "A B M B1 B2 B0"
) -> dict[str, torch.Tensor]:
    return initial_state(parts.split(), SHAPES, rank=rank, largest_rank=8, intermediate=4, seed=seed, who=who)


def test_beginnings_are_a_function_of_the_seed() -> None:
    first, again = begin(8), begin(8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["q.A"], begin(8, seed=1)["q.A"])
    assert not torch.equal(first["q.A"], begin(8, who="ada")["q.A"])
    assert not torch.equal(first["q.A"], first["k.A"])


def test_the_a_of_a_smaller_rank_is_the_first_rows_of_a_larger_one() -> None:
    assert torch.equal(begin(8)["q.A"][:3], begin(3)["q.A"])


@pytest.mark.parametrize("part", ["A", "M", "B1"])
def test_what_is_drawn_is_kaiming_uniform_and_the_rest_is_zero(part: str) -> None:
    state = begin(8)
    drawn = state[f"q.{part}"]
    bound = 1 / math.sqrt(drawn.shape[1])
    assert 0.8 * bound < drawn.abs().max() <= bound
    for name in ("B", "B2", "B0"):
        assert not state[f"q.{name}"].any()


def test_a_version_is_whole_or_not_there(tmp_path: Path) -> None:
    store = VersionedState(tmp_path / "ada")
    assert store.versions() == []
    store.write(3, {"q.A": torch.ones(2, 3)}, {"rank": 2})
    store.write(4, {"q.A": torch.zeros(2, 3)}, {"rank": 2})
    (tmp_path / "ada" / "round-0005.partial").write_bytes(b"half")  # what a kill leaves
    assert store.versions() == [3, 4]
    state, facts = store.read(3)
    assert torch.equal(state["q.A"], torch.ones(2, 3))
    assert facts == {"rank": 2}
    store.write(4, {"q.A": torch.full((2, 3), 7.0)}, {})
    assert store.read(4)[0]["q.A"][0, 0] == 7
    store.keep(4)
    assert [path.name for path in (tmp_path / "ada").iterdir()] == ["round-0004.safetensors"]
    with pytest.raises(RunError, match=r"no state of round 3 \(only 4\)"):
        store.read(3)
    whole = (tmp_path / "ada" / "round-0004.safetensors").read_bytes()
    for damaged in (
        b"",
        b"half",
        whole[:-3],
        whole.replace(b'"facts"', b'"fax"  '),
        whole.replace(b"{}", b"[]", 1),
    ):
        (tmp_path / "ada" / "round-0004.safetensors").write_bytes(damaged)
        with pytest.raises(RunError, match="damaged"):
            store.read(4)


def test_every_name_is_one_folder_of_its_own() -> None:
    names = [
        "ada",
        "a/b",
        "a%2Fb",
        "..",
        ".",
        ".stacks",
        "a b",
        "ü",
        "a\\b",
        "a:b",
        "A",
        "x" * 400,
        "x" * 401,
        "長" * 60,
    ]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert not any("/" in name or name.startswith(".") or len(name) > 200 for name in folders)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_rounds_follow_one_schedule(kind: str) -> None:
    def rates(first: int, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=12)
        schedule = _shifted(schedule, optimizer, first_step=first)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    whole = rates(0, 12)
    assert whole[0] == 0 < max(whole) == pytest.approx(0.1)
    assert rates(0, 4) + rates(4, 4) + rates(8, 4) == pytest.approx(whole)


def test_moments_that_are_handed_on_go_on(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    config = settings(tiny_base, small_data, rounds=2)
    bench = bench_for(config)
    tasks = bench.encode(rows_of(small_data)["ada"].train)
    parts = initial_state("AB", bench.shapes, rank=4, largest_rank=4, intermediate=4, seed=0)

    def second_pass(*, keep: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bench.load(parts, rank=4)
        moments = None
        for number in range(2):
            result = train_pass(
                bench.model, tasks, bench.train_config, epochs=1.0, number=number, passes=2, seed=number,
                pad_token_id=0, scratch=tmp_path, moments=moments if keep else None,
            )  # fmt: skip
            moments = result.moments
        name = next(name for name in result.moments if name.endswith("lora_B"))
        return bench.state()["model.layers.0.mlp.down_proj.B"], dict(result.moments[name])

    kept, moments = second_pass(keep=True)
    forgotten, fresh = second_pass(keep=False)
    assert not torch.equal(kept, forgotten)
    assert (float(moments["step"]), float(fresh["step"])) == (6.0, 3.0)
