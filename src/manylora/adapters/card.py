"""Model cards: how to load a saved adapter (PEFT does not know it until manylora is imported), an exported one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_MARK = "<!-- manylora: how to load -->"

_SECTION = """
{mark}
## How to load this adapter

It is a ManyLoRA adapter (several LoRA experts in one). `import manylora` makes PEFT know the method:

```python
import manylora  # registers the method with PEFT
from peft import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```
"""

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
"""PEFT's loaders by task type; each refuses the others' adapters. One without a task type loads by any."""


def add_loading_section(folder: Path, *, task_type: str | None = None) -> None:
    """Append the section to `folder/README.md` once; does nothing where PEFT has written no card."""
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _MARK not in text:
        auto_class = _AUTO_CLASSES.get(str(task_type), "AutoPeftModelForCausalLM")
        section = _SECTION.format(mark=_MARK, auto_class=auto_class)
        card.write_text(text.rstrip("\n") + "\n" + section, encoding="utf-8")


def lora_card(
    name: str,
    *,
    base: str | None,
    hub: bool,
    rank: int,
    source: str,
    note: str,
    obstacles: Sequence[str] = (),
) -> str:
    """The model card of an exported LoRA.

    Args:
        name: what a server should call it.
        base: the base model, by folder or Hub id.
        hub: whether `base` is a Hub id, which the card's header may name.
        rank: its largest rank.
        source: the adapter it was exported from.
        note: how it relates to that adapter: exactly, or at which loss.
        obstacles: what inference servers will refuse in it.
    """
    header = f"base_model: {base}\n" if hub else ""
    shown = base or "BASE"
    place = f"{name}=path/to/this/folder"
    serve = f"""vllm serve {shown} --enable-lora --max-lora-rank {server_rank(rank)} --lora-modules {place}
python -m sglang.launch_server --model-path {shown} --enable-lora --lora-paths {place}"""
    serving = (
        f"vLLM and SGLang do not serve it: {'; '.join(obstacles)}. `manylora export --merge` writes merged weights "
        "instead."
        if obstacles
        else f"```console\n{serve}\n```"
    )
    return f"""---
{header}library_name: peft
tags:
- lora
- manylora
---

# {name}

A plain LoRA of rank {rank}, exported from the ManyLoRA adapter `{source}`. {note}

## Use

PEFT loads it; nothing of ManyLoRA is needed:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{shown}")
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

{serving}
"""


def combined_card(names: Sequence[str], *, base: str | None, hub: bool) -> str:
    """The model card of an adapter that holds several LoRAs as experts; the lines on loading come after it."""
    header = f"base_model: {base}\n" if hub else ""
    experts = "\n".join(f"| {index} | {name} |" for index, name in enumerate(names))
    return f"""---
{header}library_name: peft
tags:
- manylora
---

# {len(names)} LoRAs in one adapter

Each expert is one LoRA as it was; `expert_ids` choose between them row by row.

| expert | task |
|---|---|
{experts}
"""


def server_rank(rank: int) -> int:
    """The least --max-lora-rank of vLLM that holds `rank`; the values are those that vLLM's LoRAConfig takes."""
    return next((value for value in _SERVER_RANKS if value >= rank), rank)


_SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
