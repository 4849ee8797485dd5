"""Do all ways of computing the adapter train to the same scores on the embedded suite?

    python -m benchmarks.paths --limit 100 --seeds 0 1 --out build/paths

Trains the embedded run (`manylora train`, its default recipe, at most `--limit` rows per task and split) by the fused
computation, by plain autograd ("stacked") and by one pass per expert ("reference"), with the same seed, and compares
losses over the steps, answers and scores with the reference's. At dropout 0 all three are one function, and differ in
rounding alone; with dropout, fused and reference draw the same mask, stacked draws torch's, so its column shows what
another mask does. Finished cells are not run again; a broken one goes on. Fails where the fused scores differ from the
reference's by more than two paired standard errors over the test rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import typing
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manylora.adapters.ops import Computation, computed_by
from manylora.cli import main as manylora

PATHS: tuple[Computation, ...] = typing.get_args(Computation)
REFERENCE: Computation = "reference"
EARLY = 100
"""Steps over which losses are compared while rounding has hardly grown yet."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one training gave."""

    losses: dict[int, float]
    """Training loss by step."""
    answers: list[str]
    scores: list[float]
    """ROUGE-1 × 100 of every test row, in order."""
    tasks: list[str]

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        by_task: dict[str, list[float]] = {}
        for task, score in zip(self.tasks, self.scores, strict=True):
            by_task.setdefault(task, []).append(score)
        return statistics.mean(statistics.mean(scores) for scores in by_task.values())


def cell(out: Path, path: Computation, words: list[str]) -> Cell:
    """Train unless the scores are there."""
    if not (out / "scores.json").is_file():
        resumed = (out / "config.yaml").is_file()
        command = ["train", "--resume", str(out)] if resumed else ["train", *words, "--out", str(out)]
        with computed_by(path):
            if code := manylora(command):
                raise SystemExit(code)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return Cell(
        losses={row["step"]: row["loss"] for row in metrics if "loss" in row},
        answers=[row["prediction"] for row in rows],
        scores=[row["rouge1_all"] for row in rows],
        tasks=[row["task"] for row in rows],
    )


def difference(one: Cell, other: Cell) -> tuple[float, float]:
    """Mean difference of the scores over the test rows, and its paired standard error."""
    gaps = [a - b for a, b in zip(one.scores, other.scores, strict=True)]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def loss_gap(one: Cell, other: Cell, steps: float) -> float:
    """Largest difference of the training loss up to a step."""
    return max(abs(loss - other.losses[step]) for step, loss in one.losses.items() if step <= steps)


def compare(cells: dict[tuple[float, int, Computation], Cell]) -> list[dict[str, typing.Any]]:
    """One record per cell, each against the reference of its seed and dropout."""
    rows = []
    for (dropout, seed, path), found in cells.items():
        reference = cells[dropout, seed, REFERENCE]
        gap, error = difference(found, reference)
        same = sum(a == b for a, b in zip(found.answers, reference.answers, strict=True))
        rows.append(
            {
                "dropout": dropout,
                "seed": seed,
                "path": path,
                "score": found.mean,
                "difference": gap,
                "standard_error": error,
                "n": len(found.scores),
                "same_answers": same / len(found.answers),
                "loss_gap_early": loss_gap(found, reference, EARLY),
                "loss_gap": loss_gap(found, reference, math.inf),
                "last_loss": found.losses[max(found.losses)],
            }
        )
    return rows


def show(rows: list[dict[str, typing.Any]]) -> None:
    """Print the table."""
    table = Table(title="embedded suite by way of computing, against the reference", title_justify="left")
    for name in ("dropout", "seed", "path", "score", "difference", "s.e.", "n", "same answers"):
        table.add_column(name, justify="right")
    table.add_column(f"loss gap, {EARLY} steps", justify="right")
    table.add_column("loss gap, all", justify="right")
    for row in rows:
        table.add_row(
            f"{row['dropout']:g}",
            str(row["seed"]),
            row["path"],
            f"{row['score']:.2f}",
            f"{row['difference']:+.2f}",
            f"{row['standard_error']:.2f}",
            str(row["n"]),
            f"{row['same_answers']:.1%}",
            f"{row['loss_gap_early']:.1e}",
            f"{row['loss_gap']:.1e}",
        )
    Console(width=140, highlight=False).print(table)


def main(words: list[str] | None = None) -> int:
    """Run, print, write; 1 where the fused scores are off."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=None, help="other than the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--out", type=Path, default=Path("build/paths"))
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    cells = {}
    for dropout in options.dropout:
        for seed in options.seeds:
            for path in PATHS:
                fixed = ["--limit", options.limit, "--seed", seed, "--lora-dropout", dropout]
                fixed += ["--epochs", options.epochs] if options.epochs else []
                name = f"{path}-{dropout:g}-s{seed}"
                cells[dropout, seed, path] = cell(options.out / name, path, [str(word) for word in fixed])
    rows = compare(cells)
    show(rows)
    (options.out / "paths.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    off = [
        row for row in rows if row["path"] == "fused" and abs(row["difference"]) > 2 * row["standard_error"]
    ]
    for row in off:
        print(
            f"MISSED  dropout {row['dropout']:g}, seed {row['seed']}: fused differs by {row['difference']:+.2f}"
        )
    return 1 if off else 0


if __name__ == "__main__":
    raise SystemExit(main())
