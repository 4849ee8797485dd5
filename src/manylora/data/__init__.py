"""The data room: files, the Hub and the embedded suite to rows, prompts, token ids and a training order.

The suite stands on its own floor, `manylora.data.suite`: generated text needs word lists and a file per task
family. Nothing here imports torch or transformers; `datasets` and `pyarrow` are imported by the call that
needs them.
"""

from manylora.data.examples import Example, Form, Message, TaskData
from manylora.data.formats import ACCEPTED_FORMS, parse_row
from manylora.data.mixing import STRATEGIES, Strategy, mixture_schedule, mixture_shares
from manylora.data.options import options_of, without_options
from manylora.data.partition import PARTITIONS, Partition, partition
from manylora.data.prompts import (
    IGNORED_LABEL,
    MIN_PROMPT_TOKENS,
    Encoded,
    LossOn,
    encode,
    encode_prompt,
    prompt_text,
    render_prompt,
)
from manylora.data.readers import SUPPORTED_SUFFIXES, Row
from manylora.data.sources import EMBEDDED, SPLITS, available_splits, data_root, load_examples
from manylora.data.splits import Splits, cut_validation, evenly, load_splits

__all__ = [
    "ACCEPTED_FORMS",
    "EMBEDDED",
    "IGNORED_LABEL",
    "MIN_PROMPT_TOKENS",
    "PARTITIONS",
    "SPLITS",
    "STRATEGIES",
    "SUPPORTED_SUFFIXES",
    "Encoded",
    "Example",
    "Form",
    "LossOn",
    "Message",
    "Partition",
    "Row",
    "Splits",
    "Strategy",
    "TaskData",
    "available_splits",
    "cut_validation",
    "data_root",
    "encode",
    "encode_prompt",
    "evenly",
    "load_examples",
    "load_splits",
    "mixture_schedule",
    "mixture_shares",
    "options_of",
    "parse_row",
    "partition",
    "prompt_text",
    "render_prompt",
    "without_options",
]
