"""The data room: files, the Hub and the embedded suite to rows, prompts, token ids and a training order.

The suite stands on its own floor, `manylora.data.suite`: generated text needs word lists and a file per task
family. Nothing here imports torch or transformers; `datasets` and `pyarrow` are imported by the call that
needs them.
"""

from typing import TYPE_CHECKING, Any

from manylora.data.examples import Example, Form, Message, TaskData, Words
from manylora.data.fields import ACCEPTED_FORMS
from manylora.data.formats import parse_row
from manylora.data.instructions import (
    FORM_OF,
    Template,
    TemplateChoice,
    apply_template,
    check_template,
    resolve_template,
)
from manylora.data.mixing import MIXINGS, Mixing, mixture_schedule, mixture_shares
from manylora.data.notes import DataNotes, listed
from manylora.data.options import options_of, without_options
from manylora.data.partition import PARTITIONS, Partition, partition
from manylora.data.prompts import (
    IGNORED_LABEL,
    MIN_PROMPT_TOKENS,
    Encoded,
    LossOn,
    answer_text,
    check_token_rows,
    closing_text,
    encode,
    encode_prompt,
    prompt_text,
    render_prompt,
    without_closing,
)
from manylora.data.readers import SUPPORTED_SUFFIXES, Row
from manylora.data.sampling import missing_tasks, sample_rows, sample_tasks, single_answers
from manylora.data.sources import EMBEDDED, SPLITS, available_splits, load_examples
from manylora.data.splits import Splits, cut_validation, load_splits
from manylora.data.templates import asks_date, check_date, fix_date, today, unread_fields, unread_note

if TYPE_CHECKING:
    from manylora.data.record import PROMPTS_FILE, PromptRecord, TaskPrompts, find_prompts, question

_RECORD = ("PROMPTS_FILE", "PromptRecord", "TaskPrompts", "find_prompts", "question")
"""Imported on first use: no --help needs pydantic, a third of its time."""

__all__ = [
    "ACCEPTED_FORMS",
    "EMBEDDED",
    "FORM_OF",
    "IGNORED_LABEL",
    "MIN_PROMPT_TOKENS",
    "MIXINGS",
    "PARTITIONS",
    "PROMPTS_FILE",
    "SPLITS",
    "SUPPORTED_SUFFIXES",
    "DataNotes",
    "Encoded",
    "Example",
    "Form",
    "LossOn",
    "Message",
    "Mixing",
    "Partition",
    "PromptRecord",
    "Row",
    "Splits",
    "TaskData",
    "TaskPrompts",
    "Template",
    "TemplateChoice",
    "Words",
    "answer_text",
    "apply_template",
    "asks_date",
    "available_splits",
    "check_date",
    "check_template",
    "check_token_rows",
    "closing_text",
    "cut_validation",
    "encode",
    "encode_prompt",
    "find_prompts",
    "fix_date",
    "listed",
    "load_examples",
    "load_splits",
    "missing_tasks",
    "mixture_schedule",
    "mixture_shares",
    "options_of",
    "parse_row",
    "partition",
    "prompt_text",
    "question",
    "render_prompt",
    "resolve_template",
    "sample_rows",
    "sample_tasks",
    "single_answers",
    "today",
    "unread_fields",
    "unread_note",
    "without_closing",
    "without_options",
]


def __getattr__(name: str) -> Any:
    if name in _RECORD:
        from manylora.data import record

        return getattr(record, name)
    raise AttributeError(f"module 'manylora.data' has no attribute {name!r}")
