"""The one base model of a process, onto which clients' adapters are put in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from peft import get_peft_model
from torch import Tensor

from manylora.adapters import FactoredBank, ManyLoraLinear
from manylora.data import TaskData, fix_date, resolve_template
from manylora.errors import ConfigError
from manylora.evaluation.generation import context_of
from manylora.federated.config import FederateConfig
from manylora.federated.faults import clean_text
from manylora.federated.parts import Shapes, State
from manylora.federated.strategies import strategy_for
from manylora.federated.strategy import Strategy
from manylora.training import (
    base_fingerprint,
    load_base,
    load_config,
    load_tokenizer,
    same_base,
    token_rows,
)
from manylora.training.batches import EncodedTask, encode_tasks
from manylora.training.fingerprint import comparable, differing_part
from manylora.training.plan import adapter_config

if TYPE_CHECKING:
    from peft import PeftModel

_ADAPTER = "default"
_PREFIX = "base_model.model."


class Workbench:
    """Base model, tokenizer and the banks of the client whose turn it is.

    Args:
        config: resolved.
        strategy: of the run. Default: the one that `config` names.

    Raises:
        ModelError, TargetModulesError: the base cannot be loaded, or has no such layers.
    """

    def __init__(self, config: FederateConfig, *, strategy: Strategy | None = None) -> None:
        self.config = config
        self.strategy = strategy or strategy_for(config.strategy, unequal=config.ranks is not None)
        self.tokenizer = load_tokenizer(config.model)
        self.template = resolve_template(config.template, self.tokenizer, model=config.model)
        fix_date(self.tokenizer, config.date)
        architecture = load_config(config.model)
        self.context = context_of(architecture)
        self.vocabulary = token_rows(architecture)
        base = load_base(config.model, dtype=config.dtype, device=config.device, attention=config.attention)
        self.fingerprint = base_fingerprint(base)
        self.train_config = config.train_config().resolved()
        self.model: PeftModel = get_peft_model(base, adapter_config(self.train_config, task_names=()))
        self.layers: dict[str, ManyLoraLinear] = {
            name.removeprefix(_PREFIX): module
            for name, module in sorted(self.model.named_modules())
            if isinstance(module, ManyLoraLinear)
        }
        self._original: dict[str, Tensor] = {}
        self._folded: list[int] = []

    @property
    def shapes(self) -> Shapes:
        """(O, D) of every adapted layer."""
        return {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}

    def is_on(self, base: str) -> bool:
        """Whether a mark that was written earlier is that of this base."""
        mark = self.fingerprint
        if not comparable(base, mark):
            mark = base_fingerprint(self.model.get_base_model(), like=base)
        return same_base(base, mark)

    def other_base(self, base: str) -> str:
        """What to say where the run was begun on a base of another mark."""
        return (
            f"the run was begun on the base with fingerprint {clean_text(base)}, this one has {self.fingerprint}"
            f"{differing_part(base, self.fingerprint)}; put the old one back, or start a new run."
        )

    def encode(self, data: TaskData) -> list[EncodedTask]:
        """Rows as token ids."""
        return encode_tasks(
            data,
            self.tokenizer,
            max_length=self.config.max_length,
            context_length=self.context,
            loss_on=self.config.loss_on,
            vocabulary=self.vocabulary,
        )

    def load(self, state: State, *, rank: int) -> None:
        """Put a client's adapter on: banks of its rank, holding `state`, trainable where the strategy trains.

        Raises:
            ConfigError: `state` lacks a part, or has it in another shape.
        """
        intermediate = self.config.r if self.strategy.factored else rank
        for name, layer in self.layers.items():
            layer.update_layer(
                _ADAPTER,
                rank=intermediate,
                alpha=self.config.scaling * intermediate,
                config=self.model.peft_config[_ADAPTER],
            )
            if self.strategy.factored:
                layer.manylora_experts[_ADAPTER] = FactoredBank(layer.bank(_ADAPTER), own_rank=rank)
            layer.bank(_ADAPTER).float()  # PEFT gave it the type of the base, which may be a half one
            for part, matrix in layer.bank(_ADAPTER).parts.items():
                value = state.get(f"{name}.{part}")
                if value is None or value.shape != matrix.shape:  # copying would spread a smaller one
                    raise ConfigError(
                        f"The state to load has no {name}.{part} of shape {tuple(matrix.shape)}."
                    )
                with torch.no_grad():
                    matrix.copy_(value)
                if isinstance(matrix, torch.nn.Parameter):
                    matrix.requires_grad_(part in self.strategy.trains)

    def state(self) -> dict[str, Tensor]:
        """The whole state of the adapter that is on, copied to the CPU."""
        return {
            f"{name}.{part}": matrix.detach().to("cpu", torch.float32, copy=True)
            for name, layer in self.layers.items()
            for part, matrix in layer.bank(_ADAPTER).parts.items()
        }

    def parameter_names(self) -> dict[str, str]:
        """ "layer.part" of every parameter by its name in the model."""
        by_identity = {
            id(matrix): f"{name}.{part}"
            for name, layer in self.layers.items()
            for part, matrix in layer.bank(_ADAPTER).parts.items()
        }
        return {
            name: by_identity[id(parameter)]
            for name, parameter in self.model.named_parameters()
            if id(parameter) in by_identity
        }

    def plain_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapter that is on as one LoRA per layer: A (R, D) and B (O, R), the scaling apart."""
        return {
            name: (layer.bank(_ADAPTER).lora_A.detach().cpu(), layer.bank(_ADAPTER).lora_B.detach().cpu())
            for name, layer in self.layers.items()
        }

    def fold(self, stacks: Sequence[tuple[int, State]]) -> None:
        """Make the base W0 + Σ B A over these stacks, in order (FLoRA); an empty sequence gives W0 back.

        Args:
            stacks: number and matrices of each; one number always stands for the same matrices.
        """
        numbers = [number for number, _ in stacks]
        if numbers[: len(self._folded)] != self._folded:
            self._restore()
        if stacks and not self._original:
            self._original = {n: layer.get_base_weight().detach().clone() for n, layer in self.layers.items()}
        for _, stack in stacks[len(self._folded) :]:
            for name, layer in self.layers.items():
                weight = layer.get_base_weight()
                if not weight.is_floating_point():
                    raise ConfigError(
                        "strategy flora adds to the base, which a quantised one does not allow."
                    )
                delta_OD = (stack[f"{name}.B"] @ stack[f"{name}.A"]).to(weight)
                with torch.no_grad():
                    weight.add_(delta_OD.t() if layer.stored_transposed else delta_OD)
        self._folded = numbers

    def _restore(self) -> None:
        for name, weight in self._original.items():
            with torch.no_grad():
                self.layers[name].get_base_weight().copy_(weight)
        self._folded = []


def total_rows(tasks: Iterable[EncodedTask]) -> int:
    """Rows of all tasks together."""
    return sum(len(task.rows) for task in tasks)
