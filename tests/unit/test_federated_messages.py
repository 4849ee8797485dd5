"""What comes from the other side is read in one place: every field, no more bytes than were asked for, no raw words."""

from __future__ import annotations

import math
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from manylora.errors import AnswerError, RunError, WireError
from manylora.federated import Message, pack, unpack
from manylora.federated.faults import FailedError, Fault, clean_text, fault_named, fault_of, shown
from manylora.federated.messages import read_scored
from manylora.federated.wire import JOINING, Bounds

ESCAPE = "\x1b[2J\x1b]0;owned\x07\r\nround 9/9  loss 0.000\u202e"

ROW = {
    "task": "swap", "metric": "rouge1", "score": 50.0, "standard_error": None, "n": 2,
    "metrics": {"rouge1": {"mean": 50.0, "standard_error": 1.0, "n": 2}},
}  # fmt: skip


def scored(scores: Any) -> Message:
    return Message(kind="scored", client="bob", round=2, fields={"scores": scores})


@pytest.mark.parametrize(
    "change",
    [
        {"score": 1e308}, {"score": math.inf}, {"score": math.nan}, {"score": -5}, {"score": 100.1}, {"score": "50"},
        {"score": 10**400}, {"score": True}, {"score": None}, {"score": 51.0}, {"n": 0}, {"n": -1}, {"n": 2.0},
        {"n": 10**400}, {"n": 3}, {"standard_error": -1}, {"standard_error": "0"}, {"standard_error": math.nan},
        {"metric": "exact_match"}, {"metric": ESCAPE}, {"metric": None}, {"metrics": {}}, {"metrics": []},
        {"metrics": {"rouge1": 50.0}}, {"metrics": {"rouge1": {"mean": 50.0}}}, {"task": ""}, {"task": 7},
        {"metrics": {"rouge1": {"mean": 50.0, "standard_error": 1.0, "n": 2}, ESCAPE: {}}}, {"extra": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_score_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    assert read_scored(scored([ROW]), name="bob")[0].score == 50
    with pytest.raises(AnswerError):
        read_scored(scored([{**ROW, **change}]), name="bob")


@pytest.mark.parametrize("scores", [None, {}, "swap", [None], [[]], [ROW, ROW], [{}]], ids=str)
def test_scores_that_are_no_rows_of_tasks_are_refused(scores: Any) -> None:
    with pytest.raises(AnswerError):
        read_scored(scored(scores), name="bob")


def test_a_task_may_be_called_anything_and_is_shown_on_one_line() -> None:
    (row,) = read_scored(scored([{**ROW, "task": f"swap{ESCAPE}{'x' * 1000}"}]), name="bob")
    assert row.task.startswith("swap?[2J?]0;owned?  round 9/9")
    assert row.task.isprintable()
    assert len(row.task) == 200
    assert read_scored(Message(kind="scored", client="bob", round=2), name="bob") == ()


# ---- bytes


def forged(header: bytes, body: bytes = b"") -> bytes:
    """A message with a right checksum and whatever header."""
    text = zlib.compress(header, 9)
    data = b"MLF1" + len(text).to_bytes(4, "little") + text + body
    return data + zlib.crc32(data).to_bytes(4, "little")


def peak_of(action: Callable[[], object]) -> int:
    """Bytes that Python and numpy held at most in between."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


EXPECTED = {f"model.layers.{n}.q.B": (64, 8) for n in range(8)}
BOUNDS = Bounds.of(EXPECTED, "int8")


@pytest.mark.parametrize(
    ("data", "bounds", "least"),
    [
        (lambda: forged(b'{"kind":' + b"[" * 900 + b"]" * 900 + b"}" + bytes(0)), BOUNDS, 0),
        (lambda: forged(b" " * 2**24), BOUNDS, 0),
        (lambda: forged(b"[" + b"{}," * (2**22) + b"{}]"), BOUNDS, 0),
        (lambda: forged(b'[{"a":[]}' + b',{"a":[]}' * (2**18) + b"]"), JOINING, 0),
        (lambda: forged(b"[" + b"{}," * (2**22) + b"{}]"), None, 0),
        (lambda: forged(b"{}", bytes(2**25)), BOUNDS, 2**25),
        (lambda: pack(Message(kind="trained", client="a", round=1, tensors={"q.B": torch.ones(2**11, 2**10)})),
         BOUNDS, 2**23),
        (lambda: pack(Message(kind="joined", client="a", round=1, tensors={"q.B": torch.ones(2, 2)})), JOINING, 0),
    ],
)  # fmt: skip
def test_nothing_is_unpacked_that_is_larger_than_what_was_asked_for(
    data: Callable[[], bytes], bounds: Bounds | None, least: int
) -> None:
    """Each of these took hundreds of megabytes where kilobytes were asked for."""
    message = data()
    assert len(message) >= least

    def read() -> None:
        with pytest.raises(WireError):
            unpack(message, bounds)

    assert peak_of(read) < (2**26 if bounds is None else 2**24 if bounds is JOINING else 2**20)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_an_honest_answer_fits_its_bounds(format: Any) -> None:
    torch.manual_seed(0)
    names = [*EXPECTED, "größe.\U0001f600.B"]
    tensors = {name: torch.randn(64, 8) for name in names}
    fields = {
        "version": 2**53,
        "examples": 2**53,
        "loss": math.pi,
        "steps": 2**53,
        "moved": math.e,
    }
    message = Message(kind="trained", client="x" * 200, round=2**31, fields=fields, tensors=tensors)
    bounds = Bounds.of(dict.fromkeys(names, (64, 8)), format)
    assert unpack(pack(message, format), bounds).tensors.keys() == tensors.keys()


def test_the_largest_of_honest_joins_fits_its_bounds() -> None:
    layers = {f"model.layers.{n // 400}.mlp.experts.{n % 400}.down_proj": [7168, 2048] for n in range(40_000)}
    fields = {"examples": 10**7, "base": "0" * 64, "layers": layers}
    data = pack(Message(kind="joined", client="ada", round=0, fields=fields))
    assert unpack(data, JOINING).fields["layers"] == layers


# ---- words


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("a\nb\tc\u2028d", "a b c d"),
        ("\x1b[31mred\x07\x00", "?[31mred??"),
        ("right\u202eleft", "right?left"),
        ("\ud800", "?"),
        ("größe 長 😀", "größe 長 😀"),
        ("x" * 300, "x" * 199 + "…"),
        (7, "7"),
    ],
)
def test_text_from_elsewhere_becomes_one_short_line(text: object, clean: str) -> None:
    assert clean_text(text) == clean


@pytest.mark.parametrize(
    "value",
    [10**5000, [[[[[1] * 9] * 9] * 9] * 9], "x" * 10**6, {"a": 10**5000}, b"\x00" * 99],
    ids=["number", "lists", "text", "dict", "bytes"],
)
def test_any_value_can_be_shown(value: object) -> None:
    assert len(shown(value)) <= 60


def test_errors_have_codes_and_codes_have_words() -> None:
    from manylora.errors import ConfigError, DataError, ModelError
    from manylora.federated.home import DamagedStateError, MissingStateError

    class NonFiniteError(RunError):
        """As training raises it."""

    errors: list[tuple[BaseException, Fault]] = [
        (DataError("x"), Fault.DATA), (ModelError("x"), Fault.MODEL), (ConfigError("x"), Fault.SETTINGS),
        (NonFiniteError("x"), Fault.NOT_FINITE), (MissingStateError("x"), Fault.STATE_MISSING),
        (DamagedStateError("x"), Fault.STATE_DAMAGED), (MemoryError(), Fault.MEMORY), (OSError(28, "x"), Fault.DISK),
        (torch.OutOfMemoryError("x"), Fault.MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), Fault.MEMORY),
        (WireError("x"), Fault.MESSAGE), (KeyError("x"), Fault.OTHER), (RuntimeError("x"), Fault.OTHER),
    ]  # fmt: skip
    for error, fault in errors:
        assert fault_of(error) is fault
        assert fault_named(fault.value) is fault
    assert len({fault.words for fault in Fault}) == len(Fault)
    for code in ("unheard-of", None, 7, [], ESCAPE):
        assert fault_named(code) is Fault.OTHER
    assert FailedError(Fault.DATA).fault is Fault.DATA
