"""Pretrain the embedded base model: `python -m recipes.base.pretrain --out DIR --seed 0`.

Resumable: run the same command again. A usable model is written into DIR every few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from recipes.base.card import write_card
from recipes.base.corpus import Phase
from recipes.base.muon import Muon
from recipes.base.tokens import Rows, attention_mask, packed, train_tokenizer

EMBEDDING_STD = 0.06
COPY_SCALE = 0.15
CHUNK = 50  # steps whose rows are drawn together


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass of warm-up, flat and linearly falling learning rate, with optimizers that start anew."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int
    decay_from: int
    phases: tuple[tuple[int, Phase], ...]
    """(first step, what is read from there on)."""

    def phase(self, step: int) -> Phase:
        return [phase for first, phase in self.phases if first <= step][-1]

    def rate(self, step: int) -> float:
        """Linear warm-up, flat, then linear to zero."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.steps - self.decay_from))


STAGES = (
    # Copying, picking and polarity alone, then everything, then more of what the first half left weak.
    Stage(
        name="general",
        steps=2800,
        batch=11,
        lr=6e-3,
        warmup=50,
        decay_from=1280,
        phases=((0, "easy"), (300, "main"), (1400, "late")),
    ),
    # Dense recall: the first stage leaves looking things up in a text at chance.
    Stage(name="recall", steps=1600, batch=12, lr=4e-3, warmup=40, decay_from=800, phases=((0, "recall"),)),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int = 0
    length: int = 192
    vocab: int = 4096
    hidden: int = 192
    layers: int = 5
    heads: int = 6
    mlp: int = 512
    context_weight: float = 0.2
    """Loss weight of what is given (random names, questions); answers and prose count 1."""


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=EMBEDDING_STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    start_as_copier(model)
    return model


@torch.no_grad()
def start_as_copier(model: PreTrainedModel) -> None:
    """Start every attention layer as "repeat what is attended to, attend to what looks alike".

    W_v is orthogonal and W_o its scaled transpose, so with tied embeddings an attended word is at once more likely;
    half of the heads start with W_q = W_k. From a random start the model needs millions of tokens to find copying.
    In the manner of mimetic initialisation (Trockman and Kolter, arXiv 2305.09828). For models laid out as Llama is;
    a head of keys and values that several heads of queries share counts for each of them.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(COPY_SCALE * _for_each_query(attention, attention.v_proj.weight).T)
        torch.nn.init.orthogonal_(attention.k_proj.weight)
        torch.nn.init.orthogonal_(attention.q_proj.weight)
        half = attention.q_proj.weight.shape[0] // 2
        attention.q_proj.weight[:half] = _for_each_query(attention, attention.k_proj.weight)[:half]
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.01)


def _for_each_query(attention: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The rows of a key or value projection, each head of them once for every head of queries that reads it."""
    heads = weight.unflatten(0, (-1, attention.head_dim))
    return heads.repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)


