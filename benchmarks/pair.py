"""Does the embedded pair leave methods room to differ?

    python -m benchmarks.pair --out build/pair

Scores, on the suite's test rows (ROUGE-1, n = 200 a task): the bare base (zero-shot), one LoRA (r 8) per task, one
LoRA for all tasks, ALoRA for all tasks, beside the majority and keyword baselines. Every cell is the real command in
its default recipe; finished cells are not run again. Ends with the requirements and whether they hold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manylora.cli import main as manylora
from manylora.data.suite import SUITE, SUITE_TASKS


def cell(out: Path, *command: str) -> dict[str, float]:
    """Run one command unless its scores are there; return task → score."""
    if not (out / "scores.json").is_file():
        resume = out / "config.yaml"
        words = ["train", "--resume", str(out)] if resume.is_file() else [*command, "--out", str(out)]
        if code := manylora(words):
            raise SystemExit(code)
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    return {row["task"]: row["score"] for row in scores["tasks"]}


def baselines(out: Path) -> dict[str, dict[str, float]]:
    return json.loads((out / "scores.json").read_text(encoding="utf-8"))["baselines"]


def run(out: Path, seed: int) -> bool:
    """Fill the table; whether every requirement holds."""
    columns = {"zero-shot": cell(out / "zero-shot", "evaluate")}
    known = baselines(out / "zero-shot")
    single: dict[str, float] = {}
    for task in SUITE_TASKS:
        name = f"lora-{task}-s{seed}"
        single |= cell(out / name, "train", "--method", "lora", "--tasks", task, "--seed", str(seed))
    columns["LoRA per task"] = single
    for method in ("lora", "alora"):
        name = f"{method}-all-s{seed}"
        columns[f"{method} for all"] = cell(out / name, "train", "--method", method, "--seed", str(seed))
    show({**columns, **known}, seed)
    checks = requirements(columns, known)
    for text, holds in checks.items():
        print(f"{'holds' if holds else 'FAILS'}  {text}")
    return all(checks.values())


def mean(column: dict[str, float]) -> float:
    return sum(column.values()) / len(column)


def show(columns: dict[str, dict[str, float]], seed: int) -> None:
    table = Table(title=f"embedded pair, ROUGE-1, n = 200 a task, seed {seed}", title_justify="left")
    table.add_column("task")
    for name in columns:
        table.add_column(name, justify="right")
    for task in SUITE_TASKS:
        table.add_row(task, *(f"{column[task]:.2f}" for column in columns.values()))
    table.add_section()
    table.add_row("mean", *(f"{mean(column):.2f}" for column in columns.values()))
    Console(width=140, highlight=False).print(table)


def requirements(columns: dict[str, dict[str, float]], known: dict[str, dict[str, float]]) -> dict[str, bool]:
    single = columns["LoRA per task"]
    trained = [columns[name] for name in columns if name != "zero-shot"]
    choices = [task for task in SUITE_TASKS if SUITE[task].kind == "classification"]
    margin = min(single[task] - max(known["majority"][task], known["keyword"][task]) for task in choices)
    return {
        f"zero-shot mean {mean(columns['zero-shot']):.1f} is at most 25": mean(columns["zero-shot"]) <= 25,
        f"LoRA per task, mean {mean(single):.1f}, is between 60 and 92": 60 <= mean(single) <= 92,
        "no task is over 98 by every method": not any(
            min(c[task] for c in trained) > 98 for task in SUITE_TASKS
        ),
        "no task is left at its majority baseline": all(
            single[t] > known["majority"][t] for t in SUITE_TASKS
        ),
        f"classification: at least 10 above both baselines (smallest margin {margin:.1f})": margin >= 10,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/pair"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    raise SystemExit(0 if run(options.out, options.seed) else 1)
