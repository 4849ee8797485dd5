"""Which base model this is: a short mark of all its weights, the same whatever type they are loaded in.

A cast to bfloat16 or float16 rounds every weight, but keeps every sign, that of a value it rounds to zero too. So the
mark hashes the sign of every weight. Merging a LoRA, or training on, moves all weights of a matrix a little and
so turns the signs of those near zero: a change of a ten-thousandth of a matrix's spread turns some forty of a million.
What keeps all signs is caught by a second number per part: the mean size of each tensor, on a log scale, weighted by
its place, so that a scale that only moves from one tensor to another shows too.

    v2:HASH/SIZE:HASH/SIZE      all weights but those of linear layers; those of linear layers

The linear layers stand apart because quantisation replaces them, and nothing else: their part is "-" where they are
quantised (4 or 8 bit), and is then not compared.

What is not noticed: a change that keeps every sign and moves the sizes of a part by less than `SIZE_TOLERANCE` (one
norm's weights by less than about one per cent, say); a change of the linear layers where either side is quantised.
Names are not looked at, only order and shapes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VERSION = "v2:"
QUANTISED = "-"
SIZE_TOLERANCE = 0.015
"""By how much two sizes of one part may differ. Those of one file loaded in float32 and in float16 differed by 0.0004
(SmolLM2's shapes with random values), in float32 and bfloat16 by nothing."""

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are numbers as they stand; float8 and packed integers are not."""
_PART = re.compile(r"([0-9a-f]{16})/(-?\d+\.\d\d)")
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Integers of a number's width: negative where the number's sign bit is set."""
_PACKED = "qweight"
"""What GPTQ, AWQ and their kin call a packed matrix."""
_CHUNK = {"cpu": 2**18, "other": 2**24}
"""Weights looked at together: on a CPU what its cache holds, elsewhere so many that starting a kernel is cheap."""
_FLOOR = 2.0**-14
"""Added to a mean size, so that zeros have a logarithm: float16's smallest normal number."""
_LARGEST = 65504.0
"""float16 knows no larger one."""
_GOLDEN = 0.6180339887498949


def base_fingerprint(model: nn.Module, *, without: Collection[str] = (), like: str = VERSION) -> str:
    """The mark of a base model; see the module.

    Args:
        model: the base, before an adapter is put onto it.
        without: children of the model that are no part of the base, such as the new head of a classifier.
        like: a mark to compare with; one of manylora before version 2 of marks is answered in its own way.
    """
    if not like.startswith(VERSION):
        return _of_embedding(model)
    return VERSION + ":".join(map(_mark, _parts(model, without)))


def same_base(one: str, other: str) -> bool:
    """Whether two marks are of one base: equal hashes, sizes within the tolerance, what is quantised left out."""
    if not (one.startswith(VERSION) and other.startswith(VERSION)):
        return one == other
    mine, theirs = (text.removeprefix(VERSION).split(":") for text in (one, other))
    return len(mine) == len(theirs) and all(map(_same_part, mine, theirs))


def comparable(one: str, other: str) -> bool:
    """Whether two marks are of one version, so that they can be equal at all."""
    return one.startswith(VERSION) == other.startswith(VERSION)


def differing_part(one: str, other: str) -> str:
    """What of two bases differs, in words; empty where it cannot be told."""
    parts = [text.removeprefix(VERSION).split(":") for text in (one, other) if text.startswith(VERSION)]
    if len(parts) != 2 or len(parts[0]) != len(parts[1]):
        return ""
    same = [_same_part(mine, theirs) for mine, theirs in zip(*parts, strict=True)]
    return (
        ": its linear layers differ and nothing else, as where an adapter was merged in or the architecture is another "
        "one of the same sizes"
        if same == [True, False]
        else ""
    )


def weakness(known: str, now: str) -> str:
    """A sentence on what a comparison of these marks does not see; empty where it sees all."""
    if not known.startswith(VERSION):
        return "its mark of the base is of an earlier version and covers a part of the embeddings only"
    if QUANTISED in known.split(":") or QUANTISED in now.split(":"):
        return "the quantised weights of a base are not compared with those of its mark"
    return ""


def _same_part(one: str, other: str) -> bool:
    if QUANTISED in (one, other):
        return True
    mine, theirs = _PART.fullmatch(one), _PART.fullmatch(other)
    if mine is None or theirs is None:
        return one == other
    return mine[1] == theirs[1] and abs(float(mine[2]) - float(theirs[2])) <= SIZE_TOLERANCE


def _parts(model: nn.Module, without: Collection[str]) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """The weights beside the linear layers', and those of the linear layers; None where one is no plain number."""
    left_out = tuple(f"{name}." for name in without)
    modules = [module for name, module in model.named_modules() if not f"{name}.".startswith(left_out)]
    is_linear = [isinstance(module, (nn.Linear, Conv1D)) for module in modules]
    # A matrix that embeds as well (tied weights) is not quantised and stands with the embeddings.
    tied = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    parts: tuple[dict[int, Tensor], dict[int, Tensor]] = (
        {},
        {},
    )  # by identity: each once, in the model's order
    for module, linear in zip(modules, is_linear, strict=True):
        for name, tensor in module.named_parameters(recurse=False):
            parts[linear and name == "weight" and id(tensor) not in tied][id(tensor)] = tensor
        for name, tensor in module.named_buffers(recurse=False):
            kept = name not in module._non_persistent_buffers_set and tensor.dtype in PLAIN
            if kept or name == _PACKED:
                parts[name == _PACKED][id(tensor)] = tensor
    others, linears = (list(part.values()) if all(map(_is_plain, part.values())) else None for part in parts)
    return others, linears


def _is_plain(tensor: Tensor) -> bool:
    """Whether these are the numbers themselves; torchao's are of a class of their own, others' packed integers."""
    return tensor.dtype in PLAIN and type(tensor.data) is Tensor


def _mark(weights: Iterable[Tensor] | None) -> str:
    if weights is None:
        return QUANTISED
    digest, size = hashlib.sha256(), 0.0
    for place, tensor in enumerate(weights, start=1):
        digest.update(repr(tuple(tensor.shape)).encode())
        total = 0.0
        for chunk in (
            tensor.detach().reshape(-1).split(_CHUNK["cpu" if tensor.device.type == "cpu" else "other"])
        ):
            signs, part = _look_at(chunk)
            digest.update(signs)
            total += part
        weight = 0.5 + (place * _GOLDEN) % 1  # unequal, so that what one tensor gains another cannot lose
        size += weight * math.log2(total / max(1, tensor.numel()) + _FLOOR)
    return f"{digest.hexdigest()[:16]}/{size:.2f}"


def _look_at(chunk: Tensor) -> tuple[bytes, float]:
    """The packed signs of some weights, and the sum of their sizes."""
    # rounded first: bfloat16 and float32 of one file then give the same sum
    sizes = chunk.to(torch.bfloat16).float().abs_()
    negative = chunk.view(_BITS[chunk.dtype.itemsize]) < 0
    total = float(sizes.sum())
    if not math.isfinite(total):  # no cast keeps the sign of NaN, and float16 knows no large number
        negative &= ~chunk.isnan()
        total = float(sizes.nan_to_num_(nan=0.0, posinf=_LARGEST).clamp_(max=_LARGEST).sum())
    return _packed(negative), total


def _packed(bits: Tensor) -> bytes:
    """Eight to a byte, the first one highest, as numpy.packbits does it, and there where the bits are."""
    if bits.device.type == "cpu":
        return np.packbits(bits.numpy()).tobytes()
    return _packed_by_torch(bits)


def _packed_by_torch(bits: Tensor) -> bytes:
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    rows = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (rows * places).sum(1, dtype=torch.uint8).cpu().numpy().tobytes()


def _of_embedding(model: nn.Module) -> str:
    """The mark before version 2: the signs of the input embedding's first and last 64 rows."""
    embedding = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    signs = torch.cat((embedding[:64], embedding[-64:])).signbit().to("cpu", torch.uint8)
    return hashlib.sha256(signs.numpy().tobytes()).hexdigest()[:16]
