"""Pretrain the embedded base model: `python -m recipes.base.pretrain --out DIR --seed 0`.

Resumable: run the same command again. A usable model is written into DIR every few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.base.card import write_card
from recipes.base.muon import Muon
from recipes.base.tokens import Rows, attention_mask, packed, train_tokenizer

EMBEDDING_STD = 0.06
COPY_SCALE = 0.15
CHUNK = 50  # steps whose rows are drawn together


@dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int = 0
    steps: int = 2800
    easy_steps: int = 300
    """First steps on copying, picking and polarity alone."""
    decay_from: int = 1280
    late_from: int = 1400
    """Steps from here on: more of what the first half left weak."""
    batch: int = 11
    length: int = 192
    vocab: int = 4096
    hidden: int = 192
    layers: int = 5
    heads: int = 6
    mlp: int = 512
    lr: float = 6e-3
    warmup: int = 50
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
def start_as_copier(model: LlamaForCausalLM) -> None:
    """Start every attention layer as "repeat what is attended to, attend to what looks alike".

    W_v is orthogonal and W_o its scaled transpose, so with tied embeddings an attended word is at once more likely;
    half of the heads start with W_q = W_k. From a random start the model needs millions of tokens to find copying.
    In the manner of mimetic initialisation (Trockman and Kolter, arXiv 2305.09828).
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.copy_(COPY_SCALE * attention.v_proj.weight.T)
        torch.nn.init.orthogonal_(attention.k_proj.weight)
        torch.nn.init.orthogonal_(attention.q_proj.weight)
        half = attention.q_proj.weight.shape[0] // 2
        attention.q_proj.weight[:half] = attention.k_proj.weight[:half]
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.01)


def optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms: fewer steps for the same loss."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(blocks, lr=settings.lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def rate(step: int, settings: Settings) -> float:
    """Linear warm-up, flat, then linear to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return min(1.0, (settings.steps - step) / (settings.steps - settings.decay_from))


def token_losses(
    model: LlamaForCausalLM, rows: Rows, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token given those before it in its document (R, T - 1), and the logits behind it."""
    logits = model(
        input_ids=rows.ids, attention_mask=mask, position_ids=rows.position, use_cache=False
    ).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows.ids[:, 1:], reduction="none")
    return losses, logits


def weighted_loss(model: LlamaForCausalLM, rows: Rows, mask: torch.Tensor) -> torch.Tensor:
    target = rows.weights[:, 1:]
    return (token_losses(model, rows, mask)[0] * target).sum() / target.sum()


@torch.no_grad()
def held_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: int = 96) -> dict[str, float]:
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


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, history: dict) -> None:
    """The asset: bf16 weights, tokenizer, card. The training copy stays in float32."""
    state = {name: p.detach().to(torch.bfloat16) for name, p in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
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
    write_card(out, history)


def train(out: Path, work: Path, settings: Settings, *, compiled: bool, minutes: float) -> dict:
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    if (work / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    else:
        tokenizer = train_tokenizer(settings.seed, settings.vocab)
        tokenizer.save_pretrained(work)
    model = build_model(settings, tokenizer)
    opts = optimizers(model, settings)
    params = sum(p.numel() for p in model.parameters())
    history: dict = {"settings": asdict(settings), "parameters": params, "curve": [], "seconds": 0.0}
    start = 0
    if (work / "state.pt").exists():
        saved = torch.load(work / "state.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        start = saved["step"]
        history = json.loads((work / "history.json").read_text()) | {"settings": asdict(settings)}
    step_loss = torch.compile(weighted_loss) if compiled else weighted_loss
    print(
        f"{params / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}, from step {start} of {settings.steps}",
        flush=True,
    )
    clock = last = time.time()
    seconds, mean = history["seconds"], None
    for step in range(start, settings.steps):
        if step % CHUNK == 0 or step == start:
            rows = packed(
                tokenizer,
                seed=f"{settings.seed}/{step // CHUNK}",
                rows=settings.batch * CHUNK,
                length=settings.length,
                context_weight=settings.context_weight,
                phase="easy"
                if step < settings.easy_steps
                else "main"
                if step < settings.late_from
                else "late",
            )
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = settings.lr * rate(step, settings)
        pick = slice((step % CHUNK) * settings.batch, (step % CHUNK + 1) * settings.batch)
        part = rows.pick(pick)
        loss = step_loss(model, part, attention_mask(part))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        value = loss.item()
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        done = step + 1
        if done % 25 == 0 or done == settings.steps:
            history["curve"].append([done, round(mean, 4)])
            history["seconds"] = seconds + time.time() - clock
            speed = (done - start) * settings.batch * settings.length / (time.time() - clock)
            left = (settings.steps - done) * settings.batch * settings.length / speed / 60
            print(
                f"step {done}/{settings.steps} loss {mean:.3f} {speed:.0f} tokens/s, {left:.1f} min left",
                flush=True,
            )
        if done % CHUNK == 0 and (time.time() - last > 60 * minutes or done == settings.steps):
            last = time.time()
            history["held_out"] = held_out(model, tokenizer) | {"step": done}
            print(f"held out {history['held_out']}", flush=True)
            save(model, tokenizer, out, history)
            state = {"model": model.state_dict(), "opts": [opt.state_dict() for opt in opts], "step": done}
            torch.save(state, work / "state.tmp")
            (work / "history.json").write_text(json.dumps(history))
            os.replace(work / "state.tmp", work / "state.pt")
    return history


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
    train(given.out, work, settings, compiled=given.compile, minutes=given.snapshot_minutes)


if __name__ == "__main__":
    main()
