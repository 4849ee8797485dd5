"""Messages as bytes: a plain framing of our own that nothing in it can execute, in three number formats.

    4 bytes   "MLF1"
    4 bytes   length H of the header, little-endian
    H bytes   header: zlib-compressed JSON (kind, client, round, fields, name and shape of every matrix)
    the rest  the matrices one after the other; int8 ones after their scales (float32)
    4 bytes   CRC-32 of all before

Formats: fp32; bf16; int8 with one float32 scale for each rank component, that is each row of an A (K, D) and each
column of a B (O, K): per row of a B, the scales would weigh half as much as the numbers. So the first components of
a rounded matrix are the rounded first components, and a client may be sent those alone.

Whoever asks knows how large an answer can be; `Bounds` says so before a byte of it is unpacked.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from manylora.errors import WireError
from manylora.federated.parts import State, component_axis

Format: TypeAlias = Literal["fp32", "bf16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)

_MAGIC = b"MLF1"
_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Message:
    """What server and client say to each other."""

    kind: str
    client: str
    round: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON values."""
    tensors: State = field(default_factory=dict)
    """Float32 matrices on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a message may take at most. The default is for one whose reader cannot know what is coming."""

    header: int = 2**24
    """Bytes of the header once it is unpacked; 16 MiB name some 100,000 matrices."""
    values: int = 2**20
    """JSON values in it, as each costs some 100 bytes of memory, however short it is written."""
    payload: int | None = None
    """Bytes of all matrices; None: as many as came."""

    @classmethod
    def of(cls, expected: Mapping[str, tuple[int, int]], format: Format) -> Bounds:
        """For an answer with these matrices, by name and shape, and a few numbers."""
        return cls(
            header=4096
            + sum(6 * len(name) + 64 for name in expected),  # JSON may write a letter as six bytes
            values=256 + 8 * len(expected),
            payload=sum(_size(name, shape, format) for name, shape in expected.items()),
        )

    @property
    def message(self) -> int | None:
        """Bytes of the whole message."""
        # What cannot be compressed grows by a few bytes in 16 KiB.
        return None if self.payload is None else 64 + self.header + self.header // 1024 + self.payload


JOINING = Bounds(header=2**22, values=2**18, payload=0)
"""For the names and sizes of some 50,000 layers, which a server that has no base of its own cannot know."""
SCORING = Bounds(header=2**20, values=2**17, payload=0)
"""For the scores of some 2,000 tasks."""


def pack(message: Message, format: Format = "fp32") -> bytes:
    """The bytes of a message; the same message gives the same bytes.

    Raises:
        WireError: a value is not finite.
    """
    specs, chunks = [], []
    for name in sorted(message.tensors):
        value = message.tensors[name].detach().to("cpu", torch.float32)
        if not torch.isfinite(value).all():
            raise WireError(f"{name} holds NaN or infinity; training diverged, lower the learning rate.")
        specs.append([name, list(value.shape)])
        chunks.append(_encode(value, format, component_axis(name)))
    header = {
        "kind": message.kind,
        "client": message.client,
        "round": message.round,
        "fields": dict(message.fields),
        "format": format,
        "tensors": specs,
    }
    plain = json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False)
    text = zlib.compress(plain.encode(errors="surrogatepass"), 6)  # a task may be called anything
    body = b"".join((_MAGIC, len(text).to_bytes(4, "little"), text, *chunks))
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(data: bytes, bounds: Bounds | None = None) -> Message:
    """The message in these bytes, its matrices in float32.

    Args:
        data: what came.
        bounds: what it may take; nothing is unpacked that takes more. Default: `Bounds()`.

    Raises:
        WireError: truncated, changed on the way, too large, or no message of this version.
    """
    bounds = bounds or Bounds()
    if bounds.message is not None and len(data) > bounds.message:
        raise WireError(f"a message of {len(data):,} bytes where at most {bounds.message:,} were asked for")
    if len(data) < 12 or data[:4] != _MAGIC:
        raise WireError(f"{len(data)} bytes are no message of this version of manylora (no {_MAGIC!r} first)")
    view = memoryview(data)
    if zlib.crc32(view[:-4]).to_bytes(4, "little") != data[-4:]:
        raise WireError(f"the {len(data)} bytes of a message were cut short or changed on the way")
    start = 8 + int.from_bytes(data[4:8], "little")
    payload = len(data) - 4 - start
    if payload < 0 or (bounds.payload is not None and payload > bounds.payload):
        raise WireError(f"a message with {payload:,} bytes of matrices, at most {bounds.payload} are due")
    header = _header(view[8:start], bounds)
    try:
        kind, client, number = header["kind"], header["client"], header["round"]
        fields, format, specs = header["fields"], header["format"], header["tensors"]
    except KeyError as error:
        raise WireError(f"a message without {error} in its header") from error
    right = isinstance(kind, str) and isinstance(client, str) and isinstance(fields, dict)
    if not right or type(number) is not int or format not in FORMATS or not isinstance(specs, list):
        raise WireError("a message whose header has values of the wrong type")
    tensors = _decode_all(view[start:-4], specs, format)
    return Message(kind=kind, client=client, round=number, fields=fields, tensors=tensors)


