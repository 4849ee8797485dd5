"""Tasks whose answers a classification head chooses among the task's labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from manylora.data import Encoded, PromptRecord, Splits, TaskData, prompt_text
from manylora.errors import DataError, ModelError
from manylora.evaluation import Baselines, ScoredExample, Scores
from manylora.evaluation.finite import refuse_output
from manylora.evaluation.generation import context_of
from manylora.evaluation.metrics import ACCURACY
from manylora.evaluation.score import sum_examples
from manylora.training.adapter_folders import adapter_base_name, adapter_folder, adapter_quantisation
from manylora.training.batches import Collator, EncodedTask
from manylora.training.facts import read_task_facts
from manylora.training.kinds.kind import TaskKind, cut_lines
from manylora.training.labels import LabelSets, encode_labelled, encode_questions, label_of
from manylora.training.losses import LabelLoss, Loss, among
from manylora.training.models import (
    load_adapter,
    load_classifier,
    load_tokenizer,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from manylora.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Choosing(TaskKind):
    """A classification head chooses among the task's labels."""

    one_process: ClassVar[bool] = True
    cannot_write: ClassVar[str] = "classifies and writes no text"
    cannot_export: ClassVar[str] = "classifies: it has a head that a plain LoRA has no place for"

    labels: LabelSets
    max_length: int
    """Tokens a row may have; a longer one loses its end."""

    # ---- how it comes about

    @staticmethod
    def _own_settings(config: TrainConfig, splits: Splits) -> dict[str, Any]:
        # rows that a cut has moved to validation have labels, too
        rows = {task: [*rows, *splits.validation.get(task, ())] for task, rows in splits.train.items()}
        return {"labels": LabelSets.of(rows)}

    @classmethod
    def load(
        cls, adapter: str, *, model: str | None, dtype: str, device: str
    ) -> tuple[PeftModel, Choosing, PromptRecord | None]:
        """See `TaskKind.load`."""
        folder = adapter_folder(adapter)
        facts = read_task_facts(folder)
        if facts is None:
            raise ModelError(
                f"{adapter} has no tasks.json beside it, so its head's labels are unknown; give the run folder."
            )
        for task, known in facts.tasks.items():
            if not known.labels or known.majority is None:
                raise DataError(
                    f"{folder.parent / 'tasks.json'} names no labels of task {task!r}; train the classifier again."
                )
        labels = LabelSets(
            tasks={task: known.labels or [] for task, known in facts.tasks.items()},
            majority={task: known.majority or "" for task, known in facts.tasks.items()},
        )
        name = model or adapter_base_name(folder)
        tokenizer = load_tokenizer(name, task_type="SEQ_CLS")
        base = load_classifier(
            name,
            labels=labels.count,
            pad_token_id=tokenizer.pad_token_id,
            seed=0,  # of a head that the adapter's replaces
            dtype=dtype,
            device=device,
            quantize=adapter_quantisation(folder),
        )
        adapted = load_adapter(base, adapter)
        routes = getattr(
            adapted.active_peft_config, "routes_by_task", False
        )  # a plain LoRA's has no such thing
        kind = cls(
            tokenizer=tokenizer,
            max_length=facts.max_length,
            context=context_of(adapted.config),
            experts=labels.numbers if routes else None,
            labels=labels,
        )
        return adapted, kind, None

    # ---- training

    @property
    def loss(self) -> Loss:
        """See `TaskKind.loss`."""
        return LabelLoss(self.labels)

    @property
    def known_tasks(self) -> Collection[str]:
        """See `TaskKind.known_tasks`."""
        return self.labels.tasks.keys()

    @property
    def head_outputs(self) -> int:
        """See `TaskKind.head_outputs`."""
        return self.labels.count

    def load_base(self, config: TrainConfig) -> PreTrainedModel:
        """See `TaskKind.load_base`; the head is drawn from the run's seed."""
        return load_classifier(
            config.model,
            labels=self.labels.count,
            pad_token_id=self.tokenizer.pad_token_id,
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
            attention=config.attention,
            quantize=config.quantize,
        )

    def encode(self, data: TaskData, *, vocabulary: int | None) -> list[EncodedTask]:
        """See `TaskKind.encode`."""
        return encode_labelled(
            data, self.tokenizer, self.labels, max_length=self._longest, vocabulary=vocabulary
        )

    def mark(self, row: Encoded) -> object:
        """See `TaskKind.mark`: its label."""
        return row.labels

    def answer_label(self, row: Encoded) -> str | None:
        """See `TaskKind.answer_label`."""
        return [label for own in self.labels.tasks.values() for label in own][row.labels[0]]

    def facts(self, task: str) -> dict[str, Any]:
        """See `TaskKind.facts`."""
        return {"labels": list(self.labels.tasks[task]), "majority": self.labels.majority[task]}

    # ---- use

    @classmethod
    def next_command(cls, adapter: str, *, task: str | None) -> str:
        """See `TaskKind.next_command`; the rows name their tasks."""
        return f"manylora evaluate --adapter {adapter} --data FILE"

    def check(self, test: TaskData, *, vocabulary: int | None) -> list[str]:
        """See `TaskKind.check`."""
        return self.remarks(test)

    def remarks(self, test: TaskData) -> list[str]:
        """See `TaskKind.remarks`; a row that is too long loses its end."""
        self.labels.check(test, what="test")
        cut = {
            task: sum(short for _, short in encode_questions(rows, self.tokenizer, max_length=self._longest))
            for task, rows in test.items()
        }
        lines = cut_lines(cut, test, self._longest)
        return [line.replace("cut to their ends", "lose their ends") for line in lines]

    @torch.no_grad()
    def predict(
        self, model: PeftModel | PreTrainedModel, data: TaskData, **_: Callable[[Any], None]
    ) -> dict[str, list[str]]:
        """See `TaskKind.predict`: the most likely label among the task's own. It takes seconds."""
        self.labels.check(data, what="test")
        model.eval()
        allowed_KC, names = (
            self.labels.allowed(),
            [label for own in self.labels.tasks.values() for label in own],
        )
        chosen: dict[str, list[str]] = {}
        for task, examples in data.items():
            coded = [ids for ids, _ in encode_questions(examples, self.tokenizer, max_length=self._longest)]
            found = [""] * len(coded)
            for part, batch in self._batches(coded):
                task_B = torch.full((len(part),), self.labels.numbers[task], device=model.device)
                routing = {} if self.experts is None else {"expert_ids": task_B}
                logits = model(**{name: t.to(model.device) for name, t in batch.items()}, **routing).logits
                own = among(logits, task_B, allowed_KC)
                if bad := own.isnan().any(-1).nonzero()[:, 0].tolist():
                    refuse_output(
                        model, [examples[part[row]].origin or f"a row of task {task!r}" for row in bad]
                    )
                for place, best in zip(part, own.argmax(-1).tolist(), strict=True):
                    found[place] = names[best]
            chosen[task] = found
        return chosen

    def judge(self, data: TaskData, answers: Mapping[str, Sequence[str]]) -> Scores:
        """See `TaskKind.judge`: 100 for a row whose label is given, else 0."""
        if not data:
            raise DataError("There is no task to score. Give rows of at least one task.")
        tasks = []
        for task, rows in data.items():
            examples = [
                ScoredExample(
                    task=task,
                    index=index,
                    prompt=prompt_text(row),
                    prediction=label,
                    reference=label_of(row),
                    answer=None,
                    metrics={ACCURACY: 100.0 * (label == label_of(row))},
                    origin=row.origin,
                )
                for index, (row, label) in enumerate(zip(rows, answers[task], strict=True))
            ]
            tasks.append(sum_examples(task, examples))
        return Scores(tasks=tuple(tasks))

    def baselines(self, test: TaskData, *, source: str | None, limit: int | None) -> Baselines:
        """The accuracy of each task's most frequent training label."""
        constant = {task: [self.labels.majority[task]] * len(rows) for task, rows in test.items()}
        return {"majority": self.judge(test, constant).by_task()}

    @property
    def _longest(self) -> int:
        """Tokens that a row may have."""
        return min(self.max_length, self.context or self.max_length)

    def _batches(self, coded: Sequence[list[int]]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows of about one length together: where each stands, and what the model reads."""
        order = sorted(range(len(coded)), key=lambda place: len(coded[place]))
        collate = Collator(pad_token_id=self.tokenizer.pad_token_id)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = collate([{"input_ids": coded[place], "labels": [], "task": 0} for place in part])
            yield part, {name: batch[name] for name in ("input_ids", "attention_mask")}
