"""Tasks whose answers the model writes."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters import read_settings
from manylora.data import (
    EMBEDDED,
    Encoded,
    Example,
    LossOn,
    PromptRecord,
    Splits,
    TaskData,
    Template,
    Words,
    apply_template,
    asks_date,
    check_template,
    encode_prompt,
    find_prompts,
    fix_date,
    resolve_template,
    today,
    unread_note,
)
from manylora.errors import ConfigError, ModelError, RoutingError
from manylora.evaluation import (
    CONSTANT,
    Baselines,
    Scores,
    constant_scores,
    generate_answers,
    score_all,
    wordless,
)
from manylora.evaluation.generation import NO_LIMIT, context_of
from manylora.training.adapter_folders import (
    adapter_base_name,
    adapter_folder,
    adapter_quantisation,
    config_of_run,
)
from manylora.training.batches import EncodedTask, encode_tasks
from manylora.training.facts import read_task_facts
from manylora.training.kinds.kind import TaskKind, cut_lines
from manylora.training.losses import AnswerLoss, Loss
from manylora.training.models import (
    load_adapter,
    load_base,
    load_tokenizer,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from manylora.training.config import TrainConfig

DEFAULT_ANSWER_TOKENS = 64
"""Longest answer where neither the run nor the user says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Writing(TaskKind):
    """The model writes each answer, greedily."""

    answer_tokens: Mapping[str, int] = field(default_factory=dict)
    """Longest answer per task in tokens; a task that is not in it gets the largest of them."""
    rouge: Words = "all"
    """What ROUGE-1 counts as words."""
    max_new_tokens: int | None = None
    """Longest answer of every task, in place of `answer_tokens`."""
    loss_on: LossOn = "answer"
    """Tokens that carry the loss."""
    templates: Mapping[str, Template] = field(default_factory=dict)
    """How instruction rows of each task were asked; of any other task as under "", else in the Alpaca form."""
    template: Template | None = None
    """How those of every task are asked, in place of `templates`."""

    def __post_init__(self) -> None:
        check_template(self.template, self.tokenizer)

    # ---- how it comes about

    @staticmethod
    def _own_settings(config: TrainConfig, splits: Splits) -> dict[str, Any]:
        return {
            "rouge": config.rouge,
            "max_new_tokens": config.max_new_tokens,
            "loss_on": config.loss_on,
            "template": config.template,
        }

    def with_rows(self, train: Collection[EncodedTask]) -> Writing:
        """See `TaskKind.with_rows`: how long answers are."""
        limits = {
            task.name: task.answer_limit(fixed=self.max_new_tokens, context=self.context) for task in train
        }
        return dataclasses.replace(self, answer_tokens=limits)

    @classmethod
    def load(
        cls, adapter: str, *, model: str | None, dtype: str, device: str
    ) -> tuple[PeftModel, Writing, PromptRecord | None]:
        """See `TaskKind.load`."""
        folder = adapter_folder(adapter)
        name = model or adapter_base_name(folder)
        tokenizer, prompts = load_tokenizer(name), find_prompts(folder)
        if prompts is not None:
            prompts.prepare(tokenizer)
        base = load_base(name, dtype=dtype, device=device, quantize=adapter_quantisation(folder))
        adapted = load_adapter(base, folder)
        max_length, answer_tokens = prompts.max_length if prompts else None, dict[str, int]()
        if (facts := read_task_facts(folder)) is not None:
            max_length = facts.max_length
            for task, known in facts.tasks.items():
                if known.answer_tokens is None:
                    raise ModelError(
                        f"{folder.parent / 'tasks.json'} names no answer_tokens of {task!r}; remove it to go on "
                        "without."
                    )
                answer_tokens[task] = known.answer_tokens
        run = config_of_run(adapter)
        kind = cls(
            tokenizer=tokenizer,
            max_length=max_length,
            context=context_of(adapted.config),
            experts=_experts(adapted, folder),
            answer_tokens=answer_tokens,
            templates=_templates(prompts, folder, tokenizer, model=name),
            rouge=run.rouge if run else "all",
        )
        return adapted, kind, prompts

    @classmethod
    def load_bare(cls, model: str, *, dtype: str, device: str) -> tuple[PreTrainedModel, Writing]:
        """A base without an adapter, and how it answers.

        Raises:
            ModelError: it cannot be loaded.
        """
        base = load_base(model, dtype=dtype, device=device).eval()
        tokenizer = load_tokenizer(model)
        templates = {"": resolve_template("auto", tokenizer, model=model)}
        return base, cls(
            tokenizer=tokenizer, max_length=None, context=context_of(base.config), templates=templates
        )

    # ---- training

    @classmethod
    def resolve_prompts(cls, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TrainConfig:
        """See `TaskKind.resolve_prompts`: the same prompts on every day of the run and after it."""
        template = resolve_template(config.template, tokenizer, model=config.model)
        config = dataclasses.replace(config, template=template)
        if asks_date(tokenizer):
            config = dataclasses.replace(config, date=config.date or today())
            fix_date(tokenizer, config.date)
        return config

    def template_of(self, task: str) -> Template:
        """How instruction rows of a task are asked."""
        return self.template or self.templates.get(task) or self.templates.get("", "alpaca")

    def apply_template(self, data: TaskData) -> TaskData:
        """See `TaskKind.apply_template`."""
        return {
            task: [apply_template(row, self.template_of(task)) for row in rows] for task, rows in data.items()
        }

    @property
    def loss(self) -> Loss:
        """See `TaskKind.loss`."""
        return AnswerLoss()

    @property
    def known_tasks(self) -> Collection[str]:
        """See `TaskKind.known_tasks`."""
        return self.answer_tokens.keys()

    def longest_answer(self, task: str) -> int:
        """Tokens that an answer to a row of a task may have."""
        known = self.answer_tokens
        longest = max(known.values(), default=DEFAULT_ANSWER_TOKENS)
        return self.max_new_tokens or known.get(task) or longest

    def check_task(self, task: str) -> None:
        """Refuse a task that the adapter was not trained on, where its tasks are known.

        Raises:
            ConfigError: it is another one.
        """
        known = self.experts or self.answer_tokens
        if known and task not in known:
            raise ConfigError(f"Task {task!r} is unknown to this adapter; it knows {', '.join(known)}.")

    def expert(self, task: str | None) -> int | None:
        """The expert of `task`; `None` where the adapter has no task router.

        Raises:
            ConfigError: a task router and no task, or one that it does not know.
        """
        if self.experts is None:
            return None
        if task is None:
            raise ConfigError(f"This adapter routes by task: give --task, one of {', '.join(self.experts)}.")
        self.check_task(task)
        return self.experts[task]

    def load_base(self, config: TrainConfig) -> PreTrainedModel:
        """See `TaskKind.load_base`."""
        return load_base(
            config.model,
            dtype=config.dtype,
            device=config.device,
            attention=config.attention,
            quantize=config.quantize,
        )

    def encode(self, data: TaskData, *, vocabulary: int | None) -> list[EncodedTask]:
        """See `TaskKind.encode`."""
        return encode_tasks(
            self.apply_template(data),
            self.tokenizer,
            max_length=self.max_length or self.context or NO_LIMIT,
            context_length=self.context,
            loss_on=self.loss_on,
            vocabulary=vocabulary,
        )

    def mark(self, row: Encoded) -> object:
        """See `TaskKind.mark`: where the answer begins."""
        return row.prompt_length

    def unread(self, rows: Iterable[Example]) -> list[str]:
        """See `TaskKind.unread`."""
        return unread_note(rows, self.tokenizer)

    def facts(self, task: str) -> dict[str, Any]:
        """See `TaskKind.facts`."""
        return {"answer_tokens": self.answer_tokens[task]}

    def prompts(self, train: TaskData, *, date: str | None) -> PromptRecord | None:
        """See `TaskKind.prompts`."""
        assert self.max_length is not None
        return PromptRecord.of(
            self.apply_template(train),
            self.tokenizer,
            date=date,
            max_length=self.max_length,
            instructions=self.template or "alpaca",
        )

    # ---- use

    @classmethod
    def next_command(cls, adapter: str, *, task: str | None) -> str:
        """See `TaskKind.next_command`."""
        named = f" --task {shlex.quote(task)}" if task else ""
        return f"manylora predict --adapter {adapter}{named} 'your prompt'"

    def check(self, test: TaskData, *, vocabulary: int | None) -> list[str]:
        """See `TaskKind.check`."""
        self._check_experts(test)
        longest = self.max_length or NO_LIMIT
        cut = {
            task: sum(
                encode_prompt(row, self.tokenizer, max_length=longest, vocabulary=vocabulary)[1]
                for row in rows
            )
            for task, rows in self.apply_template(test).items()
        }
        if test:  # what cannot be scored shows with any answers
            self.judge(test, {task: [""] * len(rows) for task, rows in test.items()})
        return [*cut_lines(cut, test, self.max_length), *self.remarks(test)]

    def remarks(self, test: TaskData) -> list[str]:
        """See `TaskKind.remarks`."""
        return wordless(test, rouge=self.rouge)

    def predict(
        self,
        model: PeftModel | PreTrainedModel,
        data: TaskData,
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        on_cut: Callable[[str], None] = lambda line: None,
    ) -> dict[str, list[str]]:
        """See `TaskKind.predict`."""
        self._check_experts(data)
        data = self.apply_template(data)
        tasks = [task for task, rows in data.items() for _ in rows]

        def tell_cut(places: Sequence[int]) -> None:
            for line in cut_lines(Counter(tasks[place] for place in places), data, self.max_length):
                on_cut(line)

        answers = iter(
            generate_answers(
                model,
                self.tokenizer,
                [row for rows in data.values() for row in rows],
                batch_size=self.batch_size,
                max_length=self.max_length,
                max_new_tokens=[self.longest_answer(task) for task in tasks],
                expert_ids=None if self.experts is None else [self.experts[task] for task in tasks],
                on_progress=lambda done, _: on_progress(done),
                on_cut=tell_cut,
            )
        )
        return {task: list(islice(answers, len(rows))) for task, rows in data.items()}

    def judge(self, data: TaskData, answers: Mapping[str, Sequence[str]]) -> Scores:
        """See `TaskKind.judge`."""
        return score_all(self.apply_template(data), answers, tokenizer=self.tokenizer, rouge=self.rouge)

    def baselines(self, test: TaskData, *, source: str | None, limit: int | None) -> Baselines:
        """What a constant answer and a keyword rule reach on the embedded suite; empty on other rows, or some of it."""
        if source != EMBEDDED or limit is not None:
            return {}
        from manylora.data.suite import load_suite
        from manylora.data.suite.baselines import keyword_baseline, majority_baseline

        train, whole = load_suite("train", tasks=list(test)), load_suite("test", tasks=list(test))
        return {
            name: self.judge(
                whole, {task: learn(train[task]).predict(rows) for task, rows in whole.items()}
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


def _templates(
    prompts: PromptRecord | None, folder: Path, tokenizer: PreTrainedTokenizerBase, *, model: str
) -> dict[str, Template]:
    """How an adapter's instruction rows were asked, per task and, under "", of any other. Of a LoRA of another program
    nobody knows; adapters of our earlier versions without a record were asked in the Alpaca form."""
    if prompts is not None:
        return {task: prompts.instructions_of(task) for task in ("", *prompts.tasks)}
    foreign = read_settings(folder).get("peft_type") == "LORA"
    return {"": resolve_template("auto", tokenizer, model=model) if foreign else "alpaca"}


def _experts(model: PeftModel, folder: Path) -> dict[str, int] | None:
    """Task to expert under a task router, else `None`."""
    config = model.active_peft_config
    if not getattr(config, "routes_by_task", False):  # a plain LoRA's has no such thing
        return None
    if not config.task_names:
        raise ModelError(
            f"{folder} routes by task but does not name its tasks; add task_names to its adapter_config.json."
        )
    return {task: index for index, task in enumerate(config.task_names)}
