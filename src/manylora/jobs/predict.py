"""Predict: prompts → answers of a trained adapter, as streams or all at once."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

from manylora.errors import ConfigError, DataError
from manylora.files import MOST_BYTES, parse_json, reason
from manylora.training.settings import AdapterAnswerSettings, ModelSettings, TemplateSettings

if TYPE_CHECKING:
    from manylora.data import Example, PromptRecord, TaskPrompts
    from manylora.jobs.progress import Progress


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ModelSettings, TemplateSettings, AdapterAnswerSettings):
    """What to answer, and with what."""

    adapter: str | None = None
    """Run folder or PEFT adapter folder."""
    input: str = ""
    """Text that the instruction is about, where there is one."""
    task: str | None = None
    """Task whose expert answers; needed by adapters with a task router, unless the rows name their task."""
    form: Literal["auto", "alpaca", "prompt", "chat"] = "auto"
    """Form of the prompt: an Alpaca instruction; as it stands; one turn of the user's in the chat template. auto: that
    of the adapter's training rows, else as --template says."""
    raw: bool = False
    """The same as --form prompt: give the prompt to the model as it stands."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw and self.form not in ("auto", "prompt"):
            raise ConfigError(
                f"--raw is --form prompt, but --form {self.form} was given; leave one of them out."
            )


_GZIP = b"\x1f\x8b"
"""How a gzip file begins."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote."""

    text: str
    expert: int | None
    """The expert that wrote it, under the task router, else `None`."""

    def __str__(self) -> str:
        return self.text


def predict(config: PredictConfig, prompts: Sequence[str], *, progress: Progress) -> list[Answer]:
    """Answer prompts, many at a time; the answers are those that `Predictor.stream` gives one by one.

    Raises:
        ModelError, DataError, ConfigError, RoutingError: what is wrong with the input.
    """
    from manylora.evaluation import generate_answers

    predictor = Predictor(config, progress=progress)
    questions = [predictor.question(text) for text in prompts]
    experts = [predictor.expert(question) for question in questions]
    answers = generate_answers(
        predictor.writer.model,
        predictor.kind.tokenizer,
        questions,
        max_length=predictor.kind.max_length,
        max_new_tokens=[predictor.kind.longest_answer(question.task) for question in questions],
        expert_ids=None if predictor.kind.experts is None else [int(one or 0) for one in experts],
        on_cut=lambda places: progress.show_warning(
            f"note: {len(places)} of {len(prompts)} prompts were cut"
        ),
    )
    return [Answer(text=text, expert=expert) for text, expert in zip(answers, experts, strict=True)]


