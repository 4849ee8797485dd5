"""The price of one training step, side by side: frozen floor, PEFT's LoRA, the as-released loop, ours.

    python -m benchmarks.step                      # Llama 512 x 8 layers, 2,048 tokens, float32 (CPU)
    python -m benchmarks.step --preset cuda        # Llama-3-8B's layers, 8,192 tokens, bfloat16 (CUDA)
    python -m benchmarks.step --quick              # tiny shapes: does it run at all

Time: all variants are alive together and take turns, in an order drawn anew for every repetition, so that a busy
machine slows all of them. On a CPU each has a process of its own, because what one leaves behind in the allocator
changes the speed of the next; on CUDA one process has them all, with one copy of the frozen weights. With
OMP_NUM_THREADS=1 it is the thread's processor time, which other processes do not stretch, else wall-clock time. Each
repetition gives one ratio to PEFT's LoRA with the same dropout.

Memory: in processes of their own. Peak growth is over what the process held before its first step, on a
CPU with the allocator as it comes, which gives back less than was freed; kept activations are the distinct storages
that autograd saves, parameters apart. Prints the table and the targets; writes JSON.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.variants import PRESETS, Size, Step, Variant, all_variants, make_base, resized

_MIB = 2**20
Row = dict[str, Any]


def peak_bytes() -> int:
    """Highest resident size of this process since the last `forget_peak` (since its start where not Linux)."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Start the record of the peak anew at the present size (Linux only)."""
    record = Path("/proc/self/clear_refs")
    if record.exists():
        record.write_text("5", encoding="ascii")


def memory_of(step: Step, device: str, steps: int) -> Row:
    """Kept activations and peak growth; for a process that has done nothing else."""
    kept = step.kept_bytes()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before = peak_bytes()
    for _ in range(steps):
        step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    return {"kept": kept, "growth": peak - before}


def clock_for(device: str) -> Callable[[], float]:
    """Processor time where one thread does all the work, else wall-clock time."""
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds_of(step: Step, device: str) -> float:
    """Duration of one step."""
    clock = clock_for(device)
    begin = clock()
    step()
    return clock() - begin


def serve(channel: Connection, variant: Variant, size: Size, device: str, with_memory: bool) -> None:
    """The work of a `Worker`'s process: the memory first, then one timed step for every True."""
    torch.manual_seed(0)
    try:
        step = Step(variant, make_base(size, device), size, device)
        channel.send(memory_of(step, device, steps=2) if with_memory else {})
    except torch.OutOfMemoryError:
        channel.send({})
        return
    while channel.recv():
        channel.send(seconds_of(step, device))


