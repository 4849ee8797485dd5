"""`manylora train` and `evaluate` on classifiers (task type SEQ_CLS): the parts that differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.cuts import cut_questions
from manylora.cli.tables import print_saved_scores, print_scores
from manylora.data import missing_tasks, single_answers
from manylora.errors import ConfigError, ModelError
from manylora.evaluation import (
    chance_notes,
    majority_scores,
    read_labels,
    score_classifier,
    score_labels,
    write_scores,
)
from manylora.training import (
    adapter_base_name,
    adapter_folder,
    adapter_task_type,
    load_adapter,
    load_classifier,
    load_tokenizer,
    predict_labels,
    read_task_facts,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from manylora.cli.options import EvaluateOptions
    from manylora.data import TaskData
    from manylora.training import LabelSets, Prepared, RunFolder


def is_classifier(adapter: str | None) -> bool:
    """Whether this is an adapter that classifies."""
    return adapter is not None and adapter_task_type(adapter) == "SEQ_CLS"


def score_run_of_classes(prepared: Prepared, folder: RunFolder, model: PeftModel) -> None:
    """Score a finished training on its test rows, print the table, write predictions.jsonl and scores.json."""
    if not prepared.splits.test:
        print("no test rows (give them with --test); the adapter is in " + str(folder.path / "adapter"))
        return
    score_classifier(prepared, folder, model)
    print_saved_scores(folder)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What an adapter's folder says of its head."""

    labels: LabelSets
    max_length: int
    """Tokens a row may have, as in training."""

    @classmethod
    def of(cls, adapter: str) -> Labelled:
        """Read it.

        Raises:
            ModelError: the adapter stands alone, so that nothing says which output of its head is which label.
            DataError: the file lacks them.
        """
        folder = adapter_folder(adapter)
        facts = read_task_facts(folder)
        if facts is None:
            raise ModelError(
                f"{adapter} has no tasks.json beside it, so its head's labels are unknown; give the run folder."
            )
        return cls(
            labels=read_labels(facts, source=folder.parent / "tasks.json"), max_length=facts.max_length
        )

    def load(
        self, adapter: str, *, model: str | None, dtype: str, device: str
    ) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """The base with the adapter and its head, and the tokenizer.

        Raises:
            ModelError: unknown model, or one that the adapter does not belong to.
        """
        name = model or adapter_base_name(adapter_folder(adapter))
        tokenizer = load_tokenizer(name, task_type="SEQ_CLS")
        base = load_classifier(
            name,
            labels=self.labels.count,
            pad_token_id=tokenizer.pad_token_id,
            seed=0,  # of a head that the adapter's replaces
            dtype=dtype,
            device=device,
        )
        return load_adapter(base, adapter), tokenizer


def evaluate_classifier(options: EvaluateOptions, test: TaskData) -> int:
    """Score a trained classifier on `test`; print, and write where `--out` says.

    Raises:
        ModelError: see `Labelled`.
        ConfigError: an option that is about generated text.
        DataError: a test task that the head does not know.
    """
    assert options.adapter is not None
    for name, value in (("max-new-tokens", options.max_new_tokens), ("rouge", options.rouge)):
        if value is not None:
            raise ConfigError(
                f"--{name} is about written answers, but {options.adapter} classifies; leave it out."
            )
    head = Labelled.of(options.adapter)
    labels = head.labels
    labels.check(test, what="test")
    model, tokenizer = head.load(
        options.adapter, model=options.model, dtype=options.dtype, device=options.device
    )
    length = min(
        options.max_length or head.max_length, getattr(model.config, "max_position_embeddings", None) or 2**31
    )
    gaps = missing_tasks(labels.tasks, test) if options.tasks is None else []
    for note in (*gaps, *single_answers(test, what="test")):
        print(f"note: {note}")
    for line in cut_questions(test, tokenizer, length):
        print(line)
    predictions = predict_labels(
        model, tokenizer, test, labels, max_length=length, batch_size=options.batch_size
    )
    scores, baselines = score_labels(test, predictions), {"majority": majority_scores(labels, test)}
    notes = chance_notes(scores, baselines, router=getattr(model.active_peft_config, "router", None))
    print_scores(scores, baselines, notes)
    if options.out is not None:
        write_scores(Path(options.out), scores, baselines, notes)
        print(f"written to {options.out}")
    return 0
