"""What a base model can do in its own exercise forms: `python -m recipes.base.skills --model DIR`.

Teacher-forced: an answer counts if every one of its tokens is the model's first choice.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.base.corpus import EXERCISES
from recipes.base.wrappers import Exercise


def label(kind: str, instruction: str) -> str:
    """The first word or two of an instruction, which tell its form."""
    return " ".join(instruction.split()[: 1 if kind == "lists" else 2])


@torch.no_grad()
def skill_table(folder: Path, count: int = 150, kinds: list[str] | None = None) -> dict[str, float]:
    """Kind of exercise (and the first words of its instruction) to the share answered right."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rng = Random("skills")
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    items: list[tuple[str, list[int], int]] = []
    for kind in [k for k in EXERCISES if not kinds or k.__name__ in kinds]:
        for _ in range(count):
            drawn = kind(rng)
            if isinstance(drawn, Exercise):
                name, text, instruction, answer = kind.__name__, drawn.text, drawn.instruction, drawn.answer
            else:
                instruction, answer = rng.choice(drawn.asks)
                name, text = f"{kind.__name__}: {label(kind.__name__, instruction)}", drawn.text
                if kind.__name__ in ("relations", "transfers", "counting"):
                    name = (
                        f"{kind.__name__}: {'yes/no' if answer in ('yes', 'no') else instruction.split()[0]}"
                    )
                    if answer == "not said":
                        name = "relations: not said"
                    elif instruction.endswith("dealt with"):
                        name = "transfers: dealt with"
            head = tokenizer(f"{text}\n{instruction} ->").input_ids
            tail = tokenizer(f" {answer}\n", add_special_tokens=False).input_ids
            items.append((name, head + tail, len(head)))
    items.sort(key=lambda item: len(item[1]))
    for start in range(0, len(items), 64):
        part = items[start : start + 64]
        ids = torch.full((len(part), max(len(item[1]) for item in part)), tokenizer.pad_token_id)
        for line, (_, tokens, _) in enumerate(part):
            ids[line, : len(tokens)] = torch.tensor(tokens)
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for line, (name, tokens, head) in enumerate(part):
            total[name] += 1
            # The last token is the line break, which may as well be the end of the text: it does not count.
            right[name] += int(best[line, head - 1 : len(tokens) - 2].tolist() == tokens[head:-1])
    return {name: 100 * right[name] / total[name] for name in sorted(total)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/manylora/assets/base"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="*")
    parser.add_argument("--count", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, share in skill_table(given.model, given.count, given.kinds).items():
        print(f"{share:5.1f}  {name}")


if __name__ == "__main__":
    main()
