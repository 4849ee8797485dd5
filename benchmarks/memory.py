"""Does the plan of `manylora train --dry-run` tell how much memory a training then takes (on a CPU)?

    python -m benchmarks.memory                # three sizes, beside the embedded base's tokenizer
    python -m benchmarks.memory --quick        # the smallest

Every size is a Llama with random weights, written to a folder, and trained for some steps with the default settings
(ALoRA, N = 3, r 8, dropout 0.05, all linear layers, validation at the end) in a process of its own, on rows that fill
the longest length. That process first makes the plan, as the command does, then trains; its highest resident size
is compared with the plan's estimate. Prints a table, writes JSON, fails where an estimate is more than 15 % off.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOLERANCE = 0.15
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training."""

    name: str
    hidden: int
    layers: int
    rows: int
    """Rows of one step."""
    length: int = 256
    dropout: float = 0.05
    checkpointing: bool = False
    wide: float = 8 / 3
    """Width of the MLP, in hidden sizes."""
    kv_heads: float = 1.0
    """Key and value heads, as a share of the heads."""


CASES = (
    Case(name="192 x 5 layers, 16 rows", hidden=192, layers=5, rows=16),
    Case(name="384 x 6 layers, 8 rows", hidden=384, layers=6, rows=8),
    Case(name="512 x 8 layers, 8 rows", hidden=512, layers=8, rows=8),
)
EXTRA = (
    Case(name="384 x 6 layers, 8 rows, dropout 0", hidden=384, layers=6, rows=8, dropout=0.0),
    Case(name="384 x 6 layers, 8 rows, checkpointing", hidden=384, layers=6, rows=8, checkpointing=True),
    Case(name="512 x 8 layers, 8 rows, checkpointing", hidden=512, layers=8, rows=8, checkpointing=True),
)
HELD_OUT = (
    # Shapes unlike those that `_HOLES` in manylora.training.memory was fitted on.
    Case(
        name="256 x 12 layers, 6 rows of 400", hidden=256, layers=12, rows=6, length=400, wide=4, kv_heads=0.5
    ),
    Case(
        name="640 x 4 layers, 12 rows of 160, checkpointing",
        hidden=640,
        layers=4,
        rows=12,
        length=160,
        wide=3.5,
        kv_heads=0.2,
        checkpointing=True,
    ),
    Case(
        name="320 x 14 layers, 5 rows of 320, checkpointing",
        hidden=320,
        layers=14,
        rows=5,
        length=320,
        wide=2,
        checkpointing=True,
    ),
)


def write_base(case: Case, folder: Path) -> None:
    """A random Llama of the case's size, with the embedded base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from manylora.assets import embedded_base_path

    shutil.copytree(
        embedded_base_path(), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=round(case.hidden * case.wide),
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=round(case.hidden // 64 * case.kv_heads),
        vocab_size=4096,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, rows: int) -> None:
    """Rows whose prompts are longer than any length here, so that every row is cut to exactly that length."""
    draw = random.Random(0)
    words = ["red", "green", "blue", "cat", "dog", "bird", "runs", "sings", "north", "south"]
    lines = [
        {"task": "echo", "instruction": " ".join(draw.choices(words, k=600)), "output": draw.choice(words)}
        for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Plan, then train; for a process that does nothing else."""
    from benchmarks.step import peak_bytes
    from manylora.jobs.progress import Progress
    from manylora.jobs.session import Session
    from manylora.training import TrainConfig, finetune, prepare

    config = TrainConfig(
        model=str(folder / "base"),
        data=str(folder / "rows.jsonl"),
        template="alpaca",
        batch_size=case.rows,
        max_length=case.length,
        lora_dropout=case.dropout,
        gradient_checkpointing=case.checkpointing,
        epochs=1.0,
        device="cpu",
    )
    prepared = prepare(config)
    memory = prepared.plan.memory
    planned_at = peak_bytes()
    settings = prepared.config.to_dict()
    with Session.begin(folder / "run", config=settings, progress=Progress()) as session:
        finetune(prepared, session.folder)
    return {
        "estimate": memory.total,
        "measured": peak_bytes(),
        "parts": asdict(memory),
        "after_planning": planned_at,
        "steps": prepared.plan.steps,
    }


def measured_apart(case: Case, steps: int) -> dict[str, Any]:
    """`measure` in a fresh process, on a base and rows written by another one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows=case.rows * steps * 10 // 9)  # a tenth becomes validation
        for action in ("write", "measure"):
            words = [
                sys.executable,
                "-m",
                "benchmarks.memory",
                "--child",
                action,
                name,
                json.dumps(asdict(case)),
            ]
            done = subprocess.run(
                words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def show(found: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    """Print estimate and measurement."""
    table = Table(title="peak memory of training on a CPU, MiB", title_justify="left")
    table.add_column("training")
    for name in ("planned", "measured", "planned / measured", "base", "adapter", "step", "slack", "process"):
        table.add_column(name, justify="right")
    for case, row in found:
        parts = row["parts"]
        step = max(parts["forward"] + parts["backward"], parts["validation"])
        table.add_row(
            case.name,
            *(f"{row[name] / _MIB:,.0f}" for name in ("estimate", "measured")),
            f"{row['estimate'] / row['measured']:.3f}",
            *(
                f"{value / _MIB:,.0f}"
                for value in (
                    parts["base"],
                    parts["adapter"],
                    step,
                    parts["slack"],
                    parts["process"],
                )
            ),
        )
    Console(width=140, highlight=False).print(table)


def main(words: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 where an estimate is off."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the smallest size alone, two steps")
    parser.add_argument("--extra", action="store_true", help="also without dropout, and with checkpointing")
    parser.add_argument("--held-out", action="store_true", help="only sizes on which nothing was fitted")
    parser.add_argument("--out", type=Path, default=Path("build/memory.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.child:
        action, folder, text = options.child
        case = Case(**json.loads(text))
        if action == "write":
            write_base(case, Path(folder) / "base")
        else:
            print(json.dumps(measure(case, Path(folder))))
        return 0
    cases = CASES[:1] if options.quick else (*CASES, *(EXTRA if options.extra else ()))
    if options.held_out:
        cases = HELD_OUT
    found = []
    for case in cases:
        found.append((case, measured_apart(case, steps=2 if options.quick else 4)))
        row = found[-1][1]
        print(f"{case.name}: {row['estimate'] / row['measured']:.3f}", file=sys.stderr, flush=True)
    show(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = [{**asdict(case), **row} for case, row in found]
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    wrong = [case.name for case, row in found if abs(row["estimate"] / row["measured"] - 1) > TOLERANCE]
    for name in wrong:
        print(f"MISSED  {name}: more than {TOLERANCE:.0%} off")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
