"""What the benchmarks compare: one Llama with random weights, frozen, and the ways to adapt it.

Shape letters: T tokens (any leading dimensions), D in, O out, R rank, N experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from manylora import ManyLoraConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 16

Kind = Literal["floor", "lora", "released", "ours"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shapes of the base model and of one batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rows: int
    length: int
    rank: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.length


PRESETS = {
    "cpu": Size(hidden=512, intermediate=1376, layers=8, heads=8, kv_heads=8, vocab=4096, rows=8, length=256),
    # Llama-3-8B's layers; fewer of them, and a small vocabulary, so that the as-released loop fits beside ours
    "cuda": Size(
        hidden=4096,
        intermediate=14336,
        layers=4,
        heads=32,
        kv_heads=8,
        vocab=4096,
        rows=8,
        length=1024,
        dtype=torch.bfloat16,
    ),
    "quick": Size(hidden=32, intermediate=64, layers=2, heads=2, kv_heads=2, vocab=64, rows=2, length=8),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table."""

    kind: Kind
    experts: int = 1
    dropout: float = 0.0
    share: str = "B"

    @property
    def key(self) -> str:
        """A name without blanks, such as "ours-B-3-0.05"."""
        parts = {
            "floor": ["floor"],
            "lora": ["lora", f"{self.dropout:g}"],
            "released": ["released", str(self.experts), f"{self.dropout:g}"],
            "ours": ["ours", self.share, str(self.experts), f"{self.dropout:g}"],
        }
        return "-".join(parts[self.kind])

    @property
    def lora(self) -> Variant:
        """PEFT's LoRA with the same dropout: what this row is divided by."""
        return Variant(kind="lora", dropout=self.dropout)


def all_variants(
    experts: tuple[int, ...], dropouts: tuple[float, ...], shares: tuple[str, ...]
) -> list[Variant]:
    """Every row: the floor, PEFT's LoRA, the as-released loop and ours."""
    rows = [
        Variant(kind="floor", dropout=min(dropouts))
    ]  # its dropout only names the row it is compared with
    for dropout in dropouts:
        rows.append(Variant(kind="lora", dropout=dropout))
        rows += [
            Variant(kind="released", experts=n, dropout=dropout) for n in experts if n > 1
        ]  # one expert as released is PEFT's LoRA
        # sharing decides nothing where there is one expert
        rows += [
            Variant(kind="ours", experts=n, dropout=dropout, share=share)
            for n in experts
            for share in (shares if n > 1 else shares[:1])
        ]
    return rows


class ReleasedLoop(nn.Module):
    """A linear layer with N experts computed as the method's released code does (2509.25414): one pass per
    expert, each with a dropout mask of its own, its own product with the shared B, and its own sum.

    Args:
        base_layer: frozen.
        experts: N.
        rank: R.
        dropout: probability of the mask.
    """

    def __init__(self, base_layer: nn.Linear, *, experts: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        like = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.lora_route = nn.Linear(base_layer.in_features, experts, bias=False, **like)
        self.lora_A = nn.ModuleList(
            nn.Linear(base_layer.in_features, rank, bias=False, **like) for _ in range(experts)
        )
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, **like)
        self.dropout = nn.Dropout(dropout)
        self.scaling = ALPHA / rank
        for module in (self.lora_route, *self.lora_A):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The base output plus every expert's weighted contribution."""
        y_TO = self.base_layer(x_TD)
        w_TN = F.softmax(self.lora_route(x_TD), dim=-1, dtype=torch.float32).to(y_TO.dtype)
        for n, a in enumerate(self.lora_A):
            y_TO = y_TO + w_TN[..., n, None] * self.lora_B(a(self.dropout(x_TD))) * self.scaling
        return y_TO


def make_base(size: Size, device: str) -> LlamaForCausalLM:
    """The frozen model, random weights by the seed that the caller has set."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=max(2048, size.length),
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(size.dtype)
    return model.requires_grad_(False)


def build(variant: Variant, base: LlamaForCausalLM, size: Size) -> nn.Module:
    """The adapted model, in training mode; its frozen weights are those of `base`, not copies."""
    model = copy.deepcopy(base, memo={id(p): p for p in base.parameters()})
    common = {
        "r": size.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": variant.dropout,
        "target_modules": list(TARGETS),
    }
    if variant.kind == "lora":
        # adapters in the base's dtype on both sides: PEFT would keep float32 ones beside a bfloat16 base
        return get_peft_model(model, LoraConfig(**common), autocast_adapter_dtype=False).train()
    if variant.kind == "ours":
        config = ManyLoraConfig(num_experts=variant.experts, share=variant.share, **common)
        return get_peft_model(model, config, autocast_adapter_dtype=False).train()
    if variant.kind == "released":
        for parent, name, layer in list(_targets(model)):
            loop = ReleasedLoop(layer, experts=variant.experts, rank=size.rank, dropout=variant.dropout)
            setattr(parent, name, loop)
    return model.train()


def _targets(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if name in TARGETS and isinstance(child, nn.Linear):
                yield parent, name, child


class Step:
    """One training step of a variant: forward, backward to the embeddings, AdamW on what is trainable."""

    def __init__(self, variant: Variant, base: LlamaForCausalLM, size: Size, device: str) -> None:
        self.model = build(variant, base, size)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4) if self.trainable else None
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(size.vocab, (size.rows, size.length), generator=generator).to(device)
        self.embedding = base.get_input_embeddings()

    def loss(self) -> Tensor:
        """Forward pass; the embeddings ask for a gradient in every variant, so all backward passes run through."""
        embeddings = self.embedding(self.ids).requires_grad_()
        return self.model(inputs_embeds=embeddings, labels=self.ids).loss

    def __call__(self) -> float:
        """The whole step; returns the loss (waits for the device)."""
        loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    def kept_bytes(self) -> int:
        """Bytes of distinct storages that the forward pass keeps for backward, parameters apart."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}
        alive: list[Tensor] = []  # a freed storage's address would be used again

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss()
        return sum(kept.values())


def resized(size: Size, **changes: int | None) -> Size:
    """`size` with the given fields replaced where they are not None."""
    return replace(size, **{name: value for name, value in changes.items() if value is not None})
