"""What federated training costs and what it gives.

    python -m benchmarks.federated memory            1,000 simulated clients against 8: peak memory
    python -m benchmarks.federated strategies        every strategy, equal and unequal ranks, over seeds
    python -m benchmarks.federated wire              quality against bytes: fp32, bf16, int8
    python -m benchmarks.federated a-state           A kept or reset, begun alike or apart
    python -m benchmarks.federated personal          scored after the last averaging, or before it

Every cell is the real command; finished cells are not run again, so a table can be filled in several goes.
Scores: mean over the clients' personal models, each on its own task's test rows; mean ± sample deviation over seeds.
"minus first" is paired by seed; "loss at most" is the one-sided 95 % bound of the mean loss against the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from scipy import stats

UNEQUAL = ["--ranks", "16,16,8,8,4,4,2,2"]
"""The published ranks, a quarter of each: the embedded base is 192 wide where theirs is 4096."""

STUDIES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "strategies": {
        "local": ["--strategy", "local"],
        "centralized": ["--strategy", "centralized"],
        **{
            name: ["--strategy", name] for name in ("fed-alora", "fedsa", "fedit", "ffa", "flora", "flexlora")
        },
        "local, unequal": ["--strategy", "local", *UNEQUAL],
        **{
            f"{name}, unequal": ["--strategy", name, *UNEQUAL]
            for name in ("fed-alora", "zero-padding", "flora", "flexlora")
        },
    },
    "wire": {
        f"{wire}{label}": ["--wire", wire, *more]
        for label, more in (("", []), (", unequal", UNEQUAL))
        for wire in ("fp32", "bf16", "int8")
    },
    "personal": {
        f"{strategy}, {personal}": ["--strategy", strategy, "--personal", personal]
        for strategy in ("fed-alora", "fedsa", "fedit")
        for personal in ("received", "trained")
    },
    "a-state": {
        f"{state}, {init}": ["--a-state", state, "--a-init", init]
        for state in ("persist", "reset")
        for init in ("common", "per_client")
    },
}


def peak_memory(command: Sequence[str], log: Path) -> tuple[float, float, bool]:
    """Peak resident MiB of the command, sampled, seconds, and whether it ended well."""
    began, peak = time.monotonic(), 0
    with log.open("w", encoding="utf-8") as file:
        process = psutil.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.05)
    return peak / 2**20, time.monotonic() - began, process.wait() == 0


def memory(out: Path, model: str) -> bool:
    """Whether 1,000 clients of a few rows each, a tenth of them a round, fit in 1.5 times the memory of 8."""
    peaks = {}
    common = [
        "--model",
        model,
        "--partition",
        "iid",
        "--rounds",
        "5",
        "--local-steps",
        "1",
        "--reference",
        "none",
    ]
    for clients, participation in ((8, "1.0"), (1000, "0.1")):
        run = out / f"memory-{clients}-{int(time.time())}"
        words = ["--clients", str(clients), "--participation", participation, "--scored-clients", "0"]
        command = [sys.executable, "-m", "manylora.cli", "federate", *common, *words, "--out", str(run)]
        peaks[clients], seconds, well = peak_memory(command, out / f"memory-{clients}.log")
        print(
            f"{clients:5} clients: peak {peaks[clients]:,.0f} MiB, {seconds:.0f} s{'' if well else ', FAILED'}"
        )
        if not well:
            return False
    ratio = peaks[1000] / peaks[8]
    print(f"{'holds' if ratio <= 1.5 else 'FAILS'}: ratio {ratio:.2f}, wanted at most 1.5 (n = 1 run each)")
    return ratio <= 1.5


def cell(out: Path, words: Sequence[str], seed: int, limit: int | None) -> dict[str, float]:
    """Mean score of one run, and KiB per client and round both ways."""
    if not (out / "scores.json").is_file():
        rest = ["--limit", str(limit)] if limit else []
        fresh = [*words, *rest, "--seed", str(seed), "--reference", "none", "--out", str(out)]
        if "--wire" not in words:  # strategies are compared without rounding
            fresh += ["--wire", "fp32"]
        command = ["--resume", str(out)] if (out / "config.yaml").is_file() else fresh
        subprocess.run([sys.executable, "-m", "manylora.cli", "federate", *command], check=True)
    clients = json.loads((out / "scores.json").read_text(encoding="utf-8"))["clients"]
    tasks = {row["task"]: row["score"] for client in clients.values() for row in client["tasks"]}
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    sizes = [size for row in rounds for way in ("up", "down") for size in row[way].values()]
    kib = 2 * statistics.fmean(sizes) / 1024 if sizes else 0.0
    return {
        "score": statistics.fmean(tasks.values()),
        "kib": kib,
        **{f"task/{k}": v for k, v in tasks.items()},
    }


def study(name: str, out: Path, seeds: int, limit: int | None) -> bool:
    """Fill and print one table."""
    table = Table(
        title=f"{name}: {seeds} seeds, {limit or 'all'} rows a task and split", title_justify="left"
    )
    for heading in (
        "cell",
        "score",
        "± over seeds",
        "minus first",
        "± paired",
        "loss at most",
        "KiB a round",
    ):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    first: list[float] = []
    for label, words in STUDIES[name].items():
        slug = label.replace(", ", "-").replace(" ", "-")
        cells = [cell(out / f"{name}-{slug}-s{seed}", words, seed, limit) for seed in range(seeds)]
        scores = [values["score"] for values in cells]
        first = first or scores
        difference = [score - other for score, other in zip(scores, first, strict=True)]
        table.add_row(
            label,
            f"{statistics.fmean(scores):.2f}",
            _deviation(scores),
            f"{statistics.fmean(difference):+.2f}",
            _deviation(difference),
            _bound([-value for value in difference]),
            f"{statistics.fmean(values['kib'] for values in cells):,.1f}",
        )
    Console(width=120, highlight=False).print(table)
    return True


def _deviation(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"


def _bound(losses: Sequence[float]) -> str:
    """One-sided 95 % bound of the mean loss over seeds (t distribution); below 1 is called no loss."""
    n = len(losses)
    if n < 2 or not any(losses):
        return "–"
    return f"{statistics.fmean(losses) + stats.t.ppf(0.95, n - 1) * statistics.stdev(losses) / n**0.5:.2f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["memory", *STUDIES])
    parser.add_argument("--out", type=Path, default=Path("build/federated"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=None, help="rows per task and split")
    parser.add_argument("--model", default="embedded", help="base of the memory benchmark")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done = (
        memory(options.out, options.model)
        if options.what == "memory"
        else study(options.what, options.out, options.seeds, options.limit)
    )
    raise SystemExit(0 if done else 1)
