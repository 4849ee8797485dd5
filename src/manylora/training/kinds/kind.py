"""What every kind of task has: a model writes the answer, or it chooses among labels.

A kind knows how rows are read, what is lost on them, how they are checked before anything is trained, how a model
answers them, what the answers are worth and what they are compared with. Whoever trains or scores asks it, and does not
ask which one it is.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from manylora.data import Encoded, Example, PromptRecord, Splits, TaskData
from manylora.errors import ConfigError
from manylora.evaluation import Baselines, Scores, chance_notes
from manylora.training.batches import EncodedTask
from manylora.training.losses import Loss

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from manylora.training.config import TrainConfig

Kind = TypeVar("Kind", bound="TaskKind")


@dataclass(frozen=True, kw_only=True)
class TaskKind(abc.ABC):
    """What a model does with the rows of a task."""

    one_process: ClassVar[bool] = False
    """Whether training cannot be divided between processes."""
    cannot_write: ClassVar[str] = ""
    """Why an adapter of this kind has no text to give; empty where it has."""
    cannot_export: ClassVar[str] = ""
    """Why no plain LoRA can be made of an adapter of this kind; empty where one can."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    """Tokens a prompt may have; None: as many as the model's context leaves."""
    batch_size: int = 64
    """Rows per batch; the answers do not depend on it."""
    context: int | None = None
    """Tokens that the model reads, where that is known."""
    experts: Mapping[str, int] | None = None
    """Task name to expert under the task router, else `None`."""

    # ---- how it comes about

    @classmethod
    def of_run(
        cls: type[Kind],
        config: TrainConfig,
        splits: Splits,
        *,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
    ) -> Kind:
        """The kind of a run's tasks, before its rows are encoded.

        Args:
            config: of the run, resolved.
            splits: its rows.
            tokenizer: the base's.
            context: tokens that the model reads.

        Raises:
            DataError: the rows are none of this kind.
        """
        return cls(
            tokenizer=tokenizer,
            max_length=config.max_length,
            batch_size=config.eval_batch_size,
            context=context,
            experts={task: number for number, task in enumerate(splits.train)}
            if config.routes_by_task
            else None,
            **cls._own_settings(config, splits),
        )

    @staticmethod
    @abc.abstractmethod
    def _own_settings(config: TrainConfig, splits: Splits) -> dict[str, Any]:
        """The fields of this kind alone, of a run."""

    def with_rows(self: Kind, train: Collection[EncodedTask]) -> Kind:
        """The same, with what the encoded training rows tell."""
        return self

    @classmethod
    @abc.abstractmethod
    def load(
        cls: type[Kind], adapter: str, *, model: str | None, dtype: str, device: str
    ) -> tuple[PeftModel, Kind, PromptRecord | None]:
        """A trained adapter on its base, how it answers, and how its training asked, where that is known.

        Args:
            adapter: run folder or PEFT adapter folder.
            model: the base. Default: the one that the adapter names.
            dtype: of the base.
            device: where it goes.

        Raises:
            ModelError: the base or the adapter cannot be loaded, or they do not belong together.
            DataError: what its answers mean is not known.
        """

    def with_settings(self: Kind, *, source: str, **settings: Any) -> Kind:
        """The same with other settings; None leaves one as it is.

        Args:
            source: the adapter, for the error.
            settings: fields of a kind.

        Raises:
            ConfigError: a setting is about writing, which this kind does not do.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := [name.replace("_", "-") for name in given if name not in known]:
            raise ConfigError(
                f"--{unknown[0]} is about written answers, but {source} classifies; leave it out."
            )
        return dataclasses.replace(self, **given)

    # ---- training

    @classmethod
    def resolve_prompts(cls, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
        """The configuration with what the tokenizer decides of prompts: the template of instruction rows, and the date
        of the run, where prompts tell it; the tokenizer then tells that one.

        Raises:
            ConfigError: the tokenizer cannot write the template.
        """
        return dataclasses.replace(config, template="alpaca")

    def apply_template(self, data: TaskData) -> TaskData:
        """Rows in the form in which the model is asked them."""
        return data

    @property
    @abc.abstractmethod
    def loss(self) -> Loss:
        """What a batch of encoded rows costs."""

    @property
    @abc.abstractmethod
    def known_tasks(self) -> Collection[str]:
        """The tasks of the training; empty where nothing is known of them."""

    @property
    def head_outputs(self) -> int:
        """Outputs of the head that is trained; 0 where none is."""
        return 0

    @abc.abstractmethod
    def load_base(self, config: TrainConfig) -> PreTrainedModel:
        """The base to train on, with its head.

        Raises:
            ModelError: it cannot be loaded.
        """

    @abc.abstractmethod
    def encode(self, data: TaskData, *, vocabulary: int | None) -> list[EncodedTask]:
        """Every row of every task, in order, with what is to be learnt of it.

        Args:
            data: task to rows, each with an answer.
            vocabulary: rows of the model's embedding; ids beyond are refused.

        Raises:
            DataError: a row cannot be read so.
        """

    @abc.abstractmethod
    def mark(self, row: Encoded) -> object:
        """What of an encoded row, besides its tokens, tells it from another one."""

    def answer_label(self, row: Encoded) -> str | None:
        """The label that is an encoded row's answer; None where its tokens are the answer."""
        return None

    def unread(self, rows: Iterable[Example]) -> list[str]:
        """Sentences on what of rows the model does not read."""
        return []

    @abc.abstractmethod
    def facts(self, task: str) -> dict[str, Any]:
        """What tasks.json says of a task, so that `load` can answer as this does."""

    def prompts(self, train: TaskData, *, date: str | None) -> PromptRecord | None:
        """How the training rows asked, where an adapter's users must know."""
        return None

    # ---- use

    @classmethod
    @abc.abstractmethod
    def next_command(cls, adapter: str, *, task: str | None) -> str:
        """What one does with a trained adapter, as a command.

        Args:
            adapter: its folder, quoted.
            task: one that must be named, where its router asks for that.
        """

    @abc.abstractmethod
    def check(self, test: TaskData, *, vocabulary: int | None) -> list[str]:
        """Refuse, before anything is trained, rows that could not be scored afterwards.

        Args:
            test: task to rows.
            vocabulary: rows of the model's embedding.

        Returns:
            Sentences on what is cut or cannot count.

        Raises:
            RoutingError, DataError: a task has no expert, a prompt cannot be rendered, labels do not fit.
        """

    @abc.abstractmethod
    def remarks(self, test: TaskData) -> list[str]:
        """Sentences on rows that will not be read whole or cannot count, known without a model.

        Raises:
            DataError: labels do not fit.
        """

    @abc.abstractmethod
    def predict(
        self,
        model: PeftModel | PreTrainedModel,
        data: TaskData,
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        on_cut: Callable[[str], None] = lambda line: None,
    ) -> dict[str, list[str]]:
        """The model's answers to all rows, per task and in order.

        Args:
            model: base with or without adapter.
            data: task to rows.
            on_progress: called with the number of rows that are answered.
            on_cut: told of prompts that were cut.

        Raises:
            RoutingError, DataError: the model does not know a task.
            NonFiniteError: the model's output is NaN.
        """

    @abc.abstractmethod
    def judge(self, data: TaskData, answers: Mapping[str, Sequence[str]]) -> Scores:
        """What answers are worth, from wherever they come.

        Raises:
            DataError: there are no rows, or rows without a reference.
        """

    def score(
        self, model: PeftModel | PreTrainedModel, data: TaskData, **told: Callable[[Any], None]
    ) -> Scores:
        """What the model's answers are worth; see `predict`."""
        return self.judge(data, self.predict(model, data, **told))

    @abc.abstractmethod
    def baselines(self, test: TaskData, *, source: str | None, limit: int | None) -> Baselines:
        """What belongs into the table of scores beside them.

        Args:
            test: task to rows.
            source: where the rows are from.
            limit: how many of each task are left; None: all.
        """

    def notes(
        self,
        scores: Scores,
        baselines: Baselines,
        test: TaskData,
        *,
        train: TaskData | None = None,
        router: str | None,
    ) -> list[str]:
        """Sentences on tasks that an adapter seems not to have learnt.

        Args:
            scores: of an adapter.
            baselines: see `baselines`.
            test: the rows that were scored.
            train: the adapter's training rows, where they are at hand.
            router: the adapter's.
        """
        return chance_notes(scores, baselines or self._constant(test, train), router=router)

    def _constant(self, test: TaskData, train: TaskData | None) -> Baselines:
        return {}


def cut_lines(cut: Mapping[str, int], test: TaskData, max_length: int | None) -> list[str]:
    """A line on the prompts that are cut, with each task's share; none where all are whole.

    Args:
        cut: task to its number of them.
        test: the rows.
        max_length: tokens that a prompt might have; None: what the model's context leaves.
    """
    if not (number := sum(cut.values())):
        return []
    shares = ", ".join(
        f"{task} {100 * count / len(test[task]):.1f} %" for task, count in cut.items() if count
    )
    most = "the model's context leaves" if max_length is None else f"{max_length} tokens"
    return [
        f"{number} of {sum(map(len, test.values()))} test prompts are longer than {most} and cut to their ends "
        f"({shares})"
    ]
