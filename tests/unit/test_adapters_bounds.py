"""What a stranger's adapter asks for is bounded before anything is built; its expressions end."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from manylora.adapters import ManyLoraConfig, check_folder, read_adapter, read_any, read_lora
from manylora.adapters.patterns import check_time
from manylora.errors import ConfigError, ManyLoraError, ModelError
from manylora.files import folder_sums, write_json
from manylora.training import load_adapter
from tiny_models import VOCAB, adapted, llama

BACKTRACKS = r"(a|aa|\w|\.|\w\w)+(\w+)+(\w+)+\$"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 10**8}, "r=100000000 with num_experts=3 takes .* MiB .*, and there are"),
        ({"rank_pattern": {"q_proj": 10**8}}, "takes .* MiB"),
        (
            {"trainable_token_indices": [3, VOCAB]},
            f"the token {VOCAB}, but the input embedding has {VOCAB} rows",
        ),
        ({"trainable_token_indices": {"embed_tokens": [10**12]}}, "embed_tokens has 61 rows"),
        ({"trainable_token_indices": {"nowhere": [1]}}, "'nowhere', which is no module"),
    ],
)
def test_sizes_are_looked_at_before_a_matrix_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(llama(), ManyLoraConfig(target_modules=["q_proj"], **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": BACKTRACKS},
        {"target_modules": ["q_proj"], "exclude_modules": BACKTRACKS},
        {"target_modules": ["q_proj"], "rank_pattern": {BACKTRACKS: 2}},
        {"target_modules": ["q_proj"], "modules_to_save": [BACKTRACKS]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": BACKTRACKS},
    ],
)
def test_an_expression_that_backtracks_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.adapters.patterns._SECONDS", 1.0)
    with pytest.raises(ConfigError, match="backtracks"):
        get_peft_model(llama(), ManyLoraConfig(**settings))


def test_ordinary_expressions_are_not_slowed() -> None:
    names = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(200) for part in "qkvo"]
    began = time.perf_counter()
    check_time({"target_modules": [r".*layers\.\d{1,2}\..*(q|v)_proj", "q_proj", ".*"]}, names)
    assert time.perf_counter() - began < 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted(router="uniform").save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path / "run" / "adapter"


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": 10**400},
        {"lora_alpha": [1]},
        {"r": "8"},
        {"peft_type": "NOPE"},
        {"peft_type": 5},
        {"task_type": 5},
        {"rank_pattern": {"a": {}}},
        {"target_modules": {"a": 1}},
        {"task_names": [1, 2, 3]},
        {"trainable_token_indices": [1]},  # whose rows are not in the file
        {"num_experts": 9999},
        {"share": None},
        {"format_version": "1"},
        {"layers_to_transform": "x"},
    ],
)
def test_settings_of_any_type_are_one_line(values: dict[str, Any], folder: Path) -> None:
    change(folder, **values)
    with pytest.raises(ManyLoraError) as caught:
        load_adapter(llama(), folder)
    assert "\n" not in str(caught.value)


def test_a_plain_lora_of_absurd_rank_is_refused_by_its_weights(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    check_folder(tmp_path)
    for values, message in (
        ({"r": 10**8}, "rank 100,000,000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank 1,000"),
    ):
        shutil.copytree(tmp_path, tmp_path / "bad")
        change(tmp_path / "bad", **values)
        with pytest.raises(ModelError, match=message):
            load_adapter(llama(), tmp_path / "bad")
        shutil.rmtree(tmp_path / "bad")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


READERS = [lambda folder: load_adapter(llama(), folder), check_folder, read_lora, read_any]


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": BACKTRACKS},
        {"exclude_modules": BACKTRACKS},
        {"rank_pattern": {BACKTRACKS: 2}},
        {"alpha_pattern": {BACKTRACKS: 2}},
        {"layers_to_transform": [0], "layers_pattern": BACKTRACKS},
        {"target_modules": "("},
        {"alpha_pattern": {"a" * 3000: 2}},
        {"rank_pattern": [1]},
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_plain_lora_s_expressions_end(
    values: dict[str, Any], reader: Any, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader(lora)
    monkeypatch.setattr("manylora.adapters.patterns._SECONDS", 0.5)
    change(lora, **values)
    with pytest.raises(
        ManyLoraError, match=next(name for name in values if "pattern" in name or "modules" in name)
    ):
        reader(lora)


def test_an_expression_that_only_backtracks_on_the_base_s_names_ends(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.adapters.patterns._SECONDS", 0.5)
    change(lora, target_modules=r".*q_proj|.*(embed|(.|_)+(.|_)+(.|_)+(.|_)+(.|_)+)+tokens\$")
    with pytest.raises(ConfigError, match="backtracks"):
        load_adapter(llama(), lora)


@pytest.mark.parametrize("reader", [read_adapter, check_folder, read_any])
def test_readers_of_our_own_files_match_no_expression_for_ever(
    reader: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.adapters.patterns._SECONDS", 0.5)
    change(folder, alpha_pattern={BACKTRACKS: 2})
    with pytest.raises(ConfigError, match=r"alpha_pattern .* backtracks"):
        reader(folder)


@pytest.mark.parametrize("alpha", [0, 0.0, 1e308, -1e300, 1e-300, 10**200, True, "16", None, [16]])
@pytest.mark.parametrize("reader", READERS)
def test_a_plain_lora_s_alpha_that_is_no_scale_is_refused_by_name(
    alpha: Any, reader: Any, lora: Path
) -> None:
    for values, name in (
        ({"lora_alpha": alpha}, "lora_alpha="),
        ({"alpha_pattern": {"q_proj": alpha}}, "q_proj"),
    ):
        before = (lora / "adapter_config.json").read_text(encoding="utf-8")
        change(lora, **values)
        with pytest.raises(ModelError, match=name) as caught:
            reader(lora)
        assert "\n" not in str(caught.value)
        (lora / "adapter_config.json").write_text(before, encoding="utf-8")
    change(lora, lora_alpha=-16)  # takes away what was learnt, which PEFT's users do
    reader(lora)


@pytest.mark.parametrize("reader", [lambda folder: load_adapter(llama(), folder), check_folder, read_any])
def test_settings_that_nothing_knows_are_refused_by_name_and_off_they_say_nothing(
    reader: Any, folder: Path, lora: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for place, remedy in ((folder, "remove them, or install the manylora"), (lora, "install the PEFT")):
        change(place, router_topk=None, use_more=False)
        reader(place)
        assert not [str(one.message) for one in recwarn if "Unexpected" in str(one.message)]
        change(place, router_topk=1)
        if (place, reader) == (lora, read_any):  # a reader of matrices alone
            reader(place)
            continue
        with pytest.raises(ModelError, match=rf"\(router_topk\); {remedy}"):
            reader(place)
    change(folder, format_version=99)  # the settings of a later version are that version's
    with pytest.raises(ManyLoraError, match="format_version 99"):
        load_adapter(llama(), folder)


def test_a_flipped_bit_is_noticed_where_a_run_noted_the_file_and_a_copy_elsewhere_loads(folder: Path) -> None:
    run = folder.parent
    write_json(run / "state.json", {"state": "finished", "files": folder_sums(run)})
    load_adapter(llama(), folder)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] *= 2
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ManyLoraError, match=r"adapter_model\.safetensors is broken or was changed"):
        load_adapter(llama(), folder)
    shutil.copytree(folder, run.parent / "copy")
    load_adapter(llama(), run.parent / "copy")
    change(run.parent / "copy", lora_alpha=32)  # a copy is its owner's
    load_adapter(llama(), run.parent / "copy")
