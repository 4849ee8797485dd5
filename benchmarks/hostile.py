"""What hostile clients cost, and what each robust sum costs where there are none.

    python -m benchmarks.hostile             fill docs/studies/hostile.jsonl, a line a cell, and print the tables
    python -m benchmarks.hostile --tables    print the tables of what is there

Eight clients, Fed-ALoRA on the embedded base and suite. A hostile client trains as the others do and sends the change
the other way round, FACTOR times as long: well within the limits of --max-update and --max-ratio, so that nothing but
the sum stands against it. The score is the mean over the personal models of clients that are honest in every cell (the
first three where all have the same tasks, all eight where each has its own), each on its own test rows; ± is the sample
deviation over seeds, "minus honest mean" is paired by seed with the weighted mean without hostile clients.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manylora.federated import (
    ClientData,
    FederateConfig,
    LocalClients,
    Reply,
    Rounds,
    Workbench,
    client_data,
    pack,
    unpack,
)

RULES = ("none", "clip", "trimmed-mean", "median")
HOSTILE = {"iid": (0, 1, 2), "task": (0,)}
"""How many clients are hostile, by how the rows are dealt out. With a task each, clients pull in directions that have
little to do with each other, honest or not; what is asked there is what the rules cost."""
FACTOR = 4.0
SETTINGS: dict[str, Any] = {
    "clients": 8, "rounds": 4, "local_steps": 5, "limit": 64, "target_modules": "q_proj,v_proj", "device": "cpu",
    "reference": "none", "lora_dropout": 0.0,
}  # fmt: skip
BY_PARTITION: dict[str, dict[str, Any]] = {
    "iid": {"tasks": "praised_thing,blamed_thing,former_owner", "scored_clients": 3},
    "task": {"scored_clients": 8},
}
TEST_ROWS = {"iid": 16, "task": 24}
"""Of each task; a client has all three tasks, or one of eight."""


class SomeHostile(LocalClients):
    """The clients of which the last few send their change the other way round."""

    hostile: frozenset[str] = frozenset()

    def ask(
        self, names: Sequence[str], message: Callable[[str], bytes], *, seconds: float | None, most: int
    ) -> Iterator[Reply]:
        for reply in super().ask(names, message, seconds=seconds, most=most):
            assert reply.data is not None
            answer = unpack(reply.data)
            if reply.client in self.hostile and answer.kind == "trained":
                tensors = {name: -FACTOR * value for name, value in answer.tensors.items()}
                changed = pack(dataclasses.replace(answer, tensors=tensors), self.bench.config.wire)
                yield dataclasses.replace(reply, data=changed)
            else:
                yield reply


def cell(partition: str, rule: str, hostile: int, seed: int, scratch: Path) -> dict[str, Any]:
    """One run."""
    began = time.process_time()
    own = {**SETTINGS, **BY_PARTITION[partition], "partition": partition, "robust": rule, "seed": seed}
    config = FederateConfig(**own).resolved()
    folder = scratch / f"{partition}-{rule}-{hostile}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    rows = {
        name: ClientData(train=own.train, test={t: r[: TEST_ROWS[partition]] for t, r in own.test.items()})
        for name, own in client_data(config).items()
    }
    clients = SomeHostile(rows, home=folder / "clients", bench=Workbench(config))
    clients.hostile = frozenset(sorted(clients.names())[-hostile:] if hostile else ())
    rounds = Rounds(config, clients, folder)
    rounds.run()
    scores = rounds.score()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    refused = [name for line in lines for name in json.loads(line)["refused"]]
    shutil.rmtree(folder)
    return {
        "partition": partition, "rule": rule, "hostile": hostile, "seed": seed, "refused": len(refused),
        "scores": {name: own.mean for name, own in scores.items()}, "rows": sum(own.n for own in scores.values()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }  # fmt: skip


def read(out: Path) -> list[dict[str, Any]]:
    """The cells that are done."""
    if not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def fill(out: Path, partitions: Sequence[str], seeds: int, scratch: Path) -> None:
    """Run every cell that is not there yet."""
    done = {(c["partition"], c["rule"], c["hostile"], c["seed"]) for c in read(out)}
    wanted = [
        (partition, rule, hostile, seed)
        for partition in partitions
        for seed in range(seeds)
        for hostile in HOSTILE[partition]
        for rule in RULES
    ]
    for key in wanted:
        if key not in done:
            found = cell(*key, scratch)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(*key, f"{statistics.fmean(found['scores'].values()):.2f}", flush=True)


def table(cells: Sequence[dict[str, Any]], partition: str) -> Table:
    """Scores by rule and number of hostile clients."""
    means = {
        (c["rule"], c["hostile"], c["seed"]): statistics.fmean(c["scores"].values())
        for c in cells
        if c["partition"] == partition
    }
    seeds = sorted({seed for _, _, seed in means})
    shown = Table(
        title=f"rows dealt out by {partition}: {len(seeds)} seeds, mean score of honest clients",
        title_justify="left",
    )
    for heading in ("hostile of 8", "rule", "score", "± over seeds", "minus honest mean", "± paired"):
        shown.add_column(heading, justify="left" if heading == "rule" else "right")
    for hostile in HOSTILE[partition]:
        for rule in RULES:
            scores = [means[rule, hostile, seed] for seed in seeds if (rule, hostile, seed) in means]
            if len(scores) < len(seeds):
                continue
            less = [score - means["none", 0, seed] for score, seed in zip(scores, seeds, strict=True)]
            shown.add_row(
                str(hostile),
                rule,
                f"{statistics.fmean(scores):.2f}",
                _deviation(scores),
                f"{statistics.fmean(less):+.2f}",
                _deviation(less),
            )
    return shown


def _deviation(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"


def main() -> None:
    """Fill what is missing, then print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/studies/hostile.jsonl"))
    parser.add_argument("--scratch", type=Path, default=Path("build/hostile"))
    parser.add_argument("--partitions", nargs="+", default=list(HOSTILE), choices=list(HOSTILE))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.tables:
        fill(options.out, options.partitions, options.seeds, options.scratch)
    cells = read(options.out)
    for partition in dict.fromkeys(c["partition"] for c in cells):
        Console(width=120, highlight=False).print(table(cells, partition))


if __name__ == "__main__":
    main()
