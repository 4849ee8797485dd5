"""The plan is what then happens; losses per task are what the mathematics says."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from manylora.data import encode
from manylora.errors import ModelError
from manylora.training import (
    RunFolder,
    TrainConfig,
    build_model,
    finetune,
    load_base,
    load_tokenizer,
    prepare,
)
from manylora.training.batches import Collator, EncodedRows
from manylora.training.memory import LiveBytes, estimate_memory, training_loss
from manylora.training.models import base_fingerprint, load_classifier
from manylora.training.plan import adapter_config, shadow_model
from manylora.training.trainer import ManyTaskTrainer


def config(base: Path, data: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lora_dropout": 0.0, "device": "cpu", **more}
    return TrainConfig(model=str(base), data=str(data), learning_rate=0.01, **settings)


def test_the_plan_counts_what_the_model_has(tiny_base: Path, small_data: Path) -> None:
    for method in ("alora", "hydralora", "moelora", "lora"):
        prepared = prepare(config(tiny_base, small_data, method=method))
        model = build_model(prepared)
        trainable, total = model.get_nb_trainable_parameters()
        assert (prepared.plan.trainable, prepared.plan.total) == (trainable, total)
        assert sum(prepared.plan.modules.values()) == 14


def test_cut_validation_prompts_are_told(tiny_base: Path, tmp_path: Path) -> None:
    for name, long in (("train", False), ("validation", True)):
        row = {"task": "t", "instruction": "why " * (400 if long else 1), "output": "x"}
        lines = [json.dumps({**row, "input": str(i)}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepared = prepare(config(tiny_base, tmp_path, max_length=64))
    assert "validation prompts longer than 64 tokens and cut: t 100.0 %" in prepared.plan.notes


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_base_of_which_weights_are_missing_is_refused(
    tiny_base: Path, tmp_path: Path, task_type: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    load = partial(load_classifier, labels=2, pad_token_id=0, seed=0) if task_type == "SEQ_CLS" else load_base
    for changed, named in (
        ({name: value for name, value in weights.items() if name != lost}, re.escape(lost)),
        ({f"x.{name}": value for name, value in weights.items()}, ".* and [0-9]+ more"),
    ):
        save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"weights of .* lack {named}.* start at random"):
            load(str(base), device="cpu")


def test_weights_of_a_base_that_have_no_place_are_named(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {**weights, "model.extra.weight": torch.ones(2)},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    with caplog.at_level("WARNING", logger="manylora"):
        load_base(str(base), device="cpu")
    assert "its weights model.extra.weight have no place in this model and are not used" in caplog.text


def test_the_schedule_reads_every_row_once_an_epoch(tiny_base: Path, small_data: Path) -> None:
    prepared = prepare(config(tiny_base, small_data))
    rows = sum(len(task.rows) for task in prepared.train)
    assert rows == 66  # 24 a task less 2 for validation
    assert sorted(prepared.order[:rows]) == list(range(rows))
    assert sorted(prepared.order[rows:]) == list(range(rows))
    lengths = [len(row.input_ids) for task in prepared.train for row in task.rows]
    assert prepared.plan.tokens == 2 * sum(lengths)
    assert prepared.plan.steps == 17  # ceil(132 / 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_plan_is_what_a_real_step_has_alive(
    tiny_base: Path, small_data: Path, checkpointing: bool
) -> None:
    prepared = prepare(config(tiny_base, small_data, lora_dropout=0.05))
    peft_config = adapter_config(prepared.config, task_names=prepared.task_names)
    batch = {"rows": 4, "length": 48, "answer": 5}
    plan = estimate_memory(
        shadow_model(prepared.config, peft_config), checkpointing=checkpointing, validation_rows=9, **batch
    )
    model = build_model(prepared).train()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    live = LiveBytes(model)
    with live:
        loss = training_loss(model, **batch)
        kept = live.now
        loss.backward()
        del loss
    assert plan.forward == pytest.approx(kept, rel=0.01)
    assert plan.forward + plan.backward == pytest.approx(live.peak, rel=0.01)
    assert plan.backward > (2.0 if checkpointing else 0.1) * plan.forward
    assert live.now == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.eval()
    alive = LiveBytes(model)
    with torch.no_grad(), alive:
        training_loss(model, **{**batch, "rows": 9})
    assert plan.validation == pytest.approx(alive.peak, rel=0.01)
    assert plan.adapter == 12 * prepared.plan.trainable
    assert plan.base == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_what_a_forward_keeps_is_what_autograd_saves(tiny_base: Path, small_data: Path) -> None:
    """The same number from another side: the tensors that autograd says it has saved, and the logits."""
    model = build_model(prepare(config(tiny_base, small_data, lora_dropout=0.05))).train()
    saved: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with LiveBytes(model) as live, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = training_loss(model, rows=4, length=48, answer=5)
    assert live.now == pytest.approx(
        sum(size for address, size in saved.items() if address not in own), rel=0.05
    )
    assert loss.requires_grad


def test_validation_losses_are_token_means_within_each_task(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    prepared = prepare(config(tiny_base, small_data, epochs=0.2))
    with RunFolder.create(str(tmp_path / "run"), config={}, seed=0) as run:
        model = finetune(prepared, run).eval()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (logged,) = [row for row in map(json.loads, lines) if "eval_mean_task_loss" in row]
    means = []
    for task in prepared.validation:
        total, count = 0.0, 0
        for row in task.rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += F.cross_entropy(logits.double(), labels[1:], ignore_index=-100, reduction="sum").item()
            count += int((labels[1:] != -100).sum())
        assert logged[f"eval_loss/{task.name}"] == pytest.approx(total / count, rel=1e-5)
        means.append(total / count)
    assert logged["eval_mean_task_loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_accumulated_micro_batches_give_the_same_training(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    trained = {}
    for micro in (8, 2):
        prepared = prepare(config(tiny_base, small_data, micro_batch_size=micro, epochs=1))
        with RunFolder.create(str(tmp_path / str(micro)), config={}, seed=0) as run:
            finetune(prepared, run)
        trained[micro] = load_file(tmp_path / str(micro) / "adapter" / "adapter_model.safetensors")
    assert trained[8].keys() == trained[2].keys()
    for name, weight in trained[8].items():
        torch.testing.assert_close(weight, trained[2][name], rtol=1e-3, atol=1e-4)


def test_the_collator_masks_padding_and_prompt(tiny_base: Path, small_data: Path) -> None:
    prepared = prepare(config(tiny_base, small_data))
    task = prepared.train[0]
    short, long = sorted(task.rows[:10], key=lambda row: len(row.input_ids))[::9]
    assert len(short.input_ids) < len(long.input_ids)
    rows = [{"input_ids": row.input_ids, "labels": row.labels, "task": 2} for row in (short, long)]
    batch = Collator(pad_token_id=0)(rows)
    size = len(short.input_ids)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(long.input_ids))
    assert batch["attention_mask"].sum(1).tolist() == [size, len(long.input_ids)]
    assert (batch["labels"][0, size:] == -100).all()
    assert (batch["labels"][0, : short.prompt_length] == -100).all()
    assert batch["labels"][0, short.prompt_length : size].tolist() == short.input_ids[short.prompt_length :]
    assert batch["task"].tolist() == [2, 2]


def test_the_answer_is_what_the_loss_counts(tiny_base: Path, small_data: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    prepared = prepare(config(tiny_base, small_data))
    example = prepared.splits.train["swap"][0]
    row = encode(example, tokenizer, max_length=256, context_length=512)
    answer = [label for label in row.labels if label != -100]
    assert tokenizer.decode(answer) == example.output + tokenizer.eos_token


def test_the_fingerprint_survives_a_cast_and_tells_models_apart(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device="cpu")
    print_32 = base_fingerprint(base)
    for dtype in (torch.bfloat16, torch.float16):
        assert base_fingerprint(load_base(str(tiny_base), device="cpu").to(dtype)) == print_32
    base = load_base(str(tiny_base), device="cpu")
    with torch.no_grad():
        base.get_input_embeddings().weight[3] += 1
    assert base_fingerprint(base) != print_32


@pytest.mark.parametrize("mixing", ["proportional", "uniform", "temperature"])
def test_mixing_decides_how_often_a_task_is_read(mixing: Any, tiny_base: Path, tmp_path: Path) -> None:
    for name, size in (("big", 64), ("small", 16)):
        rows = [json.dumps({"instruction": f"{name} {i}", "output": str(i)}) for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    held = tmp_path / "held" / "big.jsonl"
    held.parent.mkdir()
    held.write_text(json.dumps({"instruction": "held out", "output": "1"}), encoding="utf-8")
    prepared = prepare(
        config(tiny_base, tmp_path, validation=str(held), mixing=mixing, mixing_temperature=2.0, epochs=3)
    )
    share = sum(index < 64 for index in prepared.order) / len(prepared.order)
    expected = {"proportional": 0.8, "uniform": 0.5, "temperature": 8 / (8 + 4)}[mixing]
    assert len(prepared.order) == 240
    assert share == pytest.approx(expected, abs=1 / 240)


def test_router_options_reach_the_adapter_and_the_loss(
    tiny_base: Path, small_data: Path, tmp_path: Path
) -> None:
    """One step over micro-batches moves the routers by the load-balance loss too, once."""
    options = {
        "epochs": 0.1,
        "router_top_k": 2,
        "router_temperature": 0.5,
        "micro_batch_size": 4,
        "warmup": 0.0,
    }
    updates = []
    for weight in (0.0, 20.0):
        prepared = prepare(config(tiny_base, small_data, load_balance_weight=weight, **options))
        assert prepared.plan.steps == 1
        plain = build_model(prepared)
        saved = plain.peft_config["default"]
        assert (saved.router_top_k, saved.router_temperature, saved.load_balance_weight) == (2, 0.5, weight)
        with RunFolder.create(str(tmp_path / str(weight)), config=prepared.config.to_dict(), seed=0) as run:
            trained = finetune(prepared, run)
        moved = [
            (p - plain.get_parameter(n)).abs().sum().item()
            for n, p in trained.named_parameters()
            if n.endswith("lora_router")
        ]
        updates.append(moved)
        assert (
            json.loads((tmp_path / str(weight) / "adapter" / "adapter_config.json").read_text())[
                "format_version"
            ]
            == 2
        )
    assert (
        updates[0] == [0.0] * 14
    )  # B is zero at the first step, so the task's loss does not reach the routers
    assert all(moved > 0 for moved in updates[1])


def test_the_loss_of_a_step_has_the_load_balance_term_by_answer_tokens(
    tiny_base: Path, small_data: Path
) -> None:
    prepared = prepare(config(tiny_base, small_data, load_balance_weight=2.0))
    model = build_model(prepared).train()
    rows = EncodedRows(prepared.train[0].rows[:4], [0] * 4)
    batch = Collator(pad_token_id=0)([rows[i] for i in range(4)])
    trainer = ManyTaskTrainer.__new__(ManyTaskTrainer)
    trainer.route_by_task, trainer.task_names, trainer._sums = False, prepared.task_names, None
    trainer.balanced, trainer.accelerator = (
        False,
        SimpleNamespace(num_processes=1, unwrap_model=lambda model: model),
    )
    with model.load_balance() as balance:
        plain = trainer.compute_loss(model, batch, num_items_in_batch=100)
    trainer.balanced = True
    answers = (batch["labels"][:, 1:] != -100).sum()
    term = balance.loss()
    assert term > 2.0  # 1 is the least, and the weight is 2
    got = trainer.compute_loss(model, batch, num_items_in_batch=100)
    torch.testing.assert_close(got, plain + term * answers / 100)
