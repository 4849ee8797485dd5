"""Pretrain a tiny base of one family: `python -m recipes.families.pretrain --family llama --out build/families/llama`.

Resumable: run the same command again, after --minutes or after a kill. Same tokenizer (the embedded base's), text,
steps and optimizers for every family; the loop is the embedded base's own.
"""

from __future__ import annotations

import argparse
import math
import os
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from manylora.assets import embedded_base_path
from recipes.base.card import stage_lines
from recipes.base.pretrain import Pretraining, Recipe, Settings, Stage, train
from recipes.families.build import FAMILIES, build

SETTINGS = Settings(hidden=128, layers=4, heads=4, mlp=352)
STAGES = (
    # The embedded base's two stages, shortened to 20 minutes on one core.
    Stage(
        name="general",
        steps=1700,
        batch=11,
        lr=6e-3,
        warmup=50,
        decay_from=800,
        phases=((0, "easy"), (250, "main"), (850, "late")),
    ),
    Stage(name="recall", steps=700, batch=11, lr=4e-3, warmup=40, decay_from=350, phases=((0, "recall"),)),
)

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A tiny {family} base of ManyLoRA

{size:.2f} M parameters (hidden {hidden}, {layers} layers, {heads} heads), bf16, the tokenizer of the embedded base.
Four families are pretrained alike (`recipes/families`), so that fine-tuning methods can be compared between
architectures within minutes on a CPU. It knows nothing about the world and is of no use as an assistant.

**Data.** The generated text of `recipes/base/corpus.py`, which holds no task and no prompt template of the suite.

**Training.** `python -m recipes.families.pretrain --family {family} --out DIR --seed {seed}`: {minutes:.0f} minutes on
one core shared with other work, in rows of {length} tokens.

| stage | steps | rows a step | peak learning rate | reads |
|---|---|---|---|---|
{stages}

**Held-out generated text.** Perplexity {perplexity:.2f} over all tokens, {answer_perplexity:.3f} over answers and
prose, where {right:.1f} % of the tokens are predicted right.
"""


def write_card(out: Path, history: dict, *, family: str) -> None:
    """Write OUT/README.md."""
    found = history["held_out"]
    text = CARD.format(
        **history["settings"],
        family=family,
        size=history["parameters"] / 1e6,
        minutes=history["seconds"] / 60,
        stages=stage_lines(history),
        perplexity=found["perplexity"],
        answer_perplexity=found["answer_perplexity"],
        right=100 * found["answer_token_accuracy"],
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def recipe(family: str, stages: tuple[Stage, ...] = STAGES) -> Recipe:
    """The pretraining of a family."""
    return Recipe(
        stages=stages,
        build=partial(build, family),
        tokenizer=lambda _: PreTrainedTokenizerFast.from_pretrained(embedded_base_path()),
        card=partial(write_card, family=family),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", required=True, choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, help="folder for the resumable state (default: OUT-state)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after so long, and go on when run again; the steps alone decide the result (default: do not stop)",
    )
    parser.add_argument("--snapshot-minutes", type=float, default=3.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = Settings(**{**vars(SETTINGS), "seed": given.seed})
    run = Pretraining(
        given.out,
        given.work or given.out.with_name(given.out.name + "-state"),
        settings,
        recipe(given.family),
    )
    done = train(run, compiled=False, snapshot_minutes=given.snapshot_minutes, minutes=given.minutes)
    print("finished" if done else "stopped; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
