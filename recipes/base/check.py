"""Check a base model on the suite with plain PEFT LoRA: `python -m recipes.base.check --model DIR`.

Zero-shot, majority and keyword baselines, one LoRA per task, and with --joint one LoRA for all tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from manylora.data.examples import Example
from manylora.data.suite import SUITE_TASKS, load_suite
from manylora.data.suite.baselines import keyword_baseline, majority_baseline

SCORER = RougeScorer(["rouge1"], use_stemmer=False)


def rouge(predictions: Sequence[str], rows: Sequence[Example]) -> float:
    """Mean ROUGE-1 F1 x 100."""
    scores = [
        SCORER.score(row.output, text)["rouge1"].fmeasure for row, text in zip(rows, predictions, strict=True)
    ]
    return 100 * sum(scores) / len(scores)


def prompt(row: Example) -> str:
    given = f"\n\n### Input:\n{row.input}" if row.input else ""
    return f"### Instruction:\n{row.instruction}{given}\n\n### Response:\n"


@torch.no_grad()
def answer(model: Any, tokenizer: Any, rows: Sequence[Example], batch: int = 64) -> list[str]:
    model.eval()
    tokenizer.padding_side = "left"
    order = sorted(range(len(rows)), key=lambda i: len(prompt(rows[i])))
    texts = [""] * len(rows)
    for start in range(0, len(rows), batch):
        part = order[start : start + batch]
        coded = tokenizer([prompt(rows[i]) for i in part], return_tensors="pt", padding=True)
        longest = max(len(tokenizer(rows[i].output).input_ids) for i in part)
        made = model.generate(
            **{k: coded[k] for k in ("input_ids", "attention_mask")},
            max_new_tokens=longest + 8,
            do_sample=False,
        )
        for i, ids in zip(part, made[:, coded["input_ids"].shape[1] :], strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def fit(
    base: Path, tokenizer: Any, rows: Sequence[Example], *, lr: float, epochs: int, batch: int, rank: int
) -> Any:
    """Plain LoRA on all linear layers: warm-up of 6 %, then linear decay; loss on the answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    coded = []
    for row in rows:
        head = tokenizer(prompt(row)).input_ids
        tail = [*tokenizer(row.output, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        coded.append((head + tail, len(head)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    per_epoch = math.ceil(len(rows) / batch)
    total, step = epochs * per_epoch, 0
    warm = max(1, round(0.06 * total))
    rng = random.Random(0)
    model.train()
    for _ in range(epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), batch):
            part = [coded[i] for i in order[start : start + batch]]
            width = max(len(ids) for ids, _ in part)
            ids = torch.full((len(part), width), tokenizer.pad_token_id)
            labels = torch.full((len(part), width), -100)
            mask = torch.zeros((len(part), width), dtype=torch.long)
            for line, (tokens, head) in enumerate(part):
                ids[line, : len(tokens)] = torch.tensor(tokens)
                labels[line, head : len(tokens)] = torch.tensor(tokens[head:])
                mask[line, : len(tokens)] = 1
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warm, (total - step) / max(1, total - warm))
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/manylora/assets/base"))
    parser.add_argument("--tasks", nargs="*", default=list(SUITE_TASKS))
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", nargs="*", default=[], choices=("zero", "single"))
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers a task")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    train, test = load_suite("train", given.tasks), load_suite(given.split, given.tasks)
    table: dict[str, dict[str, float]] = {name: {} for name in test}
    recipe = {"lr": given.lr, "epochs": given.epochs, "batch": given.batch, "rank": given.rank}

    def note(column: str, name: str, texts: list[str]) -> None:
        rows = test[name]
        table[name][column] = rouge(texts, rows)
        wrong = [(row, text) for row, text in zip(rows, texts, strict=True) if text != row.output]
        table[name][f"{column} exact"] = 100 - 100 * len(wrong) / len(rows)
        print(
            f"{column:8} {name:15} {table[name][column]:5.1f} exact {table[name][f'{column} exact']:5.1f}",
            flush=True,
        )
        for row, text in wrong[: given.show]:
            print("   ", repr(row.instruction), repr(row.input), "->", repr(text), "not", repr(row.output))

    for name in test:
        for column, baseline in (("majority", majority_baseline), ("keyword", keyword_baseline)):
            table[name][column] = rouge(baseline(train[name]).predict(test[name]), test[name])
    if "zero" not in given.skip:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        for name in test:
            note("zero", name, answer(model, tokenizer, test[name]))
    if "single" not in given.skip:
        for name in test:
            began = time.time()
            model = fit(given.model, tokenizer, train[name], **recipe)
            print(f"{time.time() - began:.0f} s", end=" ")
            note("single", name, answer(model, tokenizer, test[name]))
    if given.joint:
        began = time.time()
        model = fit(given.model, tokenizer, [row for rows in train.values() for row in rows], **recipe)
        print(f"joint training {time.time() - began:.0f} s")
        began = time.time()
        for name in test:
            note("joint", name, answer(model, tokenizer, test[name]))
        print(f"generation {time.time() - began:.0f} s")
    columns = [
        c
        for c in ("majority", "keyword", "zero", "single", "joint")
        if all(c in row for row in table.values())
    ]
    print(f"\n| task (n={len(next(iter(test.values())))}, {given.split}) | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[c]:.1f}" for c in columns) + " |")
    means = {c: sum(row[c] for row in table.values()) / len(table) for c in columns}
    print("| **mean** | " + " | ".join(f"{means[c]:.1f}" for c in columns) + " |")
    print(json.dumps({"recipe": recipe, "means": {c: round(v, 2) for c, v in means.items()}}))


if __name__ == "__main__":
    main()
