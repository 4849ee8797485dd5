"""Shared fixtures: a tiny random base with a real tokenizer, small data, and the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, and inherited by every process that a test starts. On CPUs with AMX, oneDNN's bfloat16
# product reads beyond the columns of a matrix whose number is no multiple of 32 and counts on multiplying that by zero,
# so NaN left there gets into clean rows (oneDNN issue 5717; mended by pull request 5723 in August 2026, not in torch
# 2.13). The tests are about our mathematics, in small odd shapes; the instructions below AMX get them right.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if find_spec("hypothesis"):  # not where only the tests over Flower run
    from hypothesis import settings

    # The same examples every time: a test fails for a change, not by the day.
    # `--hypothesis-profile default --hypothesis-seed N` looks further.
    settings.register_profile("same", derandomize=True)
    settings.load_profile("same")

WORDS = (
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "north",
    "south",
    "up",
    "down",
)


@pytest.fixture(autouse=True)
def nan_in_free_memory(request: pytest.FixtureRequest) -> None:
    """Tests that compute in bfloat16 do it in memory that is full of NaN (see `nan_memory`)."""
    values = getattr(getattr(request.node, "callspec", None), "params", {}).values()
    types = [str(value) for value in values if type(value).__name__ == "dtype"]  # without importing torch
    if "bfloat16" in request.node.name or "torch.bfloat16" in types:
        from nan_memory import fill_free_memory_with_nan

        fill_free_memory_with_nan()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random 2-layer Llama, 32 wide, whose byte-level tokenizer encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("models") / "tiny"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/ and test/: three tasks of 24 and 6 rows."""
    folder = tmp_path_factory.mktemp("data")
    tasks: dict[str, Callable[[list[str]], tuple[str, str]]] = {
        "last_word": lambda words: (f"Last of: {' '.join(words)}", words[-1]),
        "first_word": lambda words: (f"First of: {' '.join(words)}", words[0]),
        "swap": lambda words: (f"Swap: {words[0]} {words[1]}", f"{words[1]} {words[0]}"),
    }
    for split, size, shift in (("train", 24, 0), ("test", 6, 100)):
        (folder / split).mkdir()
        for name, make in tasks.items():
            rows = []
            for row in range(size):
                words = [WORDS[(row * 7 + shift + place * (row + 3)) % len(WORDS)] for place in range(3)]
                instruction, output = make(words)
                rows.append({"task": name, "instruction": f"{instruction} ({row + shift})", "output": output})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / split / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved adapters with random weights on the tiny base, by kind."""
    from exports import TASKS, make_adapter

    root = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "task": {"router": "task", "task_names": TASKS},
        "token": {"router": "token", "factor": 5.0},
        "uniform": {"router": "uniform"},
        "single": {"num_experts": 1, "router": None},
        "head": {"router": "task", "modules_to_save": ["lm_head"]},
    }
    return {kind: make_adapter(tiny_base, root / kind, **settings) for kind, settings in kinds.items()}


@pytest.fixture(scope="session")
def own_answers(
    adapters: dict[str, Path], small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Rows whose reference answers are the token-routed adapter's own, so that it scores 100 on them."""
    from manylora.data import load_examples
    from manylora.evaluation import generate_answers
    from manylora.jobs.subject import load_subject

    subject = load_subject(str(adapters["token"]), model=None, dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("own")
    for task, rows in load_examples(small_data / "test", split="test").items():
        answers = generate_answers(subject.model, subject.kind.tokenizer, rows, max_new_tokens=64)
        lines = [
            json.dumps({"task": task, "instruction": row.instruction, "output": answer or "none"}) + "\n"
            for row, answer in zip(rows, answers, strict=True)
        ]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in a folder of its own, where the default runs/ goes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
