"""The two kinds of task: a model writes the answer, or it chooses among labels.

A kind knows how rows are checked before anything is trained, how a model answers them, what the answers are worth and
what they are compared with. Whoever trains or scores asks it, and does not ask which one it is.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from manylora.data import EMBEDDED, TaskData, encode_prompt
from manylora.errors import ConfigError, RoutingError
from manylora.evaluation.chance import CONSTANT, chance_notes, constant_scores
from manylora.evaluation.classes import majority_scores, score_labels
from manylora.evaluation.score import Scores, score_all, wordless

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from manylora.training import LabelSets, Prepared
    from manylora.training.settings import Words

DEFAULT_ANSWER_TOKENS = 64
"""Longest answer where neither the run nor the user says otherwise."""

Kind = TypeVar("Kind", bound="TaskKind")

Baselines = dict[str, dict[str, float]]
"""What something simpler reaches: its name → task → score."""


@dataclass(frozen=True, kw_only=True)
class TaskKind(abc.ABC):
    """What a model does with the rows of a task."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    """Tokens a prompt may have; None: as many as the model's context leaves."""
    batch_size: int = 64
    """Rows per batch; the answers do not depend on it."""

    @property
    @abc.abstractmethod
    def known_tasks(self) -> Collection[str]:
        """The tasks of the training; empty where nothing is known of them."""

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
    def score(
        self,
        model: PeftModel | PreTrainedModel,
        test: TaskData,
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        on_cut: Callable[[str], None] = lambda line: None,
    ) -> Scores:
        """The model's answers to all rows, scored.

        Args:
            model: base with or without adapter.
            test: task to rows.
            on_progress: called with the number of rows that are answered.
            on_cut: told of prompts that were cut.

        Raises:
            RoutingError, DataError: the model does not know a task.
        """

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


@dataclass(frozen=True, kw_only=True)
class Writing(TaskKind):
    """The model writes each answer, greedily."""

    answer_tokens: Mapping[str, int]
    """Longest answer per task in tokens; a task that is not in it gets the largest of them."""
    experts: Mapping[str, int] | None = None
    """Task name to expert under the task router, else `None`."""
    rouge: Words = "all"
    """What ROUGE-1 counts as words."""
    max_new_tokens: int | None = None
    """Longest answer of every task, in place of `answer_tokens`."""

    @property
    def known_tasks(self) -> Collection[str]:
        """See `TaskKind.known_tasks`."""
        return self.answer_tokens.keys()

    def longest_answer(self, task: str) -> int:
        """Tokens that an answer to a row of a task may have."""
        known = self.answer_tokens
        longest = max(known.values(), default=DEFAULT_ANSWER_TOKENS)
        return self.max_new_tokens or known.get(task) or longest

    def check(self, test: TaskData, *, vocabulary: int | None) -> list[str]:
        """See `TaskKind.check`."""
        from manylora.evaluation.generation import NO_LIMIT

        self._check_experts(test)
        longest = self.max_length or NO_LIMIT
        cut = {
            task: sum(
                encode_prompt(row, self.tokenizer, max_length=longest, vocabulary=vocabulary)[1]
                for row in rows
            )
            for task, rows in test.items()
        }
        if test:  # what cannot be scored shows with any answers
            nothing = {task: [""] * len(rows) for task, rows in test.items()}
            score_all(test, nothing, tokenizer=self.tokenizer, rouge=self.rouge)
        return [*cut_lines(cut, test, self.max_length), *self.remarks(test)]

    def remarks(self, test: TaskData) -> list[str]:
        """See `TaskKind.remarks`."""
        return wordless(test, rouge=self.rouge)

    def score(
        self,
        model: PeftModel | PreTrainedModel,
        test: TaskData,
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        on_cut: Callable[[str], None] = lambda line: None,
    ) -> Scores:
        """See `TaskKind.score`."""
        from manylora.evaluation.generation import generate_answers

        self._check_experts(test)
        tasks = [task for task, rows in test.items() for _ in rows]

        def tell_cut(places: Sequence[int]) -> None:
            for line in cut_lines(Counter(tasks[place] for place in places), test, self.max_length):
                on_cut(line)

        answers = iter(
            generate_answers(
                model,
                self.tokenizer,
                [row for rows in test.values() for row in rows],
                batch_size=self.batch_size,
                max_length=self.max_length,
                max_new_tokens=[self.longest_answer(task) for task in tasks],
                expert_ids=None if self.experts is None else [self.experts[task] for task in tasks],
                on_progress=lambda done, _: on_progress(done),
                on_cut=tell_cut,
            )
        )
        by_task = {task: list(islice(answers, len(rows))) for task, rows in test.items()}
        return score_all(test, by_task, tokenizer=self.tokenizer, rouge=self.rouge)

    def baselines(self, test: TaskData, *, source: str | None, limit: int | None) -> Baselines:
        """What a constant answer and a keyword rule reach on the embedded suite; empty on other rows, or some of it."""
        if source != EMBEDDED or limit is not None:
            return {}
        from manylora.data.suite import load_suite
        from manylora.data.suite.baselines import keyword_baseline, majority_baseline

        train, whole = load_suite("train", tasks=list(test)), load_suite("test", tasks=list(test))
        return {
            name: score_all(
                whole,
                {task: learn(train[task]).predict(rows) for task, rows in whole.items()},
                rouge=self.rouge,
            ).by_task()
            for name, learn in {"majority": majority_baseline, "keyword": keyword_baseline}.items()
        }

    def _constant(self, test: TaskData, train: TaskData | None) -> Baselines:
        return {CONSTANT: constant_scores(test, train, rouge=self.rouge)}

    def _check_experts(self, test: Collection[str]) -> None:
        known = self.experts
        if known is not None and (unknown := sorted(set(test) - set(known))):
            raise RoutingError(
                f"The adapter has no expert for the tasks {', '.join(unknown)}; it knows {', '.join(known)}."
            )


