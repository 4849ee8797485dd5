"""One of two real processes: trains a tiny adapter in every way that accelerate offers, in one process group.

Started by `test_distributed.py` through torchrun; the first process writes what happened as JSON.
Without a launcher it trains in one process, which gives the numbers to compare with.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from peft import (
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from manylora.adapters import ManyLoraConfig

SIZE = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    initializer_range=0.3,
    pad_token_id=0,
)
ROWS, LENGTH, STEPS = 4, 12, 3
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUANTISED = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "ao8": "torchao"}
"""How the base is stored, and the package that does it."""

STORED_UNDER = {
    "alone": ("bnb4", "bnb8", "ao8"),
    "ddp": ("bnb4", "bnb8"),
    "fsdp2": ("bnb4",),
    "fsdp1": ("bnb4",),
    "zero3": (),
}
"""What the libraries themselves can spread: torchao's int8 tensors cannot be viewed or split, and bitsandbytes'
cannot be flattened; with a plain LoRA it is the same."""


@dataclass(frozen=True)
class Case:
    """One way to train: how processes work together, router, stored base, checkpointing."""

    kind: str
    router: str = "token"
    share: str = "B"
    base: str = "float32"
    checkpointing: bool = False

    def __str__(self) -> str:
        kept = "checkpointing" if self.checkpointing else "plain"
        return "/".join((self.kind, self.router, self.share, self.base, kept))


def cases(kinds: tuple[str, ...]) -> list[Case]:
    """Every combination that is tried with these kinds."""
    both = (False, True)
    plain = [
        Case(kind, router, checkpointing=c) for kind in kinds for router in ("token", "task") for c in both
    ]
    shares = [Case(kind, share=share) for kind in kinds for share in ("A", "none")]
    stored = [
        Case(kind, base=base, checkpointing=c) for kind in kinds for base in STORED_UNDER[kind] for c in both
    ]
    return [*plain, *shares, *stored]


def load(base: str, folder: Path) -> LlamaForCausalLM:
    """The tiny model, from `folder`, stored as `base` says."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if base == "bnb4":
        quantised: Any = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=torch.float32,  # sharding wants one dtype for all it flattens
        )
    elif base == "bnb8":
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    elif base == "ao8":
        from torchao.quantization import Int8WeightOnlyConfig

        quantised = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantised = None
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantised)


def build(case: Case, folder: Path) -> torch.nn.Module:
    base = load(case.base, folder)
    kwargs = {"use_reentrant": False}
    if case.base in ("bnb4", "bnb8"):
        base = prepare_model_for_kbit_training(
            base, use_gradient_checkpointing=case.checkpointing, gradient_checkpointing_kwargs=kwargs
        )
    elif case.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        base.enable_input_require_grads()
    set_seed(0)
    config = ManyLoraConfig(
        r=4,
        num_experts=3,
        share=case.share,
        router=case.router,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    return get_peft_model(base, config)


def accelerator(kind: str, model: torch.nn.Module) -> Accelerator:
    """A fresh one, as if the process had just been started for this kind."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    if kind == "zero3":
        from accelerate import DeepSpeedPlugin

        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ZERO3))
    if not kind.startswith("fsdp"):
        return Accelerator(cpu=True)
    version = int(kind[-1])
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        use_orig_params=True if version == 1 else None,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    if version == 1:
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)  # as transformers' Trainer does
    tool = Accelerator(cpu=True)
    # accelerate shards on accelerators only and falls back to DDP on CPU without a word; all that it does after
    # this choice (wrapping, moving the optimizer over, gathering weights) runs on CPU as it stands.
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    tool.state.fsdp_plugin = plugin
    return tool


def kept_parameters(model: torch.nn.Module) -> int:
    """Number of values that this process holds of the model."""
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    held = [p for p in held if not is_traceable_wrapper_subclass(p)]  # torchao's have no storage of their own
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // p.element_size() for p in held
    }
    return sum(storages.values())


ZERO3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1e9,  # clips at 1 unless told otherwise
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero_force_ds_cpu_optimizer": False,
}


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Losses of the global batch before each step, and the adapter afterwards."""
    began = time.monotonic()
    model = build(case, folder)
    tool = accelerator(case.kind, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, SIZE.vocab_size, (STEPS, ROWS, LENGTH), generator=generator)
    experts = torch.randint(0, 3, (STEPS, ROWS), generator=generator)
    each = ROWS // WORLD
    mine = slice(each * RANK, each * (RANK + 1))
    # A large eps: without it AdamW turns the rounding of gradients near zero into whole steps.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-3)
    model, optimizer = tool.prepare(model, optimizer)
    held = kept_parameters(model)
    model.train()
    losses = []
    unplaced: list[str] = []
    for step in range(STEPS):
        ids = tokens[step, mine]
        routing = {"expert_ids": experts[step, mine]} if case.router == "task" else {}
        loss = model(input_ids=ids, labels=ids, use_cache=False, **routing).loss
        tool.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / WORLD
        if WORLD > 1:
            torch.distributed.all_reduce(mean)
        losses.append(float(mean))
    if case.kind == "fsdp1":
        # what accelerate does, but for its offload to the CPU: torch frees the weights there, which are on the CPU
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            state = model.state_dict()
            bare = tool.unwrap_model(model)
            placed = set_peft_model_state_dict(bare, get_peft_model_state_dict(bare, state_dict=state))
            unplaced = [key for key in (*placed.missing_keys, *placed.unexpected_keys) if "manylora" in key]
    else:
        state = tool.get_state_dict(model)
    adapter = get_peft_model_state_dict(tool.unwrap_model(model), state_dict=state) if RANK == 0 else {}
    return {
        "losses": losses,
        "adapter": {key: value.float().tolist() for key, value in adapter.items()},
        "held": held,
        "unplaced": unplaced,
        "wrapper": type(model).__name__,
        "seconds": round(time.monotonic() - began, 2),
    }


def main(folder: Path, out: Path, kinds: tuple[str, ...]) -> None:
    results: dict[str, Any] = {}
    for case in cases(kinds):
        if case.base in QUANTISED and find_spec(QUANTISED[case.base]) is None:
            continue
        try:
            results[str(case)] = train(case, folder)
        except Exception as error:  # reported as the case's outcome; the next cases still run
            traceback.print_exc()
            results[str(case)] = {"error": f"{type(error).__name__}: {error}"}
    if RANK == 0:
        out.write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:]))
