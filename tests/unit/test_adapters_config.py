"""The settings: what is refused and how, and what a saved file holds."""

from __future__ import annotations

import json
import pickle

import pytest
from peft import PeftConfig

from formulas import parameters_per_layer
from manylora.adapters import FORMAT_VERSION, ManyLoraConfig
from manylora.adapters.bank import ExpertBank
from manylora.errors import ConfigError, ManyLoraError, TargetModulesError

BAD = [
    ({"r": 0}, "r=0"),
    ({"r": -4}, "r=-4"),
    ({"r": 2.5}, "r=2.5"),
    ({"r": True}, "r=True"),
    ({"lora_alpha": 0}, "lora_alpha=0"),
    ({"lora_alpha": "big"}, "lora_alpha='big'"),
    ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
    ({"num_experts": 0}, "num_experts=0"),
    ({"num_experts": 1.5}, "num_experts=1.5"),
    ({"share": "C"}, "share='C'"),
    ({"share": "b"}, "share='b'"),
    ({"router": "tokens"}, "router='tokens'"),
    ({"num_experts": 2, "router": None}, "num_experts=2 with router=None"),
    ({"router": "task", "default_expert": 3}, "default_expert=3"),
    ({"router": "task", "default_expert": -1}, "default_expert=-1"),
    ({"router": "token", "default_expert": 0}, "default_expert=0"),
    ({"router": "task", "task_names": ["a", "b"]}, "2 names for 3 experts"),
    ({"router": "task", "task_names": ["a", "b", "a"]}, "twice"),
    ({"router_top_k": 0}, "router_top_k=0"),
    ({"router_top_k": 4}, "router_top_k=4"),
    ({"router_top_k": 1.0}, "router_top_k=1.0"),
    ({"router_temperature": 0}, "router_temperature=0"),
    ({"router_temperature": float("inf")}, "router_temperature=inf"),
    ({"load_balance_weight": -0.1}, "load_balance_weight=-0.1"),
    ({"router": "task", "router_top_k": 2}, "router_top_k=2 with router='task'"),
    ({"router": "uniform", "router_temperature": 2}, "router_temperature=2 with router='uniform'"),
    ({"num_experts": 1, "load_balance_weight": 0.01}, "load_balance_weight=0.01 with router='token'"),
    ({"task_names": "abc"}, "task_names='abc'"),
    ({"bias": "some"}, "bias='some'"),
    ({"init_weights": "gaussian"}, "init_weights='gaussian'"),
    ({"use_rslora": "no"}, "use_rslora='no'"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern['q_proj']=nan"),
    ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern['q_proj']=inf"),
    ({"target_modules": 5}, "target_modules=5"),
    ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'"),
    ({"modules_to_save": 3}, "modules_to_save=3"),
    ({"modules_to_save": [""]}, "modules_to_save=['']"),
    ({"target_modules": ["q"], "layers_to_transform": []}, "layers_to_transform=[]"),
    ({"target_modules": ["q"], "layers_to_transform": "1"}, "layers_to_transform='1'"),
    ({"target_modules": ["q"], "layers_to_transform": [0, -1]}, "layers_to_transform=[0, -1]"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj']=1.5"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern key '('"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj']"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj']='x'"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"target_modules": "("}, "target_modules='('"),
    ({"target_modules": [1]}, "target_modules=[1]"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern='h'"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform=[0]"),
    ({"format_version": FORMAT_VERSION + 1}, f"format_version {FORMAT_VERSION + 1}"),
    ({"format_version": 0}, "format_version 0"),
    ({"r": 10**12}, "r=1000000000000"),
    ({"lora_alpha": 1e308}, "lora_alpha=1e+308"),
    ({"lora_alpha": 1e-308}, "lora_alpha=1e-308"),
    ({"alpha_pattern": {"q_proj": 1e308}}, "alpha_pattern['q_proj']=1e+308"),
    ({"rank_pattern": {"q_proj": 10**12}}, "rank_pattern['q_proj']=1000000000000"),
    ({"num_experts": 10**9}, "num_experts=1000000000"),
    ({"router_temperature": 1e-300}, "router_temperature=1e-300"),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices=[-1]"),
    ({"trainable_token_indices": "abc"}, "trainable_token_indices='abc'"),
    ({"trainable_token_indices": {"embed_tokens": 3}}, "trainable_token_indices={'embed_tokens': 3}"),
    ({"target_modules": "(" * 900 + "a" + ")" * 900}, "nested too deeply"),
    ({"target_modules": "a" * 3000}, "3,000 characters"),
    ({"target_modules": ["q"] * 10_001}, "10,001 entries"),
]


