"""What a training leaves: the adapter's folder, and what is known of its tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manylora.data import PromptRecord
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
    prepared.tokenizer.save_pretrained(str(partial))
    if prepared.labels is None:
        prompts = PromptRecord.of(
            prepared.splits.train,
            prepared.tokenizer,
            date=prepared.config.date,
            max_length=prepared.config.max_length,
        )
        prompts.write(partial)
    run.place_folder("adapter", partial)
    facts: dict[str, dict[str, Any]] = {
        task.name: {
            "expert": index,
            "train_rows": len(task.rows),
            "answer_tokens": prepared.answer_tokens[task.name],
        }
        for index, task in enumerate(prepared.train)
    }
    if prepared.labels:
        for name, labels in prepared.labels.tasks.items():
            del facts[name]["answer_tokens"]
            facts[name] |= {"labels": list(labels), "majority": prepared.labels.majority[name]}
    write_json(run.path / "tasks.json", {"max_length": prepared.config.max_length, "tasks": facts})
