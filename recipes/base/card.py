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

**Training.** `python -m recipes.base.pretrain --out DIR --seed {seed}`: {steps} steps of {batch} x {length} tokens
({tokens:.1f} M tokens, whole documents, none seen twice, the first
{easy_steps} steps on the easy kinds, from step {late_from} on more of what was still weak), Muon for the
matrices of the blocks and AdamW for the rest, learning rate {lr} (flat, then linear to zero), {minutes:.0f} minutes
on 2 CPU cores shared with other work. Answers and prose count fully in the loss, given text {context_weight}.

**Held-out generated text.** {held}

| step | training loss (weighted, smoothed) |
|---|---|
{curve}
"""


def write_card(out: Path, history: dict) -> None:
    """Write OUT/README.md."""
    settings, curve = history["settings"], history["curve"]
    stride = max(1, len(curve) // 20)
    shown = [*curve[stride - 1 :: stride]]
    if curve and shown[-1] != curve[-1]:
        shown.append(curve[-1])
    done = curve[-1][0] if curve else 0
    found = history["held_out"]
    held = (
        f"Perplexity {found['perplexity']:.2f} over all tokens, {found['answer_perplexity']:.3f} over answers and "
        f"prose, where {100 * found['answer_token_accuracy']:.1f} % of the tokens are predicted right (step "
        f"{found['step']})."
    )
    text = CARD.format(
        **settings | {"steps": done},
        size=history["parameters"] / 1e6,
        tokens=done * settings["batch"] * settings["length"] / 1e6,
        minutes=history["seconds"] / 60,
        held=held,
        curve="\n".join(f"| {step} | {loss:.3f} |" for step, loss in shown),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