def optimizers(model: PreTrainedModel, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms: fewer steps for the same loss."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    blocks = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in embeddings]
    return [
        Muon(blocks, lr=lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def token_losses(model: PreTrainedModel, rows: Rows, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token given those before it in its document (R, T - 1), and the logits behind it."""
    logits = model(
        input_ids=rows.ids, attention_mask=mask, position_ids=rows.position, use_cache=False
    ).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows.ids[:, 1:], reduction="none")
    return losses, logits


def weighted_loss(model: PreTrainedModel, rows: Rows, mask: torch.Tensor) -> torch.Tensor:
    target = rows.weights[:, 1:]
    return (token_losses(model, rows, mask)[0] * target).sum() / target.sum()


@torch.no_grad()
def held_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int = 96) -> dict[str, float]:
    """Perplexity on held-out documents, over all tokens and over marked text alone, and accuracy on the latter."""
    every = packed(tokenizer, seed="held-out", rows=rows, length=192, context_weight=0.5)
    losses, hits = [], []
    for start in range(0, rows, 16):
        part = every.pick(slice(start, start + 16))
        loss, logits = token_losses(model, part, attention_mask(part))
        losses.append(loss)
        hits.append(logits[:, :-1].argmax(-1) == part.ids[:, 1:])
    loss, right = torch.cat(losses), torch.cat(hits).float()
    text, marked = every.weights[:, 1:] > 0, every.weights[:, 1:] == 1
    return {
        "perplexity": math.exp(loss[text].mean().item()),
        "answer_perplexity": math.exp(loss[marked].mean().item()),
        "answer_token_accuracy": right[marked].mean().item(),
    }


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The asset: bf16 weights and tokenizer. The training copy stays in float32."""
    state = {name: p.detach().to(torch.bfloat16) for name, p in model.state_dict().items()}
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    )
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one pretraining has of its own; the loop is the same for all."""

    stages: tuple[Stage, ...]
    build: Callable[[Settings, PreTrainedTokenizerFast], PreTrainedModel]
    tokenizer: Callable[[Settings], PreTrainedTokenizerFast]
    """Called once; the result is kept beside the resumable state."""
    card: Callable[[Path, dict], None] = write_card
    held_out_rows: int = 96


EMBEDDED_BASE = Recipe(
    stages=STAGES,
    build=build_model,
    tokenizer=lambda settings: train_tokenizer(settings.seed, settings.vocab),
)


class Pretraining:
    """The state of one pretraining: which stage, which step of it, model, optimizers and history."""

    def __init__(self, out: Path, work: Path, settings: Settings, recipe: Recipe = EMBEDDED_BASE):
        self.out, self.work, self.settings, self.recipe = out, work, settings, recipe
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        if (work / "tokenizer.json").exists():
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
        else:
            self.tokenizer = recipe.tokenizer(settings)
            self.tokenizer.save_pretrained(work)
        self.model = recipe.build(settings, self.tokenizer)
        params = sum(p.numel() for p in self.model.parameters())
        self.history: dict = {
            "settings": asdict(settings),
            "stages": [asdict(stage) for stage in recipe.stages],
            "parameters": params,
            "curve": [],
            "seconds": 0.0,
        }
        self.stage, self.step = 0, 0
        self.opts = optimizers(self.model, recipe.stages[0].lr)
        if (work / "state.pt").exists():
            saved = torch.load(work / "state.pt", weights_only=True)
            self.stage, self.step = saved["stage"], saved["step"]
            self.model.load_state_dict(saved["model"])
            self.opts = optimizers(self.model, recipe.stages[self.stage].lr)
            for opt, state in zip(self.opts, saved["opts"], strict=True):
                opt.load_state_dict(state)
            self.history = json.loads(saved["history"])

    def next_stage(self) -> None:
        """Go on from the weights as released: rounded to bfloat16, with new optimizers."""
        self.stage, self.step = self.stage + 1, 0
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.to(torch.bfloat16))
        self.opts = optimizers(self.model, self.recipe.stages[self.stage].lr)

    def save(self) -> None:
        self.history["held_out"] = held_out(self.model, self.tokenizer, self.recipe.held_out_rows) | {
            "step": self.step
        }
        print(f"held out {self.history['held_out']}", flush=True)
        save(self.model, self.tokenizer, self.out)
        self.recipe.card(self.out, self.history)
        state = {
            "model": self.model.state_dict(),
            "opts": [opt.state_dict() for opt in self.opts],
            "stage": self.stage,
            "step": self.step,
            "history": json.dumps(
                self.history
            ),  # in the one file that is replaced whole: a kill leaves both or none
        }
        torch.save(state, self.work / "state.tmp")
        os.replace(self.work / "state.tmp", self.work / "state.pt")

    def rows(self) -> Rows:
        """The rows of the running chunk of steps; a stage draws documents that no other has seen."""
        stage = self.recipe.stages[self.stage]
        first = self.step // CHUNK * CHUNK
        prefix = "" if self.settings.seed == 0 else f"{self.settings.seed}/"
        return packed(
            self.tokenizer,
            seed=f"{prefix}s{self.stage + 1}/{first}"
            if self.stage
            else f"{self.settings.seed}/{first // CHUNK}",
            rows=stage.batch * CHUNK,
            length=self.settings.length,
            context_weight=self.settings.context_weight,
            phase=stage.phase(first),
        )


def train(run: Pretraining, *, compiled: bool, snapshot_minutes: float, minutes: float = math.inf) -> bool:
    """Train all stages that are left, or `minutes` long; whether all of it is done. Steps decide the result alone."""
    print(f"{run.history['parameters'] / 1e6:.2f} M parameters, vocabulary {len(run.tokenizer)}", flush=True)
    step_loss = torch.compile(weighted_loss) if compiled else weighted_loss
    deadline = time.time() + 60 * minutes
    while train_stage(run, step_loss, snapshot_minutes, deadline):
        if run.stage + 1 == len(run.recipe.stages):
            return True
        run.next_stage()
    return False


def train_stage(
    run: Pretraining,
    step_loss: Callable[..., torch.Tensor],
    snapshot_minutes: float,
    deadline: float = math.inf,
) -> bool:
    """The rest of the running stage, or what can be done of it until `deadline`; whether the stage has ended."""
    stage, mean, rows = run.recipe.stages[run.stage], None, None
    clock = last = time.time()
    seconds, start = run.history["seconds"], run.step
    while run.step < stage.steps:
        if rows is None or run.step % CHUNK == 0:
            rows = run.rows()
        for opt in run.opts:
            for group in opt.param_groups:
                group["lr"] = stage.lr * stage.rate(run.step)
        at = run.step % CHUNK * stage.batch
        part = rows.pick(slice(at, at + stage.batch))
        loss = step_loss(run.model, part, attention_mask(part))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for opt in run.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        run.step += 1
        now = time.time()
        ended, late = run.step == stage.steps, now >= deadline
        run.history["seconds"] = seconds + now - clock
        if run.step % 25 == 0 or ended:
            run.history["curve"].append([stage.name, run.step, round(mean, 4)])
            left = (stage.steps - run.step) * (now - clock) / (run.step - start) / 60
            print(f"{stage.name} {run.step}/{stage.steps} loss {mean:.3f}, {left:.1f} min left", flush=True)
        if ended or late or (run.step % CHUNK == 0 and now - last > 60 * snapshot_minutes):
            last = now
            run.save()
        if late and not ended:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--work", type=Path, help="folder for the resumable state (default: OUT-state)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)"
    )
    parser.add_argument("--snapshot-minutes", type=float, default=3.0)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    work = given.work or given.out.with_name(given.out.name + "-state")
    train(
        Pretraining(given.out, work, settings),
        compiled=given.compile,
        snapshot_minutes=given.snapshot_minutes,
    )


if __name__ == "__main__":
    main()