@pytest.mark.parametrize(("settings", "shown"), BAD)
def test_bad_settings_name_the_value_in_one_line(settings: dict, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ManyLoraConfig(**settings)
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (ManyLoraError, ValueError))


def test_empty_targets_have_their_own_error() -> None:
    with pytest.raises(TargetModulesError):
        ManyLoraConfig(target_modules=set())


def test_defaults_are_the_papers() -> None:
    config = ManyLoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.num_experts) == (8, 16, 0.05, 3)
    assert (config.share, config.router) == ("B", "token")
    assert config.peft_type == "MANYLORA"


def test_file_round_trip_with_stable_bytes(tmp_path) -> None:
    config = ManyLoraConfig(
        r=4,
        num_experts=2,
        share="none",
        router="task",
        default_expert=1,
        target_modules=["v_proj", "q_proj", "k_proj"],
        rank_pattern={"q_proj": 2},
        task_names=["sum", "sort"],
        base_fingerprint="abc",
    )
    config.save_pretrained(tmp_path / "one")
    loaded = PeftConfig.from_pretrained(tmp_path / "one")
    assert type(loaded) is ManyLoraConfig
    assert loaded == config
    loaded.save_pretrained(tmp_path / "two")
    first, second = (tmp_path / part / "adapter_config.json" for part in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    fields = json.loads(first.read_text())
    assert fields["peft_type"] == "MANYLORA"
    assert fields["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert fields["format_version"] == 1  # the oldest that says it all


@pytest.mark.parametrize(
    ("settings", "version"),
    [
        ({"load_balance_weight": 0.01}, 1),  # changes training, not what the adapter computes
        ({"router_top_k": 2}, 2),
        ({"router_temperature": 0.5}, 2),
    ],
)
def test_the_file_asks_for_a_reader_that_knows_its_router_options(
    settings: dict, version: int, tmp_path
) -> None:
    ManyLoraConfig(**settings).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["format_version"] == version
    assert PeftConfig.from_pretrained(tmp_path) == ManyLoraConfig(**settings)


def test_a_file_from_before_the_router_options_loads_unchanged(tmp_path) -> None:
    ManyLoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    for name in ("router_top_k", "router_temperature", "load_balance_weight"):
        del fields[name]
    path.write_text(json.dumps(fields))
    assert PeftConfig.from_pretrained(tmp_path) == ManyLoraConfig(r=4, target_modules=["q_proj"])


def test_a_newer_file_says_why_it_does_not_load(tmp_path) -> None:
    ManyLoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ConfigError, match="install a newer manylora"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_pickled_config_comes_back_equal() -> None:
    config = ManyLoraConfig(target_modules=["q_proj"], num_experts=2)
    assert pickle.loads(pickle.dumps(config)) == config


def test_expert_of_a_task() -> None:
    config = ManyLoraConfig(router="task", num_experts=2, task_names=["sum", "sort"])
    assert config.expert_of("sort") == 1
    with pytest.raises(ConfigError, match=r"'copy' is unknown.*sum, sort"):
        config.expert_of("copy")
    with pytest.raises(ConfigError, match="no expert belongs to a task"):
        ManyLoraConfig(task_names=["sum", "sort"]).expert_of("sort")


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        # D = 10, O = 7, R = 2, N = 3 (method.md, "One layer, one question")
        ({"share": "B", "router": "token"}, 3 * 2 * 10 + 2 * 7 + 3 * 10),
        ({"share": "B", "router": "task"}, 3 * 2 * 10 + 2 * 7),
        ({"share": "A", "router": "token"}, 2 * 10 + 3 * 2 * 7 + 3 * 10),
        ({"share": "A", "router": "uniform"}, 2 * 10 + 3 * 2 * 7),
        ({"share": "none", "router": "token"}, 3 * 2 * (10 + 7) + 3 * 10),
        ({"share": "none", "router": "token", "num_experts": 1}, 2 * (10 + 7)),
    ],
)
def test_parameters_per_layer(settings: dict, count: int) -> None:
    config = ManyLoraConfig(r=2, **settings)
    bank = ExpertBank(in_features=10, out_features=7, rank=2, alpha=4, config=config)
    assert sum(parameter.numel() for parameter in bank.parameters()) == count
    assert parameters_per_layer(config, in_features=10, out_features=7) == count
