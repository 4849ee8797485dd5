"""Adapters from disk as matrices: formats, names, ranks, labels, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from manylora.adapters import ManyLoraConfig
from manylora.analysis import (
    Place,
    RandomBaseline,
    load_source,
    load_sources,
    locate,
    similarities,
    with_labels,
)
from manylora.errors import ModelError
from tiny_models import adapted, fill, llama

BASELINE = RandomBaseline(seed=0, draws=5)


def lora(folder: Path, *, seed: int = 0, base: nn.Module | None = None, **settings: Any) -> Path:
    """A plain LoRA of a tiny model, with B filled, saved as PEFT saves it."""
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": "all-linear", **settings}
    model = get_peft_model(llama() if base is None else base, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A" in name or ".lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def ours(folder: Path, **settings: Any) -> Path:
    adapted(**settings).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(("share", "a_count", "b_count"), [("A", 1, 3), ("B", 3, 1), ("none", 3, 3)])
def test_our_experts_are_those_that_the_model_uses(
    share: str, a_count: int, b_count: int, tmp_path: Path
) -> None:
    model = adapted(share=share, num_experts=3, rank_pattern={"q_proj": 4})
    model.save_pretrained(tmp_path / "x", save_embedding_layers=False)
    source = load_source(tmp_path / "x")
    assert (source.format, source.share, source.num_experts, source.router) == ("manylora", share, 3, "token")
    assert len(source.layers) == 14
    name = "model.layers.1.self_attn.q_proj"
    bank = model.get_base_model().get_submodule(name).bank("default")
    layer = source.layers[name]
    assert list(layer.A) == ([""] if a_count == 1 else ["expert-0", "expert-1", "expert-2"])
    assert list(layer.B) == ([""] if b_count == 1 else ["expert-0", "expert-1", "expert-2"])
    for expert in range(3):
        A, B = bank.layout.expert_factors(bank.lora_A, bank.lora_B, expert)
        assert A.shape[0] == 4
        torch.testing.assert_close(layer.A["" if a_count == 1 else f"expert-{expert}"], A.detach())
        torch.testing.assert_close(layer.B["" if b_count == 1 else f"expert-{expert}"], B.detach())


def test_a_peft_lora_and_ours_with_one_expert_give_the_same_numbers(tmp_path: Path) -> None:
    for seed in (0, 1):
        lora(tmp_path / f"plain-{seed}", seed=seed, rank_pattern={"v_proj": 3})
        weights = load_file(tmp_path / f"plain-{seed}" / "adapter_model.safetensors")
        config = ManyLoraConfig(
            r=2, num_experts=1, router=None, target_modules="all-linear", rank_pattern={"v_proj": 3}
        )
        get_peft_model(llama(), config).save_pretrained(
            tmp_path / f"ours-{seed}", save_embedding_layers=False
        )
        renamed = {
            key.replace(".lora_", ".manylora_experts.lora_").removesuffix(".weight"): tensor
            for key, tensor in weights.items()
        }
        save_file(renamed, tmp_path / f"ours-{seed}" / "adapter_model.safetensors", metadata={"format": "pt"})
    found = {
        kind: similarities([load_source(tmp_path / f"{kind}-{seed}") for seed in (0, 1)], baseline=BASELINE)
        for kind in ("plain", "ours")
    }
    assert len(found["plain"]) == 28
    for one, other in zip(found["plain"], found["ours"], strict=True):
        assert (one.name, one.matrix) == (other.name, other.matrix)
        assert (one.mean_cosine, one.mean_squared) == (other.mean_cosine, other.mean_squared)
        rank = 3 if one.module == "v_proj" else 2
        dimension = load_source(tmp_path / "ours-0").layers[one.name].vectors(one.matrix)[""].shape[1]
        assert one.baseline_squared == rank / dimension


def test_names_tell_layer_and_kind() -> None:
    names = ["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.up_proj", "lm_head"]
    assert list(locate(names).values()) == [
        Place(layer=3, module="q_proj"), Place(layer=3, module="up_proj"), Place(layer=None, module="lm_head"),
    ]  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=32))


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=61,
            num_labels=3,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=61)
    )


@pytest.mark.parametrize(
    ("base", "settings", "kinds", "count"),
    [
        (
            gpt2,
            {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
            {"c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"},
            8,
        ),
        (
            bert,
            {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
            {"query", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"},
            11,
        ),
        (t5, {"target_modules": ["q", "v"]}, {"SelfAttention.q", "EncDecAttention.q", "SelfAttention.v",
                                              "EncDecAttention.v"}, 12),
    ],
)  # fmt: skip
def test_other_families_are_read_by_their_names(
    base: Any, settings: dict[str, Any], kinds: set[str], count: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = load_source(lora(tmp_path / "x", base=base(), **settings))
    where = locate(source.layers)
    assert len(where) == count
    assert {place.module.removeprefix("bert.") for place in where.values()} >= kinds - {"pooler.dense"}
    assert {place.layer for place in where.values()} - {None} == {0, 1}
    found = similarities(
        [source, load_source(lora(tmp_path / "y", base=base(), seed=1, **settings))], baseline=BASELINE
    )
    assert len(found) == 2 * count
    assert all(0 < pair.mean_cosine < 1 for pair in found)


def test_a_classifier_with_our_experts_keeps_its_head_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ManyLoraConfig(
        task_type="SEQ_CLS",
        r=2,
        num_experts=2,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(bert(), config)
    fill(model)
    model.save_pretrained(tmp_path / "x")
    source = load_source(tmp_path / "x")
    assert len(source.layers) == 4
    assert len(similarities([source], baseline=BASELINE)) == 4  # A's two experts in each


def test_pairs_know_task_and_initialisation_where_the_source_does(tmp_path: Path) -> None:
    paths = [lora(tmp_path / name, seed=index) for index, name in enumerate("abc")]
    labels = {
        str(paths[0]): (("sums",), 0), str(paths[1]): (("sums",), 1), "c": (("stories",), 0),
    }  # fmt: skip
    known = with_labels(load_sources([str(path) for path in paths]), labels)
    found = {(p.left, p.right): (p.same_task, p.same_init) for p in similarities(known, baseline=BASELINE)}
    assert found == {("a", "b"): (True, False), ("a", "c"): (False, True), ("b", "c"): (False, False)}
    unknown = similarities([load_source(paths[0]), known[1]], baseline=BASELINE)
    assert {(p.same_task, p.same_init) for p in unknown} == {(None, None)}
    with pytest.raises(ModelError, match="nowhere names none of the adapters"):
        with_labels(known, {"nowhere": (("sums",), 0)})


def test_one_seed_is_one_initialisation_for_the_same_layers_and_ranks_alone(tmp_path: Path) -> None:
    paths = [lora(tmp_path / "a"), lora(tmp_path / "b"), lora(tmp_path / "c", r=3)]
    seeded = with_labels(load_sources([str(path) for path in paths]), dict.fromkeys("abc", ((), 0)))
    found = {(p.left, p.right): p.same_init for p in similarities(seeded, baseline=BASELINE)}
    assert found == {("a", "b"): True, ("a", "c"): False, ("b", "c"): False}


def test_experts_of_one_adapter_are_labelled_by_the_task_router(tmp_path: Path) -> None:
    routed = load_source(
        ours(tmp_path / "x", num_experts=2, share="B", router="task", task_names=["sums", "stories"])
    )
    assert {
        (p.left, p.right, p.matrix, p.same_task, p.same_init, p.one_adapter)
        for p in similarities([routed], baseline=BASELINE)
    } == {("x/sums", "x/stories", "A", False, False, True)}
    hydra = load_source(ours(tmp_path / "y", num_experts=2, share="A"))
    assert {
        (p.left, p.right, p.matrix, p.same_task, p.same_init)
        for p in similarities([hydra], baseline=BASELINE)
    } == {("y/expert-0", "y/expert-1", "B", None, True)}  # one A serves both


def test_a_zero_b_has_no_angle_and_is_left_out(tmp_path: Path) -> None:
    for name in "ab":
        get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
            tmp_path / name, save_embedding_layers=False
        )
    found = similarities(load_sources([str(tmp_path / "a"), str(tmp_path / "b")]), baseline=BASELINE)
    assert {pair.matrix for pair in found} == {"A"}


def test_a_trainers_output_folder_stands_for_its_checkpoints(tmp_path: Path) -> None:
    for step in (10, 200, 30):
        lora(tmp_path / "out" / f"checkpoint-{step}", seed=step)
    source = load_source(tmp_path / "out")
    assert list(source.snapshots) == [10, 30, 200]
    assert source.last_step == 200
    name = next(iter(source.layers))
    last = load_file(tmp_path / "out" / "checkpoint-200" / "adapter_model.safetensors")
    assert torch.equal(source.layers[name].A[""], last[f"base_model.model.{name}.lora_A.weight"])


def test_a_federated_run_stands_for_its_clients(tmp_path: Path) -> None:
    for index, client in enumerate(("sums", "stories", "a%2Fb")):
        lora(tmp_path / "run" / "clients" / client / "adapter", seed=index)
    for a_init, same in (("common", True), ("per_client", False)):
        settings = {"partition": "task", "a_init": a_init, "seed": 3}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
        sources = load_sources([str(tmp_path / "run")])
        assert {(source.name, source.tasks, source.seed) for source in sources} == {
            ("sums", ("sums",), 3), ("stories", ("stories",), 3), ("a/b", ("a/b",), 3),
        }  # fmt: skip
        pairs = similarities(sources, baseline=BASELINE)
        assert {(pair.same_task, pair.same_init) for pair in pairs} == {(False, same)}


def test_names_differ(tmp_path: Path) -> None:
    paths = [str(lora(tmp_path / run / "adapter")) for run in ("one", "two")]
    assert [source.name for source in load_sources(paths)] == ["one", "two"]
    same = [str(lora(tmp_path / run / "x")) for run in ("three", "four")]
    assert [source.name for source in load_sources(same)] == ["three-x", "four-x"]
    clients = [str(lora(tmp_path / run / "clients" / "x" / "adapter").parents[2]) for run in ("five", "six")]
    for run in clients:
        (Path(run) / "config.yaml").write_text("seed: 0\n")
    assert [source.name for source in load_sources(clients)] == ["five-x", "six-x"]
    with pytest.raises(ModelError, match="give each once"):
        load_sources([same[0], same[0]])


def broken(folder: Path, change: Any) -> Path:
    lora(folder)
    change(folder)
    return folder


def edit(**values: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, path)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def halved(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def one_sided(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "lora_A" in key}, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "neither a run folder nor a PEFT adapter folder"),
        (pickled, "pickled weights are not read"),
        (nan, "values that are not finite"),
        (halved, "are broken"),
        (one_sided, "is damaged"),
        (edit(peft_type="LOHA"), "holds a LOHA adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        load_source(broken(tmp_path / "x", change))


def test_settings_of_a_newer_peft_do_not_matter_here(tmp_path: Path) -> None:
    assert load_source(broken(tmp_path / "x", edit(some_new_setting=3))).format == "lora"


def test_adapters_of_different_bases_are_not_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = load_source(lora(tmp_path / "one"))
    wide = llama()
    wide.model.layers[0].self_attn.q_proj = nn.Linear(32, 64)
    other = load_source(lora(tmp_path / "other", base=wide))
    with pytest.raises(ModelError, match="32 inputs and 32 outputs, other with 32 and 64"):
        similarities([one, other], baseline=BASELINE)
    third = load_source(lora(tmp_path / "third", base=gpt2(), target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ModelError, match="no module in common"):
        similarities([one, third], baseline=BASELINE)


def test_loading_needs_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lora(tmp_path / "x")
    edit(base_model_name_or_path="nowhere/no-such-model")(folder)
    monkeypatch.setattr(PeftModel, "from_pretrained", None)
    assert len(load_source(folder).layers) == 14
