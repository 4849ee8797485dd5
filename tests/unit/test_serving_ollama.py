"""Modelfiles: the prompt an adapter was trained with, in Go's templates."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from gguf_models import CHATML, tokenizer
from manylora.data.examples import Example
from manylora.data.prompts import prompt_text
from manylora.errors import ConfigError, ModelError
from manylora.serving.ollama import chat_parts, modelfile

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are {{helpful}}<|im_end|>\n' }}{% endif %}"
    + CHATML.removeprefix("{% for m in messages %}")
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)


def with_template(template: str, kind: str = "smollm") -> PreTrainedTokenizerBase:
    import copy

    found = copy.deepcopy(tokenizer(kind))
    found.chat_template = template
    return found


def filled_in(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of the few actions that are used; checked once with Go's own text/template."""
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    start, _, loop = template.partition("{{ range .Messages }}")
    choice = re.fullmatch(r"(?s)\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}", start)
    start = (choice[1] if system else choice[2]) if choice else start
    branches = re.fullmatch(
        r'(?s)\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ end \}\}\{\{ end \}\}',
        loop,
    )
    assert branches
    by_role = {"user": branches[1], "assistant": branches[2], "system": ""}
    text = start.replace("{{ .System }}", system)
    text += "".join(by_role[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)
    return text.replace('{{ "{{" }}', "{{")


def conversations(with_system: bool) -> list[list[dict[str, str]]]:
    turns = [
        {"role": "user", "content": "Hi  there"},
        {"role": "assistant", "content": "Hello {x}"},
        {"role": "user", "content": "Bye\n"},
    ]
    system = {"role": "system", "content": "Be brief."}
    found = [turns[:1], turns]
    return found + ([[system, *turns[:1]], [system, *turns]] if with_system else [])


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM], ids=["chatml", "default system"])
@pytest.mark.parametrize("kind", ["smollm", "llama-bpe"], ids=["plain", "begins with a token"])
def test_the_template_makes_the_prompts_that_the_chat_template_makes(template: str, kind: str) -> None:
    tok = with_template(template, kind)
    made = chat_parts(tok).template()
    for messages in conversations(with_system=True):
        wanted = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Ollama adds the begin token itself where the tokenizer does
        begin = tok.bos_token if kind == "llama-bpe" and wanted.startswith(tok.bos_token) else ""
        assert begin + filled_in(made, messages) == wanted


def test_begin_tokens_of_later_turns_stay() -> None:
    tok = with_template(LLAMA2, "llama-bpe")
    made = chat_parts(tok).template()
    for messages in conversations(with_system=False):
        wanted = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tok.bos_token + filled_in(made, messages) == wanted


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'] | upper"),
        "{{ messages[-1]['content'] }}",
        CHATML.replace("{% for m in messages %}", "{{ messages | length }}{% for m in messages %}"),
        "{{ strftime_now('%d') }}" + CHATML,
        "{{ raise_exception('never') }}",
    ],
    ids=["upper", "last message", "count", "date", "refuses"],
)
def test_a_template_that_is_more_than_fixed_parts_is_refused(template: str) -> None:
    with pytest.raises(ModelError, match="serve it with llama-server"):
        chat_parts(with_template(template))


def test_the_alpaca_form_is_that_of_the_training_rows() -> None:
    text = modelfile("./base.gguf", adapter="./sums.gguf", prompt="alpaca", tokenizer=tokenizer("smollm"))
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./sums.gguf"]
    template = text.split('"""')[1]
    row = Example(task="sums", instruction="Add 1 and 2.")
    assert template.replace("{{ .Prompt }}", "Add 1 and 2.") == prompt_text(row)
    assert lines[-2:] == ["PARAMETER temperature 0", 'PARAMETER stop "<|im_end|>"']


def test_a_merged_model_has_no_adapter() -> None:
    text = modelfile("./sums.gguf", adapter=None, prompt="none", tokenizer=tokenizer("smollm"))
    assert "ADAPTER" not in text
    assert 'TEMPLATE """{{ .Prompt }}"""' in text


@pytest.mark.parametrize(
    ("prompt", "template", "error"),
    [
        ("json", CHATML, ConfigError),
        ("chat", None, ModelError),
        ("chat", CHATML.replace("user", '"""'), None),
    ],
)
def test_what_cannot_be_written_is_refused(prompt: Any, template: Any, error: Any) -> None:
    tok = with_template(template)
    if error is None:
        tok.chat_template = CHATML.replace("<|im_start|>", '"""')
        error = ModelError
    with pytest.raises(error):
        modelfile("./base.gguf", adapter=None, prompt=prompt, tokenizer=tok)
