"""What a training leaves: the adapter's folder, and what is known of its tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manylora.files import remove, write_json
from manylora.training.runs import RunFolder
from manylora.training.trainer import save_adapter

if TYPE_CHECKING:
    from peft import PeftModel

    from manylora.training.prepared import Prepared


def save_result(prepared: Prepared, run: RunFolder, model: PeftModel) -> None:
    """Place `adapter/` in the run folder, with tokenizer and record of its prompts, and tasks.json beside it."""
    partial = run.path / "adapter.partial"
    remove(partial)
    save_adapter(model, str(partial))
    config, kind = prepared.config, prepared.kind
    kind.tokenizer.save_pretrained(str(partial))
    if (prompts := kind.prompts(prepared.splits.train, date=config.date)) is not None:
        prompts.write(partial)
    run.place_folder("adapter", partial)
    facts = {
        task.name: {"expert": index, "train_rows": len(task.rows), **kind.facts(task.name)}
        for index, task in enumerate(prepared.train)
    }
    write_json(run.path / "tasks.json", {"max_length": config.max_length, "tasks": facts})