class Worker:
    """One variant in a process of its own, forked from one that has imported everything and done nothing."""

    def __init__(self, variant: Variant, size: Size, device: str, *, with_memory: bool) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(["benchmarks.variants"])
        self.channel, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, variant, size, device, with_memory))
        self.process.start()
        there.close()
        self.memory: Row = self._answer()

    def step(self) -> float:
        """Seconds of one step."""
        self.channel.send(True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.channel.send(False)
        self.process.join()

    def _answer(self) -> Any:
        try:
            return self.channel.recv()
        except EOFError as error:
            raise RuntimeError("a variant's process has ended early; its error stands above") from error


def timed(runners: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition's step per variant; a variant that runs out of memory gets none."""
    seconds: dict[str, list[float]] = {key: [] for key in runners}
    order = random.Random(0)
    for repeat in range(-1, repeats):  # the first round warms up
        for key in order.sample(list(runners), len(runners)):
            try:
                taken = runners[key]()
            except torch.OutOfMemoryError:
                del runners[key]
                torch.cuda.empty_cache()
                continue
            if repeat >= 0:
                seconds[key].append(taken)
        print(f"repetition {repeat + 1} of {repeats} done", file=sys.stderr, flush=True)
    return {key: values if len(values) == repeats else [] for key, values in seconds.items()}


def measured(
    variants: Sequence[Variant], size: Size, device: str, *, repeats: int, with_memory: bool
) -> tuple[dict[str, list[float]], dict[str, Row]]:
    """Seconds and memory by variant; no repetitions: memory alone."""
    memory: dict[str, Row] = {}
    workers: dict[str, Worker] = {}
    try:
        for variant in variants:
            if device == "cpu" or with_memory:
                worker = Worker(variant, size, device, with_memory=with_memory)
                workers[variant.key], memory[variant.key] = worker, worker.memory
                if device == "cuda" or not repeats:
                    worker.close()
        if not repeats:
            return {variant.key: [] for variant in variants}, memory
        if device == "cpu":
            return timed({key: worker.step for key, worker in workers.items()}, repeats), memory
        torch.manual_seed(0)
        base = make_base(size, device)
        steps = {variant.key: Step(variant, base, size, device) for variant in variants}
        runners = {key: functools.partial(seconds_of, step, device) for key, step in steps.items()}
        return timed(runners, repeats), memory
    finally:
        for worker in workers.values():
            worker.close()


def quartiles(values: Sequence[float]) -> list[float] | None:
    """First quartile, median, third quartile; None without values."""
    if not values:
        return None
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratio(over: Sequence[float], under: Sequence[float]) -> list[float] | None:
    """Quartiles of the ratio within each repetition."""
    return quartiles([a / b for a, b in zip(over, under, strict=False)])


def table_rows(
    variants: Sequence[Variant], seconds: dict[str, list[float]], memory: dict[str, Row]
) -> list[Row]:
    """One record per variant."""
    return [
        {
            **asdict(variant),
            "key": variant.key,
            "seconds": seconds[variant.key],
            "ratio": ratio(seconds[variant.key], seconds[variant.lora.key]),
            "ratio_floor": ratio(seconds[variant.key], seconds["floor"]),
            "kept": memory.get(variant.key, {}).get("kept"),
            "growth": memory.get(variant.key, {}).get("growth"),
        }
        for variant in variants
    ]


def targets(rows: Sequence[Row], seconds: dict[str, list[float]], device: str) -> list[Row]:
    """What the project promises, as ratios within this run, and whether it holds."""
    found = {row["key"]: row for row in rows}
    cuda = device == "cuda"
    checks: list[tuple[str, float | None, float, bool]] = []  # text, value, bound, whether above is good

    def against_lora(text: str, key: str, bound: float, quartile: int = 1) -> None:
        row = found.get(key)
        if row is not None:
            value = row["ratio"][quartile] if row["ratio"] else None
            checks.append((text, value, bound, False))

    against_lora("ALoRA N=3, dropout 0: median x PEFT LoRA", "ours-B-3-0", 0.90 if cuda else 1.00)
    if not cuda:
        against_lora("ALoRA N=3, dropout 0: upper quartile", "ours-B-3-0", 1.05, 2)
    against_lora("ALoRA N=8, dropout 0: median x PEFT LoRA", "ours-B-8-0", 0.95 if cuda else 1.04)
    against_lora("ALoRA N=3, dropout 0.05: median x PEFT LoRA", "ours-B-3-0.05", 0.75 if cuda else 0.85)
    if cuda and "ours-B-3-0" in found:
        floor = found["ours-B-3-0"]["ratio_floor"]
        checks.append(("ALoRA N=3, dropout 0: median x frozen floor", floor and floor[1], 1.12, False))
    for n, bound in ((3, 2.0), (8, 4.0)):
        ours, loop = seconds.get(f"ours-B-{n}-0.05"), seconds.get(f"released-{n}-0.05")
        if ours is not None and loop is not None:
            times = ratio(loop, ours)
            text = f"as-released loop, N={n}, dropout 0.05: times slower than ours"
            checks.append((text, times and times[1], bound, True))
    for dropout in ("0", "0.05"):
        ours, lora = found.get(f"ours-B-3-{dropout}"), found.get(f"lora-{dropout}")
        if ours and lora:
            measured = ours["growth"] is not None and lora["growth"]
            value = ours["growth"] / lora["growth"] if measured else None
            text = f"ALoRA N=3, dropout {dropout}: peak memory growth x PEFT LoRA"
            checks.append((text, value, 0.85 if cuda else 0.80, False))
    return [
        {
            "target": text,
            "value": value,
            "bound": bound,
            "holds": None if value is None else (value >= bound if above else value <= bound),
        }
        for text, value, bound, above in checks
    ]


def show(rows: Sequence[Row], checks: Sequence[Row], size: Size, device: str, repeats: int) -> None:
    """Print the table and the targets."""
    title = (
        f"Llama {size.hidden} x {size.layers} layers, {size.tokens:,} tokens, r {size.rank} on all linear layers, "
        f"{str(size.dtype).removeprefix('torch.')}, {device_name(device)}; {repeats} interleaved repetitions"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for name in ("seconds", "x LoRA, same dropout", "quartiles", "x floor", "kept MiB", "peak growth MiB"):
        table.add_column(name, justify="right")
    for row in rows:
        times, relative = quartiles(row["seconds"]), row["ratio"]
        table.add_row(
            row["key"],
            f"{times[1]:.3f}" if times else "out of memory",
            f"{relative[1]:.3f}" if relative else "-",
            f"{relative[0]:.3f} to {relative[2]:.3f}" if relative else "-",
            f"{row['ratio_floor'][1]:.3f}" if row["ratio_floor"] else "-",
            *(f"{row[name] / _MIB:,.0f}" if row[name] is not None else "-" for name in ("kept", "growth")),
        )
    Console(width=140, highlight=False).print(table)
    for check in checks:
        word = {True: "holds ", False: "MISSED", None: "not measured"}[check["holds"]]
        value = "-" if check["value"] is None else f"{check['value']:.3f}"
        print(f"{word}  {check['target']}: {value} (target {check['bound']:g})")


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} threads" if threads > 1 else "CPU, 1 thread, processor time"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=("cpu", "cuda"), default="cpu", help="shapes and device")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repetitions")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--share", nargs="+", choices=("A", "B", "none"), default=["B", "A", "none"])
    parser.add_argument(
        "--kind", nargs="+", choices=("released", "ours"), default=["released", "ours"], help="beside the two"
    )
    parser.add_argument("--repeats", type=int, default=None, help="repetitions (9; quick: 2)")
    parser.add_argument("--layers", type=int, default=None, help="other than the preset's")
    parser.add_argument("--rows", type=int, default=None, help="other than the preset's")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--no-time", action="store_true", help="memory only")
    parser.add_argument("--out", type=Path, default=Path("build/step.json"))
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, write."""
    options = parse(words)
    device = options.preset
    if device == "cuda" and not torch.cuda.is_available():
        print("--preset cuda: this torch sees no CUDA device; use --preset cpu.", file=sys.stderr)
        return 2
    preset = PRESETS["quick"] if options.quick else PRESETS[options.preset]
    size = resized(preset, layers=options.layers, rows=options.rows)
    repeats = options.repeats or (2 if options.quick else 9)
    variants = all_variants(tuple(options.experts), tuple(options.dropout), tuple(options.share))
    variants = [v for v in variants if v.kind in ("floor", "lora", *options.kind)]
    seconds, memory = measured(
        variants,
        size,
        device,
        repeats=0 if options.no_time else repeats,
        with_memory=not options.no_memory,
    )
    rows = table_rows(variants, seconds, memory)
    checks = targets(rows, seconds, device)
    show(rows, checks, size, device, repeats)
    record = {
        "size": {**asdict(size), "dtype": str(size.dtype)},
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "repeats": repeats,
        "seed": 0,
        "rows": rows,
        "targets": checks,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
