"""Messages survive the wire, damage does not; what rounding takes comes back with the next message."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.errors import WireError
from manylora.federated.compress import corrected, factor_products, multiply_factors, residual_of
from manylora.federated.parts import sent_as, truncated
from manylora.federated.wire import FORMATS, Format, Message, pack, payload_bytes, unpack


def message(**tensors: torch.Tensor) -> Message:
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return Message(kind="trained", client="ada", round=3, fields={"loss": 0.5}, tensors=named)


def random_matrices(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"l.A": torch.randn(4, 30), "l.B": torch.randn(20, 4) * 1e-3}


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_is_unpacked(format: Format) -> None:
    values = {**random_matrices(), "l.B0": torch.zeros(3, 2)}
    sent = Message(kind="trained", client="a/b ü", round=3, fields={"n": [1, "x", None]}, tensors=values)
    got = unpack(pack(sent, format))
    assert (got.kind, got.client, got.round, got.fields) == ("trained", "a/b ü", 3, {"n": [1, "x", None]})
    assert got.tensors.keys() == values.keys()
    for name, value in values.items():
        back = got.tensors[name]
        assert back.dtype == torch.float32
        error = (back - value).abs()
        if format == "fp32":
            assert torch.equal(back, value)
        elif format == "bf16":
            assert (error <= value.abs() * 2**-8).all()
        else:  # half a step of the component's own scale
            axis = 0 if name == "l.B" else 1
            assert (error <= value.abs().amax(axis, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_message_gives_the_same_bytes_and_the_counted_size(format: Format) -> None:
    values = random_matrices()
    data = pack(message(l__A=values["l.A"], l__B=values["l.B"]), format)
    assert data == pack(message(l__B=values["l.B"], l__A=values["l.A"]), format)
    header = int.from_bytes(data[4:8], "little")
    counted = sum(payload_bytes(tuple(v.shape), format, components=4) for v in values.values())  # type: ignore[arg-type]
    assert len(data) == 4 + 4 + header + counted + 4


@pytest.mark.parametrize("format", FORMATS)
def test_the_first_components_of_a_rounded_state_are_the_rounded_first_components(format: Format) -> None:
    values = random_matrices()
    whole = unpack(pack(message(l__A=values["l.A"], l__B=values["l.B"]), format)).tensors
    part = truncated(values, 2)
    sent = unpack(pack(message(l__A=part["l.A"], l__B=part["l.B"]), format)).tensors
    for name, value in truncated(whole, 2).items():
        assert torch.equal(sent[name], value)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_byte_is_noticed(position: int, change: int) -> None:
    data = bytearray(pack(message(l__A=random_matrices()["l.A"]), "int8"))
    data[position % len(data)] ^= change
    with pytest.raises(WireError):
        unpack(bytes(data))


def test_a_message_that_ends_early_is_noticed() -> None:
    data = pack(message(l__A=random_matrices()["l.A"]))
    for size in (0, 3, 11, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(WireError):
            unpack(data[:size])
    with pytest.raises(WireError):
        unpack(data + b"\0")


def forged(header: Any, body: bytes = b"") -> bytes:
    """A message with a right checksum and whatever header."""
    text = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    data = b"MLF1" + len(text).to_bytes(4, "little") + text + body
    return data + zlib.crc32(data).to_bytes(4, "little")


GOOD = {
    "kind": "trained",
    "client": "a",
    "round": 1,
    "fields": {},
    "format": "fp32",
    "tensors": [["l.A", [1, 2]]],
}


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": [["l.A", [1, 3]]]},
        {"tensors": [["l.A", [1, 1]]]},
        {"tensors": [["l.A", [1, 1]], ["l.A", [1, 1]]]},
        {"tensors": [["l.A", [-1, -2]]]},
        {"tensors": [["l.A", [2**40, 2**40]]]},
        {"tensors": [["l.A", [1, 2.0]]]},
        {"tensors": [["l.A", [2]]]},
        {"tensors": [[7, [1, 2]]]},
        {"tensors": "l.A"},
        {"format": "fp64"},
        {"format": ["fp32"]},
        {"round": "1"},
        {"round": True},
        {"client": None},
        {"fields": []},
        {"kind": 3},
    ],
)
def test_a_forged_header_is_refused(change: dict[str, Any]) -> None:
    assert unpack(forged(GOOD, bytes(8))).tensors["l.A"].shape == (1, 2)
    with pytest.raises(WireError):
        unpack(forged({**GOOD, **change}, bytes(8)))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b'"x"', b"\xff", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(WireError):
        unpack(forged(text))


def test_a_header_that_unpacks_to_more_than_memory_should_hold_is_refused() -> None:
    with pytest.raises(WireError):
        unpack(forged(b" " * (2**24 + 1)))


def test_what_is_not_finite_is_not_sent() -> None:
    with pytest.raises(WireError, match=r"l\.A holds NaN"):
        pack(message(l__A=torch.tensor([[1.0, float("nan")]])))


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_with_feedback_the_sum_of_what_arrived_is_the_sum_of_what_was_meant(format: Format) -> None:
    torch.manual_seed(1)
    residual: dict[str, torch.Tensor] = {}
    meant, arrived = torch.zeros(20, 4, dtype=torch.float64), torch.zeros(20, 4, dtype=torch.float64)
    plain = torch.zeros(20, 4, dtype=torch.float64)
    drift = torch.randn(20, 4) * 1e-3
    for _ in range(50):
        value = {"l.B": drift + torch.randn(20, 4) * 1e-5}
        values = corrected(value, residual)
        sent = unpack(pack(message(l__B=values["l.B"]), format)).tensors
        residual = residual_of(values, sent)
        meant += value["l.B"].double()
        arrived += sent["l.B"].double()
        plain += unpack(pack(message(l__B=value["l.B"]), format)).tensors["l.B"].double()
    # what is missing in the end is what the last message lost, not what fifty did
    torch.testing.assert_close(arrived + residual["l.B"].double(), meant, rtol=0, atol=1e-7)
    assert (arrived - meant).norm() < 0.25 * (plain - meant).norm()


def test_a_product_goes_as_its_factors_where_they_are_lighter() -> None:
    torch.manual_seed(0)
    b2, b1 = torch.randn(100, 2), torch.randn(2, 8)
    state = {"l.B2": b2, "l.B1": b1}
    product = {"l.dB": (b2.double() @ b1.double()).float()}
    assert sent_as("dB", layer=(100, 1), rank=2, intermediate=8) == ("B2", "B1")
    assert factor_products(product, own_rank=2, factors=state).keys() == {"l.B2", "l.B1"}
    torch.testing.assert_close(multiply_factors(factor_products(product, own_rank=2, factors=state)), product)
    torch.testing.assert_close(
        multiply_factors(factor_products(product, own_rank=2)), product, rtol=1e-4, atol=1e-5
    )
    assert sent_as("dB", layer=(100, 1), rank=8, intermediate=8) == ("dB",)
    assert factor_products(product, own_rank=8, factors=state).keys() == {"l.dB"}


def test_feedback_also_brings_back_what_a_smaller_rank_could_not_hold() -> None:
    """A corrected product may have a larger rank than its factors; the rest goes with the next messages."""
    torch.manual_seed(0)
    residual: dict[str, torch.Tensor] = {}
    meant, arrived = torch.zeros(100, 8), torch.zeros(100, 8)
    for _ in range(20):
        value = {"l.dB": torch.randn(100, 2) @ torch.randn(2, 8)}
        values = corrected(value, residual)
        light = factor_products(values, own_rank=2)
        sent = multiply_factors(
            unpack(pack(Message(kind="", client="", round=0, tensors=light), "int8")).tensors
        )
        residual = residual_of(values, sent)
        meant, arrived = meant + value["l.dB"], arrived + sent["l.dB"]
    torch.testing.assert_close(arrived + residual["l.dB"], meant, rtol=1e-4, atol=1e-4)
    assert residual["l.dB"].norm() < meant.norm()
