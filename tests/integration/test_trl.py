"""TRL's SFTTrainer, transformers' Trainer, pipeline and load_adapter take the method as they take LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    pipeline,
    set_seed,
)

from manylora import ManyLoraConfig
from manylora.assets import embedded_base_path
from manylora.errors import RoutingError
from manylora.training import ExpertCollator

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'manylora[trl]'")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::FutureWarning"
    ),  # TRL and transformers about each other's next versions
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WORDS = ("red", "green", "blue", "cat")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded_base_path())


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with the tokenizer of the embedded base."""
    folder = tmp_path_factory.mktemp("trl") / "base"
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(**columns: list[int]) -> Dataset:
    count = 16
    data = {
        "prompt": [f"Say {WORDS[i % 4]} ({i})." for i in range(count)],
        "completion": [f" {WORDS[i % 4]}" for i in range(count)],
    }
    return Dataset.from_dict({**data, **columns})


def trainer(
    base: Path, out: Path, data: Dataset, *, collator: Any = None, adapter: Any = None, **args: Any
) -> Any:
    """An SFTTrainer with gradient checkpointing, as is SFTConfig's default."""
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 32,
        "seed": 0,
    }
    options = {"r": 4, "num_experts": 3, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=trl.SFTConfig(**{**settings, **args}),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base),
        data_collator=collator,
        peft_config=ManyLoraConfig(**{**options, **(adapter or {})}),
    )


def losses(sft: Any) -> list[float]:
    return [entry["loss"] for entry in sft.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("sft")
    sft = trainer(base, out / "runs", rows())
    sft.train()
    sft.save_model(str(out / "adapter"))
    return sft, out / "adapter"


def test_sft_trains_the_adapter_alone_on_completions(trained: tuple[Any, Path], base: Path) -> None:
    sft, _ = trained
    assert isinstance(sft.model, PeftModel)
    assert sft.model.active_peft_config.peft_type == "MANYLORA"
    assert losses(sft)[-1] < losses(sft)[0] - 0.1
    assert all(
        ("manylora_experts" in name) == parameter.requires_grad
        for name, parameter in sft.model.named_parameters()
    )
    reference = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, value in sft.model.unload().state_dict().items():
        assert torch.equal(value, reference[name])
    batch = next(iter(sft.get_train_dataloader()))
    kept = (batch["labels"] != -100).sum(1)
    assert (kept < batch["attention_mask"].sum(1)).all()


def test_what_sft_saved_loads_everywhere(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sft = trainer(base, tmp_path / "runs", rows(), max_steps=2)
    sft.train()
    sft.save_model(str(tmp_path / "adapter"))
    ids = tokenizer("Say blue.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = sft.model.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        assert not torch.allclose(plain(input_ids=ids).logits, expected)
        auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
        torch.testing.assert_close(auto.eval()(input_ids=ids).logits, expected)
        plain.load_adapter(str(tmp_path / "adapter"))  # transformers' own, in place
        torch.testing.assert_close(plain.eval()(input_ids=ids).logits, expected)
    words = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")("Say blue.", **words)
        for model in (plain, auto)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0]["generated_text"]


PADDING_FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize("settings", [{"packing": True}, PADDING_FREE], ids=["packing", "padding_free"])
def test_packed_batches_work_with_the_token_router(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    sft = trainer(base, tmp_path, rows(), max_steps=2, **settings)
    sft.train()
    assert len(losses(sft)) == 2
    assert all(0 < loss < 20 for loss in losses(sft))


TASK = {"router": "task"}
EXPERTS = [0, 1, 2, 0] * 4


def collator(tokenizer: PreTrainedTokenizerBase) -> ExpertCollator:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return ExpertCollator(collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id))


def test_the_task_router_trains_each_rows_expert(
    base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sft = trainer(
        base,
        tmp_path,
        rows(expert_ids=[0, 2] * 8),
        collator=collator(tokenizer),
        adapter=TASK,
        remove_unused_columns=False,
    )
    before = {name: p.detach().clone() for name, p in sft.model.named_parameters() if name.endswith("lora_A")}
    sft.train()
    assert losses(sft)[-1] < losses(sft)[0] - 0.1
    for name, parameter in sft.model.named_parameters():
        if name in before:
            moved = (parameter - before[name]).view(3, 4, -1).abs().amax((1, 2)) > 0
            assert moved.tolist() == [True, False, True]


def test_the_task_router_without_ids_says_what_it_needs(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="needs expert_ids"):
        trainer(base, tmp_path, rows(), adapter=TASK).train()


def test_the_task_router_refuses_packed_batches(base: Path, tmp_path: Path) -> None:
    sft = trainer(base, tmp_path, rows(), adapter=TASK, **PADDING_FREE)
    with pytest.raises(RoutingError, match="pack"), sft.model.base_model.route(EXPERTS[:8]):
        sft.train()


def test_a_collator_that_packs_or_drops_the_column_is_refused() -> None:
    packing = ExpertCollator(collator=lambda rows: {"input_ids": torch.zeros(1, 6, dtype=torch.long)})
    two = [{"input_ids": [1, 2, 3], "expert_ids": 0}] * 2
    with pytest.raises(RoutingError, match="1 rows of 2 examples"):
        packing(two)
    with pytest.raises(RoutingError, match="remove_unused_columns=False"):
        packing([{"input_ids": [1, 2, 3]}])