@dataclass(frozen=True, kw_only=True)
class Choosing(TaskKind):
    """A classification head chooses among the task's labels."""

    labels: LabelSets
    max_length: int
    """Tokens a row may have; a longer one loses its end."""
    context: int | None = None
    """Tokens that the model reads, where that is known."""

    @property
    def known_tasks(self) -> Collection[str]:
        """See `TaskKind.known_tasks`."""
        return self.labels.tasks.keys()

    def check(self, test: TaskData, *, vocabulary: int | None) -> list[str]:
        """See `TaskKind.check`."""
        return self.remarks(test)

    def remarks(self, test: TaskData) -> list[str]:
        """See `TaskKind.remarks`; a row that is too long loses its end."""
        from manylora.training.labels import encode_questions

        self.labels.check(test, what="test")
        longest = min(self.max_length, self.context or self.max_length)
        cut = {
            task: sum(short for _, short in encode_questions(rows, self.tokenizer, max_length=longest))
            for task, rows in test.items()
        }
        lines = cut_lines(cut, test, longest)
        return [line.replace("cut to their ends", "lose their ends") for line in lines]

    def score(
        self,
        model: PeftModel | PreTrainedModel,
        test: TaskData,
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        on_cut: Callable[[str], None] = lambda line: None,
    ) -> Scores:
        """See `TaskKind.score`; it takes seconds, so there is no progress to tell."""
        from manylora.training import predict_labels

        found = predict_labels(
            model, self.tokenizer, test, self.labels, max_length=self.max_length, batch_size=self.batch_size
        )
        return score_labels(test, found)

    def baselines(self, test: TaskData, *, source: str | None, limit: int | None) -> Baselines:
        """The accuracy of each task's most frequent training label."""
        return {"majority": majority_scores(self.labels, test)}


def kind_of(prepared: Prepared) -> TaskKind:
    """The kind of a run's tasks."""
    config = prepared.config
    if prepared.labels is not None:
        return Choosing(
            tokenizer=prepared.tokenizer,
            max_length=config.max_length,
            batch_size=config.eval_batch_size,
            labels=prepared.labels,
        )
    return Writing(
        tokenizer=prepared.tokenizer,
        max_length=config.max_length,
        batch_size=config.eval_batch_size,
        answer_tokens=prepared.answer_tokens,
        experts={name: index for index, name in enumerate(prepared.task_names)}
        if config.routes_by_task
        else None,
        rouge=config.rouge,
    )


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
