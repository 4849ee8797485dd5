"""A GGUF file as a base: what is read, where it is kept, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="the gguf package reads the files: pip install gguf")

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_models import KINDS, TEXTS, base, reference, row, tokenizer
from manylora.errors import ModelError
from manylora.serving.gguf import write_model
from manylora.training.gguf_base import cache_folder, cached_base, find_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "base.gguf")


def written(path: Path, kind: str = "llama", quantisation: Any = "f32", **settings: Any) -> Path:
    model, tok = base(kind, **settings)
    write_model(path, model, tok, quantisation=quantisation)
    return path


def rewritten(path: Path, changes: dict[str, Any]) -> Path:
    """The file with other values of some metadata, or more of it."""
    reader = gguf.GGUFReader(path)
    other = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(other, reader.fields["general.architecture"].contents())
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    types = {key: field.types[0] for key, field in reader.fields.items()}
    for key, value in {**values, **changes}.items():
        if key == "general.architecture":
            continue
        kind = types.get(key)
        kind = kind if kind is not None else gguf.GGUFValueType.get_type(value)
        sub = reader.fields[key].types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other


# ---- what is read


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_as_it_was_written(kind: str, tmp_path: Path) -> None:
    model, tok = base(kind)
    folder = cached_base(written(tmp_path / f"{kind}.gguf", kind))

    back = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    weights = back.state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6 if "gemma" in kind else 0)
    prompt, continuation = row(len(tok))
    assert reference(back, prompt, continuation)[0] == pytest.approx(
        reference(model, prompt, continuation)[0], abs=1e-5
    )
    assert back.config.eos_token_id == tok.eos_token_id
    again = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:-1] if kind == "mistral" else TEXTS:  # see the note that writing gives
        assert again(text)["input_ids"] == tok(text)["input_ids"], text
        assert again.decode(again(text, add_special_tokens=False)["input_ids"]) == text
    assert (again.eos_token, again.bos_token, again.pad_token) == (
        tok.eos_token,
        tok.bos_token,
        tok.pad_token,
    )
    assert again.chat_template == tok.chat_template


@pytest.mark.parametrize(
    ("quantisation", "dtype"),
    [("f16", "float16"), ("bf16", "bfloat16"), ("q8_0", "float32"), ("f32", "float32")],
)
def test_a_file_is_kept_in_a_type_that_holds_its_values(
    quantisation: str, dtype: str, tmp_path: Path
) -> None:
    model, tok = base("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16 if quantisation == "bf16" else torch.float16))
    path = tmp_path / "base.gguf"
    write_model(path, model, tok, quantisation=quantisation)
    back = AutoModelForCausalLM.from_pretrained(cached_base(path))
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")

    found = back.model.layers[1].mlp.up_proj.weight.detach()

    assert str(back.dtype) == f"torch.{dtype}"
    assert found.float().numpy() == pytest.approx(gguf.dequantize(tensor.data, tensor.tensor_type), abs=0)


def test_vectors_that_16_bits_cannot_hold_keep_a_file_in_float32(tmp_path: Path) -> None:
    model, tok = base("llama")
    write_model(tmp_path / "base.gguf", model, tok, quantisation="f16")
    back = AutoModelForCausalLM.from_pretrained(cached_base(tmp_path / "base.gguf"))
    assert torch.equal(back.model.norm.weight, model.model.norm.weight)


def test_an_end_of_turn_token_ends_answers_too(tmp_path: Path) -> None:
    model, tok = base("qwen2")
    model.generation_config.eos_token_id = [tok.eos_token_id, 0]
    write_model(tmp_path / "base.gguf", model, tok, quantisation="f32")
    back = AutoModelForCausalLM.from_pretrained(cached_base(tmp_path / "base.gguf"))
    assert back.generation_config.eos_token_id == [tok.eos_token_id, 0]


def test_what_was_read_can_be_saved_again(file: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(cached_base(file))

    model.save_pretrained(tmp_path / "again")

    assert not hasattr(model.config, "quantization_config")
    assert (tmp_path / "again" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type = 'yarn'"),
        ({"llama.some_new_setting": 1}, "some_new_setting"),
        ({"tokenizer.ggml.pre": "mpt"}, "rule 'mpt'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer is 'bert'"),
        ({"llama.embedding_length": 128}, "does not fit"),
        ({"llama.block_count": 3}, r"lacks the tensor 'blk\.2\."),
        ({"llama.block_count": 1}, r"holds the tensor 'blk\.1\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_read_wrongly_is_refused(
    changes: dict[str, Any], said: str, file: Path, cache: Path
) -> None:
    with pytest.raises(ModelError, match=rf"changed\.gguf cannot be read: .*{said}.*\.$"):
        cached_base(rewritten(file, changes))
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == ["seen"]


def test_rotary_embeddings_stretched_as_no_llama_are_refused(tmp_path: Path) -> None:
    rope = {**KINDS["llama-3"][1]["rope_parameters"], "factor": 5.0}
    with pytest.raises(ModelError, match="stretched"):
        cached_base(written(tmp_path / "base.gguf", "llama-3", rope_parameters=rope))


@pytest.mark.parametrize("content", [b"not a gguf file at all", b"GGUF\x03\x00\x00\x00broken", None])
def test_a_damaged_file_is_named_in_one_line(content: bytes | None, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40000] if content is None else content)
    with pytest.raises(ModelError, match=r"base\.gguf cannot be read: it is [^\n]*$"):
        cached_base(file)


# ---- which file is meant


def test_a_file_a_folder_and_a_package_lead_to_the_one_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "some_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('its code runs')", encoding="utf-8")
    (package / "model.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))

    assert find_gguf(str(file)) == file
    assert find_gguf(str(package)) == package / "model.gguf"
    assert find_gguf("package:some_model") == package / "model.gguf"
    for other in ("package:no_such_package", "hub/name", str(tmp_path / "cache"), "embedded"):
        assert find_gguf(other) is None
    (package / "config.json").write_text("{}", encoding="utf-8")
    assert find_gguf("package:some_model") is None


def test_several_files_missing_ones_and_parts_are_refused(file: Path) -> None:
    (file.parent / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(base\.gguf, second\.gguf"):
        find_gguf(str(file.parent))
    with pytest.raises(ModelError, match="does not exist"):
        find_gguf(str(file.parent / "third.gguf"))
    part = file.rename(file.with_name("base-00001-of-00003.gguf"))
    with pytest.raises(ModelError, match="one part of 3"):
        find_gguf(str(part))


# ---- where it is kept


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MANYLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/manylora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "manylora"


def test_the_second_start_reads_nothing_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = cached_base(file)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert "reading base.gguf once" in capsys.readouterr().err

    assert cached_base(file) == folder
    moved = file.rename(file.with_name("moved.gguf"))
    assert cached_base(moved) == folder

    assert capsys.readouterr().err == ""
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manylora-gguf.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_folder_is_made_anew(name: str, damage: str, file: Path) -> None:
    folder = cached_base(file)
    path = folder / name
    whole = path.read_bytes()
    times = path.stat()
    if damage == "gone":
        path.unlink()
    else:
        middle = len(whole) // 2
        changed = bytes([whole[middle] ^ 1])
        path.write_bytes(
            whole[:middle] if damage == "cut" else whole[:middle] + changed + whole[middle + 1 :]
        )
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert cached_base(file) == folder

    assert path.read_bytes() == whole
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_copied_cache_is_checked_and_kept(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = cached_base(file)
    copy = tmp_path / "copy" / "gguf" / folder.name
    copy.mkdir(parents=True)
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    made = (copy / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "copy"))

    assert cached_base(file) == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == made


def test_another_file_in_its_place_is_another_model(file: Path, tmp_path: Path) -> None:
    first = cached_base(file)
    stat = file.stat()
    model, tok = base("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    write_model(file, model, tok, quantisation="f32")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size

    second = cached_base(file)

    assert second != first
    found = AutoModelForCausalLM.from_pretrained(second).get_input_embeddings().weight
    assert torch.equal(found, model.get_input_embeddings().weight)


SCRIPT = (
    "import sys; from pathlib import Path; from manylora.training.gguf_base import cached_base\n"
    "print(cached_base(Path(sys.argv[1])))"
)


def start(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_of_two_processes_one_makes_the_folder_and_both_have_it(file: Path, cache: Path) -> None:
    both = [start(file), start(file)]
    said = [process.communicate(timeout=120) for process in both]

    assert [process.returncode for process in both] == [0, 0], said
    folders = {out.strip() for out, _ in said}
    assert len(folders) == 1
    assert sum("reading base.gguf once" in err for _, err in said) == 1
    AutoModelForCausalLM.from_pretrained(folders.pop())
    assert not list(cache.glob(".*partial*"))


def test_a_process_killed_while_it_writes_leaves_nothing_that_counts(file: Path, cache: Path) -> None:
    process = start(file)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".*.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    left = list(cache.glob(".*.partial-*"))
    assert left, "it was through before it was killed"
    assert not [
        path for path in cache.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "seen"
    ]

    folder = cached_base(file)

    AutoModelForCausalLM.from_pretrained(folder)
    assert not list(cache.glob(".*.partial-*"))


def test_a_cache_that_cannot_be_written_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_CACHE", str(file))  # a file, not a folder
    with pytest.raises(ModelError, match=r"cannot be kept in .*set MANYLORA_CACHE"):
        cached_base(file)


def test_the_manifest_names_the_source(file: Path) -> None:
    manifest = json.loads((cached_base(file) / "manylora-gguf.json").read_text(encoding="utf-8"))
    assert manifest["name"] == "base.gguf"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= manifest["files"].keys()
    assert tokenizer("smollm").chat_template