class Predictor:
    """An adapter that answers.

    Args:
        config: which one, and how.
        progress: told where the form of a prompt is a guess.

    Raises:
        ModelError: unknown model, unknown adapter, or one that classifies.
        ConfigError: no adapter is given, or it was not trained on the task.
    """

    def __init__(self, config: PredictConfig, *, progress: Progress) -> None:
        from manylora.jobs.subject import load_writer

        if config.adapter is None:
            raise ConfigError("--adapter is missing; give a run folder, such as runs/train-001.")
        self.config, self._progress = config, progress
        self.writer = load_writer(
            config.adapter, model=config.model, dtype=config.dtype, device=config.device
        )
        self.kind = self.writer.kind.with_settings(
            source=config.adapter,
            template=None if config.template == "auto" else config.template,
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
        )
        if config.task is not None:
            self.kind.check_task(config.task)

    def question(self, text: str) -> Example:
        """The text in the form that was asked for, else in that of the adapter's training.

        Raises:
            ConfigError: the adapter's tasks were asked in different forms, and none is named.
        """
        from manylora.data import question

        return question(text, self._prompts(), input_text=self.config.input, task=self.config.task or "")

    def _prompts(self) -> TaskPrompts:
        """How to ask a text: by --form, else by --template, else as the adapter was trained."""
        from manylora.data import FORM_OF, TaskPrompts

        config, prompts = self.config, self.writer.prompts
        form = "prompt" if config.raw else config.form
        if form != "auto":
            return TaskPrompts(form=form)
        template = self.kind.template_of(config.task or "")
        asked = TaskPrompts(form=FORM_OF[template], instructions=template)
        if config.template != "auto":
            return asked
        known = prompts.prompts_of(config.task) if prompts else None
        if known is None:
            used = {"chat": "chat template", "alpaca": "Alpaca form", "none": "text as it stands"}[template]
            self._progress.show_warning(
                f"note: {config.adapter} does not say which form its training prompts had; the {used} is used "
                "(--form chat or alpaca, or --form prompt for the text as it stands)"
            )
        return known or asked

    def read_rows(self, lines: Iterable[bytes], *, source: str) -> Iterator[tuple[dict[str, Any], Example]]:
        """Rows of a JSONL file one by one; see `parse_rows`."""
        from manylora.data import apply_template

        for row, example in parse_rows(
            lines, source=source, asked=self.config.task, prompts=self.writer.prompts
        ):
            yield row, apply_template(example, self.kind.template_of(example.task))

    def expert(self, example: Example) -> int | None:
        """The expert that answers a row; see `Writing.expert`."""
        return self.kind.expert(self.config.task or example.task or None)

    def stream(self, example: Example, *, on_cut: Callable[[int], None]) -> Iterator[str]:
        """The answer as it is generated, piece by piece.

        Args:
            example: a row.
            on_cut: told the tokens that are left of a prompt that is too long.
        """
        from manylora.evaluation import stream_answer

        return stream_answer(
            self.writer.model,
            self.kind.tokenizer,
            example,
            max_new_tokens=self.kind.longest_answer(example.task),
            max_length=self.kind.max_length,
            on_cut=on_cut,
            expert_id=self.expert(example),
        )


def parse_rows(
    lines: Iterable[bytes], *, source: str, asked: str | None = None, prompts: PromptRecord | None = None
) -> Iterator[tuple[dict[str, Any], Example]]:
    """Rows of a JSONL file one by one, so that answers flow while a pipe is still being written.

    Args:
        lines: of the file.
        source: its name, for errors.
        asked: task of the rows that name none.
        prompts: how the prompts of the training were made.

    Raises:
        DataError: a line is no row.
    """
    from manylora.data import Row, parse_row

    for number, line in enumerate(lines, start=1):
        place = f"{source}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = parse_json(text, finite=False) if text else None
        except ValueError as error:
            zipped = (
                " It is gzip: name the file so that it ends in .gz, or unzip it." if line[:2] == _GZIP else ""
            )
            raise DataError(
                f"{place} is not valid JSON ({reason(error)}); write one object per line, in UTF-8.{zipped}"
            ) from error
        if not text:
            continue
        if not isinstance(row, dict):
            raise DataError(f"{place} is no object but {text[:40]!r}; write one object per line.")
        task = str(row.get("task") or asked or "")
        example = parse_row(Row(fields=row, place=place), task=task, require_output=False)
        thinks = prompts is not None and prompts.thinks(task)
        yield row, dataclasses.replace(example, thinks=thinks)


def read_lines(name: str, *, stream: IO[bytes] | None = None) -> Iterator[bytes]:
    """The lines of a stream, or of the file `name`, unzipped where that ends in .gz, as files of data are.

    Raises:
        DataError: a line is too long, or the file is no whole gzip file.
    """
    with contextlib.ExitStack() as open_files:
        source: Any = stream
        if source is None:
            source = open_files.enter_context(
                (gzip.open if name.lower().endswith(".gz") else open)(name, "rb")
            )
        try:
            while line := source.readline(MOST_BYTES + 1):
                if len(line) > MOST_BYTES:
                    raise DataError(f"{name} has a line of more than {MOST_BYTES:,} bytes; split it.")
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{name} is not a whole gzip file ({error}). Write it again.") from error
