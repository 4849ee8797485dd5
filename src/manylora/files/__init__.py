"""The files room: read what may be damaged or hostile, write what must be whole, and tell one from the other.

Everything that this package reads back or takes from a stranger (run folders, settings, studies, adapters' settings)
passes here; what it writes into a run folder does, too.
"""

from typing import TYPE_CHECKING, Any

from manylora.files.reading import (
    MOST_BYTES,
    check_plain,
    dump_yaml,
    lone_surrogate,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
    reason,
    whole_number,
)
from manylora.files.settings import build_config, check_types, check_values
from manylora.files.sums import COMPLETE, NOTES, changed_file, check_noted, file_sum, folder_sums, noted
from manylora.files.writing import (
    append_line,
    json_text,
    locked,
    make_folder,
    open_own,
    refuse_links,
    remove,
    without_nan,
    write_bytes,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from manylora.files.records import (
        NanFloat,
        Record,
        Several,
        check_record,
        forgive_lines,
        forgive_record,
        read_object,
        read_record,
    )

_RECORDS = (
    "NanFloat",
    "Record",
    "Several",
    "check_record",
    "forgive_lines",
    "forgive_record",
    "read_object",
    "read_record",
)
"""Imported on first use: no --help needs pydantic, a third of its time."""

__all__ = [
    "COMPLETE",
    "MOST_BYTES",
    "NOTES",
    "NanFloat",
    "Record",
    "Several",
    "append_line",
    "build_config",
    "changed_file",
    "check_noted",
    "check_plain",
    "check_record",
    "check_types",
    "check_values",
    "dump_yaml",
    "file_sum",
    "folder_sums",
    "forgive_lines",
    "forgive_record",
    "json_text",
    "locked",
    "lone_surrogate",
    "make_folder",
    "noted",
    "open_own",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_object",
    "read_record",
    "read_yaml",
    "reason",
    "refuse_links",
    "remove",
    "whole_number",
    "without_nan",
    "write_bytes",
    "write_json",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name in _RECORDS:
        from manylora.files import records

        return getattr(records, name)
    raise AttributeError(f"module 'manylora.files' has no attribute {name!r}")
