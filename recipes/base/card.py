"""The model card of the embedded base, written from the history of its pretraining."""

from __future__ import annotations

from pathlib import Path

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The embedded base model of ManyLoRA

A {size:.2f} M parameter Llama (hidden {hidden}, {layers} layers, {heads} heads, MLP {mlp}, tied embeddings, byte-level
BPE of {vocab} tokens, bf16). It exists so that fine-tuning methods can be compared within minutes on a CPU. It knows
nothing about the world and is of no use as an assistant.

**Data.** Generated text only (`recipes/base/corpus.py`): about nine documents in ten are exercises of more than
twenty kinds (copying, lists, categories, spelling, sums, polarity of adjectives, concessions, transfers,
comparisons, records and dates) in many surface forms; the rest is plain prose. No document holds the Alpaca headers, an
OPTIONS list or a prompt template of the benchmark suite, and no exercise is a task of the suite. The corpus draws on
the same lists of words.

**Training.** `python -m recipes.base.pretrain --out DIR --seed {seed}`: {tokens:.1f} M tokens in rows of {length}
(whole documents, none seen twice), Muon for the matrices of the blocks and AdamW for the rest, a learning rate that is
flat, then falls linearly to zero; {minutes:.0f} minutes on 2 CPU cores shared with other work. Answers and prose count
fully in the loss, given text {context_weight}. The second stage starts from the weights of the first, rounded to bf16,
with new optimizers.

| stage | steps | rows a step | peak learning rate | reads |
|---|---|---|---|---|
{stages}

**Held-out generated text** (after {held_step} steps of the last stage). Perplexity {perplexity:.2f} over all tokens,
{answer_perplexity:.3f} over answers and prose, where {right:.1f} % of the tokens are predicted right.

| stage | step | training loss (weighted, smoothed) |
|---|---|---|
{curve}
"""


def write_card(out: Path, history: dict) -> None:
    """Write OUT/README.md."""
    settings, curve, found = history["settings"], history["curve"], history["held_out"]
    stride = max(1, len(curve) // 20)
    shown = [*curve[stride - 1 :: stride]]
    if curve and shown[-1] != curve[-1]:
        shown.append(curve[-1])
    done = {name: step for name, step, _ in curve}
    rows = sum(done.get(stage["name"], 0) * stage["batch"] for stage in history["stages"])
    text = CARD.format(
        **settings,
        size=history["parameters"] / 1e6,
        tokens=rows * settings["length"] / 1e6,
        minutes=history["seconds"] / 60,
        stages=stage_lines(history),
        held_step=found["step"],
        perplexity=found["perplexity"],
        answer_perplexity=found["answer_perplexity"],
        right=100 * found["answer_token_accuracy"],
        curve="\n".join(f"| {name} | {step} | {loss:.3f} |" for name, step, loss in shown),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def stage_lines(history: dict) -> str:
    """The stages as rows of a table, with the steps that are done."""
    done = {name: step for name, step, _ in history["curve"]}
    return "\n".join(_stage(stage, done.get(stage["name"], 0)) for stage in history["stages"])


def _stage(stage: dict, done: int) -> str:
    reads = ", ".join(f"{phase} from step {first}" for first, phase in stage["phases"])
    return f"| {stage['name']} | {done} | {stage['batch']} | {stage['lr']} | {reads} |"
