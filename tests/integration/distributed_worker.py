"""One of two real processes: trains a tiny adapter in every way that accelerate offers, in one process group.

Started by `test_distributed.py` through `accelerate launch`; the first process writes what happened as JSON.
Without a launcher it trains in one process, which gives the numbers to compare with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import manylora
from manylora.adapters import ManyLoraConfig

SIZE = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    initializer_range=0.3,
    pad_token_id=0,
)
ROWS, LENGTH, STEPS = 4, 12, 3
CASES = [
    (kind, router, checkpointing)
    for kind in ("ddp", "fsdp2", "fsdp1")
    for router in ("token", "task")
    for checkpointing in (False, True)
]


def name(kind: str, router: str, checkpointing: bool) -> str:
    return f"{kind}/{router}/{'checkpointing' if checkpointing else 'plain'}"


def build(router: str, checkpointing: bool) -> torch.nn.Module:
    set_seed(0)
    base = LlamaForCausalLM(SIZE)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    config = ManyLoraConfig(
        r=4, num_experts=3, share="B", router=router, lora_dropout=0.0, target_modules="all-linear"
    )
    return get_peft_model(base, config)


def accelerator(kind: str, model: torch.nn.Module) -> Accelerator:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    plugin = None
    if kind.startswith("fsdp"):
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
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def train(kind: str, router: str, checkpointing: bool) -> dict[str, Any]:
    """Losses of the global batch before each step, and the adapter afterwards."""
    model = build(router, checkpointing)
    tool = accelerator(kind, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, SIZE.vocab_size, (STEPS, ROWS, LENGTH), generator=generator)
    experts = torch.randint(0, 3, (STEPS, ROWS), generator=generator)
    mine = slice(
        ROWS // tool.num_processes * tool.process_index, ROWS // tool.num_processes * (tool.process_index + 1)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model, optimizer = tool.prepare(model, optimizer)
    model.train()
    losses = []
    for step in range(STEPS):
        ids = tokens[step, mine]
        routing = {"expert_ids": experts[step, mine]} if router == "task" else {}
        loss = model(input_ids=ids, labels=ids, use_cache=False, **routing).loss
        tool.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(tool.gather(loss.detach().reshape(1)).mean()))
    state = tool.get_state_dict(model)
    adapter = get_peft_model_state_dict(tool.unwrap_model(model), state_dict=state) if tool.is_main_process else {}
    return {"losses": losses, "adapter": {key: value.tolist() for key, value in adapter.items()}}


def main(out: Path) -> None:
    manylora.__version__  # noqa: B018 -- the import registers the method
    import os

    alone = "RANK" not in os.environ
    cases = [("alone", router, False) for router in ("token", "task")] if alone else CASES
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[name(*case)] = train(*case)
        except Exception as error:
            import traceback
            traceback.print_exc()
            results[name(*case)] = {"error": f"{type(error).__name__}: {error}"}
    if AcceleratorState().is_main_process:
        out.write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
