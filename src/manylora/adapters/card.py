"""The lines a saved adapter's model card needs: PEFT does not know the method until manylora is imported."""

from __future__ import annotations

from pathlib import Path

_MARK = "<!-- manylora: how to load -->"

_SECTION = f"""
{_MARK}
## How to load this adapter

It is a ManyLoRA adapter (several LoRA experts in one). `import manylora` makes PEFT know the method:

```python
import manylora  # registers the method with PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def add_loading_section(folder: Path) -> None:
    """Append the section to `folder/README.md` once; does nothing where PEFT has written no card."""
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if _MARK not in text:
        card.write_text(text.rstrip("\n") + "\n" + _SECTION, encoding="utf-8")