def payload_bytes(shape: tuple[int, int], format: Format, *, components: int) -> int:
    """Bytes of one matrix without its share of the header.

    Args:
        shape: of the matrix.
        format: its number format.
        components: rank components, each of which has a scale in int8.
    """
    return math.prod(shape) * _BYTES[format] + (4 * components if format == "int8" else 0)


def _size(name: str, shape: tuple[int, int], format: Format) -> int:
    return payload_bytes(shape, format, components=shape[component_axis(name)])


def _encode(value: Tensor, format: Format, axis: int) -> bytes:
    value = value.contiguous()
    if format == "fp32":
        return value.numpy().astype("<f4", copy=False).tobytes()
    if format == "bf16":
        return value.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    scale = value.abs().amax(dim=1 - axis, keepdim=True) / 127
    steps = torch.where(scale > 0, value / scale, torch.zeros_like(value)).round().clamp(-127, 127)
    return scale.numpy().astype("<f4", copy=False).tobytes() + steps.to(torch.int8).numpy().tobytes()


def _decode(data: memoryview, shape: tuple[int, int], format: str, axis: int) -> Tensor:
    if format == "fp32":
        return torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).astype(np.float32))
    if format == "bf16":
        bits = torch.from_numpy(np.frombuffer(data, "<i2").reshape(shape).astype(np.int16))
        return bits.view(torch.bfloat16).float()
    scales = np.frombuffer(data[: 4 * shape[axis]], "<f4").astype(np.float32)
    steps = np.frombuffer(data[4 * shape[axis] :], np.int8).reshape(shape).astype(np.float32)
    return torch.from_numpy(steps * (scales[None, :] if axis else scales[:, None]))


def _header(text: memoryview, bounds: Bounds) -> dict[str, Any]:
    unzip = zlib.decompressobj()
    try:
        plain = unzip.decompress(text, bounds.header)
        if unzip.unconsumed_tail or unzip.unused_data or not unzip.eof:
            raise WireError(f"a message's header is cut or larger than {bounds.header:,} bytes")
        if sum(map(plain.count, (b",", b":", b"[", b"{"))) > bounds.values:
            raise WireError(f"a message's header has more than {bounds.values:,} values")
        header = json.loads(plain, parse_constant=_no_number)
    except (zlib.error, ValueError, RecursionError) as error:
        raise error if isinstance(error, WireError) else WireError("a message's header is no JSON") from error
    if not isinstance(header, dict):
        raise WireError("a message's header is no JSON object")
    return header


def _no_number(name: str) -> NoReturn:
    raise WireError(f"a message's header holds {name}, which is no JSON")


def _decode_all(data: memoryview, specs: list[Any], format: Format) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    start = 0
    for spec in specs:
        name, shape = _spec(spec)
        size = _size(name, shape, format)
        if name in tensors:
            raise WireError(f"a message that names {name!r} twice")
        if start + size > len(data):
            raise WireError(f"a message that ends within {name!r}")
        tensors[name] = _decode(data[start : start + size], shape, format, component_axis(name))
        start += size
    if start != len(data):
        raise WireError(f"a message with {len(data) - start} bytes too many")
    return tensors


def _spec(spec: Any) -> tuple[str, tuple[int, int]]:
    if (
        isinstance(spec, list)
        and len(spec) == 2
        and isinstance(spec[0], str)
        and isinstance(spec[1], list)
        and len(spec[1]) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in spec[1])
    ):
        return spec[0], (spec[1][0], spec[1][1])
    raise WireError("a message whose header has a matrix without a name and two sizes")
