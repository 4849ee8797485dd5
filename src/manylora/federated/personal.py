"""A client's personal model as a plain LoRA folder, which PEFT reads without manylora."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from manylora.federated.exchange import State
from manylora.federated.faults import ClientError, Fault
from manylora.federated.kept import not_finite

if TYPE_CHECKING:
    from manylora.data import PromptRecord
    from manylora.federated.workbench import Workbench


def save_personal(
    bench: Workbench, folder: Path, *, stacks: Sequence[State] = (), prompts: PromptRecord | None = None
) -> None:
    """Write the adapter that is on, exactly, as one LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    A factored adapter becomes (M A, B0 + B2 B1) of the intermediate rank. FLoRA's base has changed, so its stacks
    go before the client's own factors, and the rank is the sum of theirs. Appears under its name only when whole.

    Args:
        bench: with the client's adapter on.
        folder: replaced if it is there.
        stacks: what was folded into the base.
        prompts: how the client's rows asked, and the base's mark, to go along.

    Raises:
        ClientError: a weight is not finite.
    """
    s = bench.config.scaling
    weights, rank = {}, 0
    for name, (a_RD, b_OR) in bench.plain_factors().items():
        A = torch.cat([*(stack[f"{name}.A"] for stack in stacks), a_RD], dim=0)
        B = torch.cat([*(stack[f"{name}.B"] / s for stack in stacks), b_OR], dim=1)
        rank = A.shape[0]
        weights[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=s * rank,
        target_modules=sorted(bench.layers),
        fan_in_fan_out=any(layer.stored_transposed for layer in bench.layers.values()),
        base_model_name_or_path=bench.config.model,
        inference_mode=True,
    )
    if broken := not_finite(weights):  # a product of finite factors can overflow
        raise ClientError(
            Fault.NOT_FINITE,
            f"the personal model holds NaN or infinity, first in {broken}; lower the learning rate, or go back to a "
            "round before with --resume RUN --from-round.",
        )
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(partial))
    if prompts is not None:
        prompts.write(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
