"""`--model` takes any causal language model: one tiny random model of each family goes through the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, set_seed

from manylora.cli import main

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "phi": {"num_key_value_heads": 2},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neox": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_job_runs_on(
    family: str, tiny_base: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    sizes = {} if family == "gpt2" else SIZES
    config = CONFIG_MAPPING[family](
        **{**sizes, **FAMILIES[family]},
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    command = ["train", "--model", tmp_path / "base", "--data", small_data, "--epochs", 1, "--device", "cpu"]
    assert main([*map(str, command), "--learning-rate", "0.01", "--out", str(run)]) == 0
    assert "mean" in capsys.readouterr().out
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(0 < row["loss"] < 100 for row in metrics if "loss" in row)
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    again = [
        "evaluate",
        "--adapter",
        run,
        "--data",
        small_data / "test",
        "--device",
        "cpu",
        "--out",
        tmp_path / "again",
    ]
    assert main([*map(str, again), "--batch-size", "4"]) == 0
    reloaded = json.loads((tmp_path / "again" / "scores.json").read_text(encoding="utf-8"))
    assert reloaded["tasks"] == scores["tasks"]
