"""Every message, mutated anywhere: it still means what it may mean, or it is refused; nothing else is raised, nothing
large is held."""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import federation
from manylora.data import Example
from manylora.errors import AnswerError, RunError, WireError
from manylora.evaluation.scores import Estimate
from manylora.federated import Client, ClientData, FederateConfig, Message, pack, unpack
from manylora.federated.check import Member, check_answer, check_joined, expected_shapes, update_limits
from manylora.federated.faults import Fault
from manylora.federated.home import VersionedState
from manylora.federated.messages import read_scored
from manylora.federated.server_state import load_state
from manylora.federated.strategies import FED_ALORA
from manylora.federated.wire import FORMATS, JOINING, SCORING, Bounds

SHAPES = {f"model.layers.{n}.q_proj": (12, 10) for n in range(3)}
CONFIG = FederateConfig(r=2, learning_rate=0.01, local_steps=10, batch_size=8, wire="int8").resolved()
MEMBER = Member(name="ada", examples=80, rank=2)
EXPECTED = expected_shapes(FED_ALORA, SHAPES, rank=2, intermediate=2)
LIMITS = update_limits(FED_ALORA, CONFIG, member=MEMBER, round=4)
BOUNDS = Bounds.of(EXPECTED, "int8")

torch.manual_seed(0)
JOINED = Message(
    kind="joined", client="ada", round=0,
    fields={"examples": 80, "base": "0123abcd", "layers": {name: list(shape) for name, shape in SHAPES.items()}},
)  # fmt: skip
TRAINED = Message(
    kind="trained", client="ada", round=4,
    fields={"version": 3, "examples": 80, "loss": 1.5, "steps": 10, "moved": 0.7},
    tensors={name: 0.01 * torch.randn(shape) for name, shape in EXPECTED.items()},
)  # fmt: skip
SCORED = Message(
    kind="scored", client="ada", round=5,
    fields={"scores": [
        {"task": task, "metric": "rouge1", "score": 50.0, "standard_error": 2.0, "n": 9,
         "metrics": {"rouge1": {"mean": 50.0, "standard_error": 2.0, "n": 9},
                     "exact_match": {"mean": 0.0, "standard_error": None, "n": 9}}}
        for task in ("swap", "last_word")
    ]},
)  # fmt: skip
FAILED = Message(kind="failed", client="ada", round=4, fields={"code": "memory"})

WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.floats(0, 100),
    st.sampled_from([10**400, -(10**400), 2**53 + 1, 2**63, 1e308, -1e308, math.nan, math.inf, -0.0, 5e-324]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["\x1b[2J", "x" * 3000, "\ud800", "int8", "fp32", "joined", "ada"]),
    st.lists(st.integers(0, 20), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
    st.builds(lambda: [[[[[[]]]]]]),
)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value within a JSON value."""
    yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*here, index))


def parts_of(data: bytes) -> tuple[Any, bytes]:
    """Header and payload of a message."""
    end = 8 + int.from_bytes(data[4:8], "little")
    return json.loads(zlib.decompress(data[8:end])), data[end:-4]


def forged(header: Any, payload: bytes, *, size: int | None = None) -> bytes:
    """A message with a right checksum and whatever header and payload."""
    text = zlib.compress(json.dumps(header).encode(errors="surrogatepass"))
    data = b"MLF1" + (len(text) if size is None else size).to_bytes(4, "little") + text + payload
    return data + zlib.crc32(data).to_bytes(4, "little")


@st.composite
def mutated(draw: st.DrawFn, message: Message) -> bytes:
    """The bytes of a message, some things of which are something else; the checksum is right."""
    header, payload = parts_of(pack(message, draw(st.sampled_from(("int8", "int8", "int8", *FORMATS)))))
    for _ in range(draw(st.integers(0, 2))):
        there = [place for place in places(header) if place] or [("kind",)]
        fields = [place for place in there if place[0] == "fields" and len(place) > 1]
        *inside, last = draw(st.sampled_from(fields if fields and draw(st.booleans()) else there))
        around = header
        for key in inside:
            around = around[key]
        kind = draw(st.sampled_from(["replace", "remove", "add", "double"]))
        if kind == "replace":
            around[last] = draw(WEIRD)
        elif kind == "remove":
            del around[last]
        elif isinstance(around, dict):
            around[draw(st.text(max_size=5))] = (
                copy.deepcopy(around[last]) if kind == "double" else draw(WEIRD)
            )
        else:
            around.insert(last, copy.deepcopy(around[last]) if kind == "double" else draw(WEIRD))
    if payload and draw(st.integers(0, 2)) == 0:
        cut = draw(st.integers(0, len(payload)))
        more = draw(st.binary(max_size=16))
        payload = draw(
            st.sampled_from(
                [payload[:cut], payload + more, payload[:cut] + more + payload[cut + len(more) :]]
            )
        )
    size = draw(st.none() | st.sampled_from([0, 1, 2**31, 2**32 - 1]))
    return forged(header, payload, size=size)


def accepted(read: Callable[[], Any], *, most: int = 2**22) -> Any:
    """What is read, None where it is refused in a short line; at most so many bytes are held meanwhile."""
    found, line = None, ""
    tracemalloc.start()
    try:
        found = read()
    except (AnswerError, WireError) as error:
        line = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    event("accepted" if not line else "refused")
    assert len(line) < 400
    assert peak < most
    return found


FUZZ = settings(max_examples=300, deadline=None)


@FUZZ
@given(data=mutated(JOINED) | mutated(FAILED) | mutated(TRAINED))
def test_whatever_joins_has_a_base_and_rows_or_does_not_join(data: bytes) -> None:
    found = accepted(lambda: check_joined(unpack(data, JOINING), name="ada", max_examples=1000))
    if found is not None:
        examples, base, shapes = found
        assert 1 <= examples <= 1000
        assert base.isprintable()
        assert 0 < len(base) <= 200
        assert shapes
        for layer, shape in shapes.items():
            assert layer.isprintable()
            assert all(type(size) is int and size > 0 for size in shape)


@FUZZ
@given(data=mutated(TRAINED) | mutated(JOINED) | mutated(FAILED))
def test_whatever_was_trained_is_as_large_as_training_or_does_not_count(data: bytes) -> None:
    checked = accepted(
        lambda: check_answer(
            unpack(data, BOUNDS), member=MEMBER, round=4, version=3, expected=EXPECTED, strategy=FED_ALORA,
            limits=LIMITS,
        )
    )  # fmt: skip
    if checked is not None:
        assert checked.update.keys() == EXPECTED.keys()
        for name, value in checked.update.items():
            assert tuple(value.shape) == EXPECTED[name]
            assert float(value.double().square().mean().sqrt()) <= LIMITS["B"]
        assert 0 <= checked.loss <= 1e6
        assert math.isfinite(checked.norm)


@FUZZ
@given(data=mutated(SCORED) | mutated(FAILED))
def test_whatever_was_scored_is_a_score_or_is_not_shown(data: bytes) -> None:
    for score in accepted(lambda: read_scored(unpack(data, SCORING), name="ada")) or ():
        assert score.task.isprintable()
        main = Estimate(mean=score.score, standard_error=score.standard_error, n=score.n)
        for estimate in (main, *score.metrics.values()):
            assert 0 <= estimate.mean <= 100
            assert estimate.n >= 1
            assert math.isnan(estimate.standard_error) or 0 <= estimate.standard_error <= 100


@FUZZ
@given(data=st.binary(max_size=200), header=st.binary(max_size=100), size=st.integers(0, 2**32 - 1))
def test_any_bytes_are_no_message(data: bytes, header: bytes, size: int) -> None:
    for text in (header, zlib.compress(header)):
        body = b"MLF1" + size.to_bytes(4, "little") + text
        for message in (data, body, body + zlib.crc32(body).to_bytes(4, "little")):
            with pytest.raises(WireError):
                unpack(message, BOUNDS)


@pytest.fixture(scope="module")
def client(
    tiny_base: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Client, list[Message]]:
    """A client whose rows cannot be used, so that an order that it accepts costs no training; and orders for it."""
    config = federation.settings(tiny_base, small_data, local_steps=1)
    bench = federation.bench_for(config)
    rows = {"task": [Example(task="task", instruction="x", output="")]}
    ada = Client("ada", ClientData(train=rows), home=tmp_path_factory.mktemp("home"), bench=bench)
    shared = {f"{name}.B": torch.zeros(out, 4) for name, (out, _) in bench.shapes.items()}
    fields = {"settings": config.for_clients(), "rank": 4, "version": 0}
    orders = [
        Message(kind="join", client="ada", round=0, fields={"settings": config.for_clients()}),
        Message(kind="train", client="ada", round=1, fields=fields, tensors=shared),
        Message(kind="score", client="ada", round=2, fields=fields, tensors=shared),
    ]
    codes = [unpack(ada.handle(pack(order))).fields.get("code") for order in orders]
    assert codes == [None, "data", "data"]
    return ada, orders


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_whatever_a_server_orders_is_answered_with_what_was_asked_for_or_a_code(
    draw: st.DataObject, client: tuple[Client, list[Message]]
) -> None:
    ada, orders = client
    answer = unpack(ada.handle(draw.draw(mutated(draw.draw(st.sampled_from(orders))))))
    assert answer.client == "ada"
    event(str(answer.fields.get("code")))
    if answer.kind == "failed":
        assert answer.fields.keys() == {"code"}
        assert Fault(answer.fields["code"]) in (
            Fault.MESSAGE, Fault.SETTINGS, Fault.STATE_MISSING, Fault.DATA,
        )  # fmt: skip
    else:
        assert answer.kind == "joined"
        assert answer.fields["examples"] == 1


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 10**6), bit=st.integers(0, 7), length=st.integers(0, 10**6), how=st.integers(0, 2)
)
def test_no_bit_of_a_round_on_disk_can_flip_unnoticed(
    position: int, bit: int, length: int, how: int, tmp_path: Path
) -> None:
    store = VersionedState(tmp_path)
    facts = {"counted": {"ada": 1}, "members": {"ada": [20, 4]}, "shapes": {"q": [4, 3]}, "base": "abc"}
    store.write(1, {"q.B": torch.arange(16.0).reshape(4, 4)}, facts)
    data = bytearray(store.file(1).read_bytes())
    if how == 0:
        data[position % len(data)] ^= 1 << bit
    elif how == 1:
        del data[length % len(data) :]
    else:
        data[position % len(data) : position % len(data)] = bytes(1 + length % 8)
    store.file(1).write_bytes(bytes(data))
    with pytest.raises(RunError, match="damaged"):
        load_state(store)
