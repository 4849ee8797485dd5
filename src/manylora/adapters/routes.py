"""What one call says about routing: expert ids, adapters per row, and the facts that go with them.

Shape letters: T tokens, B examples (rows), D in, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from manylora.errors import RoutingError

if TYPE_CHECKING:
    from manylora.adapters.balance import RouterCall

ExpertIds = Tensor | Sequence[int] | Sequence[Sequence[int]] | int
"""One expert index per example (B,), one per token (B, T), or one integer for all."""

BASE = "__base__"
"""The name that stands for no adapter in `adapter_names`, as in PEFT."""

_SEQUENCE_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q")
"""Keywords that hold the bounds of packed sequences (flash attention's cumulative lengths)."""


@dataclass(eq=False, slots=True)
class CallFacts:
    """What the running forward was given besides ids, as far as routing needs it."""

    mask: Tensor | None = None
    """Attention mask (B, T), nonzero where a token is real; None: not known."""
    positions: Tensor | None = None
    """Position ids (B, T)."""
    sequences: int | None = None
    """Number of packed sequences, where the call tells."""
    labels: Tensor | None = None
    """The labels that are predicted, -100 where there is no loss."""
    items: Tensor | float | None = None
    """Labels that count in the whole optimizer step, of which this call is a part."""
    gates: list[RouterCall] | None = None
    """Where token routers leave what the load-balance loss needs; None: nobody asks."""

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], *, one_sequence: bool, next_token: bool) -> CallFacts:
        """Read them from a forward's keywords.

        Args:
            kwargs: what the forward was given.
            one_sequence: whether all layers see the same tokens. The encoder and the decoder of one model do not,
                so one mask would not fit: they get none.
            next_token: whether the model's own loss shifts the labels by one.
        """
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        lengths = next((v for k in _SEQUENCE_LENGTHS if isinstance(v := kwargs.get(k), Tensor)), None)
        labels = kwargs.get("labels")
        if isinstance(kwargs.get("shift_labels"), Tensor):
            labels = kwargs["shift_labels"]
        elif isinstance(labels, Tensor) and next_token:
            labels = labels[..., 1:]
        return cls(
            mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 and one_sequence else None,
            positions=positions if isinstance(positions, Tensor) and positions.dim() == 2 else None,
            sequences=None if lengths is None else lengths.numel() - 1,
            labels=labels,
            items=kwargs.get("num_items_in_batch"),
        )

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The mask for an input (…, D), shaped (…); None where it is not known or has other tokens.

        With a cache the input holds the last tokens only; some layers see rows and tokens as one dimension.
        """
        mask = self.mask
        if mask is None:
            return None
        if x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[1] <= mask.shape[1]:
            return mask[:, mask.shape[1] - x.shape[1] :]
        return mask.flatten() if x.dim() == 2 and x.shape[0] == mask.numel() else None

    def rows(self, rows_B: Tensor) -> CallFacts:
        """The facts of some of the rows."""
        mask, positions = (
            tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows_B.to(tensor.device)]
            for tensor in (self.mask, self.positions)
        )
        return CallFacts(mask=mask, positions=positions)

    def packed(self, rows: int) -> bool:
        """Whether some row holds several examples one after another, as far as the call tells.

        Either there are more sequences than rows, or positions start again inside a row. Padding does not
        count: its positions are arbitrary.
        """
        if self.sequences is not None and self.sequences > rows:
            return True
        positions = self.positions
        if positions is None or positions.shape[1] < 2 or not has_values(positions):
            return False
        if self.mask is not None and self.mask.shape != positions.shape:
            return False  # a call with a cache, which does not start several examples
        again = (positions[:, 1:] <= 0) | (positions[:, 1:] < positions[:, :-1])
        if self.mask is not None:
            real = self.mask.to(positions.device) != 0
            again = again & real[:, 1:] & real[:, :-1]
        return bool(again.any())


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """The rows of a batch that use one adapter, with the routes of these rows."""

    adapter: str
    rows: Tensor
    routes: Routes


class Routes:
    """The ids of one forward call: one per example, one per token, one for all, or none given.

    Args:
        ids: what the caller gave; None: nothing.
        adapters: name of the adapter of each row; None: the active ones.

    Raises:
        RoutingError: the ids are not integers, or have not one or two dimensions.
    """

    __slots__ = ("_checked", "_parts", "adapters", "call", "expert", "ids", "prompts")

    def __init__(self, ids: ExpertIds | None = None, *, adapters: Sequence[str] | None = None) -> None:
        self.prompts: int | None = None
        self.expert: int | None = None
        self.ids: Tensor | None = None
        self.adapters = None if adapters is None else tuple(adapters)
        self.call: CallFacts | None = None
        self._checked: set[int] = set()  # numbers of experts for which the ids are known to be in range
        self._parts: dict[
            int, list[Part]
        ] = {}  # by number of rows, so that only the first layer divides them
        if ids is None:
            return
        if isinstance(ids, int) and not isinstance(ids, bool):
            self.expert = ids
        else:
            self.ids = _as_ids(ids)

    @property
    def given(self) -> bool:
        """Whether the caller gave any ids."""
        return self.expert is not None or self.ids is not None

    def during(self, call: CallFacts) -> Routes:
        """The same routes inside one call."""
        copy = self._copy()
        copy.call = call
        return copy

    def with_adapters(self, adapters: Sequence[str] | None) -> Routes:
        """The same ids, with the rows divided between adapters."""
        copy = self._copy()
        copy.adapters = None if adapters is None else tuple(adapters)
        return copy

    def for_generation(self, prompts: int | None) -> Routes:
        """The same routes inside a generation, whose batches hold each prompt once or several times in a row.

        Args:
            prompts: number of prompts; None: not known, taken to be the number of ids.

        Raises:
            RoutingError: the ids are per token.
        """
        copy = self._copy()
        if self.ids is not None and self.ids.dim() == 2:
            raise RoutingError(
                f"expert_ids have shape {tuple(self.ids.shape)}; generate takes one index per prompt: (batch,)."
            )
        given = self.ids if self.ids is not None else self.adapters
        if given is not None:
            copy.prompts = len(given) if prompts is None else prompts
        return copy

    def check(self, num_experts: int) -> None:
        """Raise RoutingError unless every id is one of `num_experts` experts; reads the values only once."""
        if num_experts in self._checked:
            return
        if self.expert is not None:
            low = high = self.expert
        elif self.ids is None or self.ids.numel() == 0 or not has_values(self.ids):
            return
        elif torch.compiler.is_compiling():
            # A compiled graph cannot look at values and then raise an error of ours, only assert.
            inside = ((self.ids >= 0) & (self.ids < num_experts)).all()
            torch._assert_async(
                inside, f"expert_ids out of range; the adapter's experts are 0 to {num_experts - 1}."
            )
            self._checked.add(num_experts)
            return
        else:
            # Reading the values makes a GPU wait, hence once per call of the model and not once per layer.
            low, high = (int(bound) for bound in torch.aminmax(self.ids))
        if low < 0 or high >= num_experts:
            bad = low if low < 0 else high
            raise RoutingError(f"expert_ids contain {bad}; the adapter's experts are 0 to {num_experts - 1}.")
        self._checked.add(num_experts)

    def single(self) -> int | None:
        """The one expert that all ids name, None if they name several or none."""
        if self.ids is not None and self.ids.numel() > 0:
            low, high = (int(bound) for bound in torch.aminmax(self.ids))
            return low if low == high else None
        return self.expert

    def ids_for(self, x: Tensor) -> Tensor:
        """The ids for an input (B, …, D), on its device and broadcastable to (B, …).

        Raises:
            RoutingError: the ids do not fit the input, or are per example where rows hold several examples.
        """
        assert self.ids is not None
        ids = self.ids.to(x.device)
        if ids.dim() == 2:
            if x.dim() > 2 and x.shape[:2] == ids.shape:
                return ids.view(*ids.shape, *(1,) * (x.dim() - 3))
            if x.dim() == 2 and x.shape[0] == ids.numel():
                return ids.flatten()
            raise RoutingError(
                f"expert_ids of shape {tuple(ids.shape)} do not fit an input of shape {tuple(x.shape)}; "
                "give one index per example, (batch,), or one per token, (batch, tokens)."
            )
        times = self._times(ids.shape[0], x, "expert_ids")
        self._refuse_packed(x)
        ids_B = ids.repeat_interleave(times) if times > 1 else ids
        return ids_B.view(-1, *(1,) * (x.dim() - 2))

    def weights(self, x: Tensor, num_experts: int) -> Tensor:
        """One-hot routing weights for an input (B, …, D), broadcastable to (B, …, N), in x's dtype.

        Raises:
            RoutingError: as in `ids_for`.
        """
        experts_N = torch.arange(num_experts, device=x.device)
        return (self.ids_for(x).unsqueeze(-1) == experts_N).to(x.dtype)

    def parts(self, x: Tensor) -> list[Part]:
        """The rows of an input (B, …, D) by adapter, rows of the bare base model left out.

        Raises:
            RoutingError: the number of names is not the number of rows.
        """
        assert self.adapters is not None
        known = self._parts.get(x.shape[0])
        if known is not None and all(part.rows.device == x.device for part in known):
            return known
        times = self._times(len(self.adapters), x, "adapter_names")
        names = [name for name in self.adapters for _ in range(times)]
        parts = []
        for adapter in dict.fromkeys(names):
            if adapter != BASE:
                rows = [row for row, name in enumerate(names) if name == adapter]
                rows_B = torch.tensor(rows, device=x.device)
                parts.append(Part(adapter, rows_B, self._rows(rows_B, x)))
        self._parts[x.shape[0]] = parts
        return parts

    def names_for(self, x: Tensor) -> list[str]:
        """The adapter of every row of an input (B, …, D)."""
        assert self.adapters is not None
        times = self._times(len(self.adapters), x, "adapter_names")
        return [name for name in self.adapters for _ in range(times)]

    def _rows(self, rows_B: Tensor, x: Tensor) -> Routes:
        routes = Routes()
        routes.expert = self.expert
        if self.ids is not None:
            ids = self.ids.to(x.device)
            if ids.shape[0] != x.shape[0]:
                ids = ids.repeat_interleave(self._times(ids.shape[0], x, "expert_ids"), dim=0)
            routes.ids = ids[rows_B]
        if self.call is not None:
            routes.call = self.call.rows(rows_B)
        return routes

    def _times(self, count: int, x: Tensor, what: str) -> int:
        """How often each row's entry is repeated for an input of so many rows."""
        rows = x.shape[0]
        if count and count == self.prompts and rows % count == 0:
            return rows // count  # transformers repeats every prompt in place, once per beam or sequence
        if self.prompts is not None or count != rows:
            expected = rows if self.prompts in (None, count) else self.prompts
            raise RoutingError(
                f"{count} {what} for {expected} rows (input shape {tuple(x.shape)}); give one per example"
                + (
                    ", or one per token where rows are packed: (batch, tokens)."
                    if what == "expert_ids"
                    else "."
                )
            )
        return 1

    def _refuse_packed(self, x: Tensor) -> None:
        """Per-example ids are wrong where a row holds several examples; looked at once per call."""
        call = self.call
        if call is None or torch.compiler.is_compiling():
            return
        if call.packed(x.shape[0]):
            raise RoutingError(
                "A row of this batch holds several examples (packed or padding-free), but expert_ids have "
                f"one index per row: shape {tuple(self.ids.shape) if self.ids is not None else ()}. Give one "
                "index per token, (batch, tokens), or turn packing off."
            )
        call.positions = call.sequences = None  # found good: the next layer need not look

    def _copy(self) -> Routes:
        copy = Routes()
        copy.expert, copy.ids, copy.prompts = self.expert, self.ids, self.prompts
        copy.adapters, copy.call = self.adapters, self.call
        # One set for all copies of the same ids: what has been checked stays so. `_parts` is not taken along, for the
        # rows in it hold the call that they were made in.
        copy._checked = self._checked
        return copy


def has_values(tensor: Tensor) -> bool:
    """False for tensors that only stand for a shape, as in a run that estimates memory."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _as_ids(ids: ExpertIds) -> Tensor:
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RoutingError(f"expert_ids={ids!r} are no integers; give one index per example.") from error
    if tensor.numel() == 0 and not isinstance(ids, Tensor):
        tensor = tensor.long()
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise RoutingError(f"expert_ids have dtype {tensor.dtype}; give integers, one index per example.")
    if tensor.dim() not in (1, 2):
        raise RoutingError(
            f"expert_ids have shape {tuple(tensor.shape)}; give one index per example, (batch,), "
            "one per token, (batch, tokens), or a plain int for all."
        )
    return tensor.long()  # also of unsigned types, which torch hardly computes with
