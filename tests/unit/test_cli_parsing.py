"""From words to a configuration: what a shell hands over is what the run gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from manylora.cli.options import PredictOptions, TrainOptions
from manylora.cli.parsing import parse
from manylora.errors import ConfigError


def train(*words: str) -> tuple[TrainOptions, set[str]]:
    return parse(TrainOptions, words, verb="train", description="")


def predict(*words: str) -> PredictOptions:
    return parse(
        PredictOptions,
        ["--adapter", "x", *words],
        verb="predict",
        description="",
        positional=("prompt",),
        texts=("prompt", "input"),
    )[0]


def test_dashes_flags_and_given() -> None:
    options, given = train("--learning-rate", "1e-4", "--dry-run", "--num_experts=5", "--seed", "0")
    assert (options.learning_rate, options.dry_run, options.num_experts, options.seed) == (1e-4, True, 5, 0)
    assert given == {"learning_rate", "dry_run", "num_experts", "seed"}


@pytest.mark.parametrize(
    ("words", "prompt", "raw"),
    [
        (["--raw", "hello"], "hello", True),
        (["hello", "--raw"], "hello", True),
        (["--raw", "true", "hello"], "hello", True),
        (["--raw", "False", "hello"], "hello", False),
        (["--raw=false", "hello"], "hello", False),
        (["--raw", "-3 + 4 ="], "-3 + 4 =", True),
        (["-hello"], "-hello", False),
        (["-"], "-", False),
        (["--", "hello"], "hello", False),
        (["--", "--raw"], "--raw", False),
    ],
)
def test_a_flag_takes_no_word_that_is_not_true_or_false(words: list[str], prompt: str, raw: bool) -> None:
    options = predict(*words)
    assert (options.prompt, options.raw) == (prompt, raw)


@pytest.mark.parametrize("words", [["--out"], ["--out", "--dry-run"], ["--out", "--sed", "3"], ["--config"]])
def test_an_option_is_no_value_of_the_one_before(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"argument {words[0]}: expected one argument"):
        train(*words)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_shown_whatever_else_stands_there(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train("--r", "4", "stray", word)
    assert end.value.code == 0
    assert "Usage: manylora train [options]" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["null", "# a comment?", "[1, 2]", "--abc", "-3 + 4 =", "a: b", "ÄÖ\n1"])
def test_a_prompt_arrives_as_it_was_typed(text: str) -> None:
    assert predict("--prompt=" + text).prompt == text
    if not text.startswith("-"):
        assert predict(text).prompt == text
        assert predict(text, "--task", "t").prompt == text


def test_words_keep_their_order() -> None:
    with pytest.raises(ConfigError, match="unknown option second"):
        predict("first", "--raw", "second")
    assert predict("first", "--raw").prompt == "first"
    assert train("--seed", "08", "--limit=007")[0].limit == 7


def test_a_negative_number_is_a_value_and_then_refused() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is -0\.001"):
        train("--learning-rate", "-1e-3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning-rate", "1"], "did you mean --learning-rate"),
        (["--share", "C"], "--share C: expected one of 'A', 'B', 'none'"),
        (["--r", "eight"], r"--r eight: expected int\.$"),
        (["--limit", "some"], r"--limit some: expected int\.$"),
        (["--limit="], r"--limit: expected int\.$"),
        (["--limit", " "], r"--limit: expected int\.$"),
        (["--dry-run=no"], r"--dry-run no: expected true or false\.$"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(*words)


def test_unknown_keys_of_a_config_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lerning_rate: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="lerning_rate"):
        train("--config", str(path))
    path.write_text("r: 3\n", encoding="utf-8")
    assert train("--config", str(path))[0].r == 3
    assert train("--config", str(path), "--r", "5")[0].r == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: null", r"run\.yaml: data is null, not text"),
        ("epochs: .inf", r"run\.yaml: epochs is inf, not a finite number"),
        ("r: eight", r"run\.yaml: r is 'eight', not a whole number"),
        ("share: C", r"run\.yaml: share is 'C', not one of 'A', 'B', 'none'"),
        ("r: 4\nr: 8", r"run\.yaml cannot be read.*'r' stands twice"),
        ("&a [*a]", r"run\.yaml cannot be read"),
        ("- r", r"run\.yaml holds no options"),
    ],
)
def test_values_of_a_config_file_are_checked_like_given_ones(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        train("--config", str(path))


def test_options_win_over_files_wherever_they_stand_and_later_files_over_earlier(tmp_path: Path) -> None:
    for name, text in (("a", "r: 3\nlora_alpha: 4"), ("b", "r: 5\nlearning_rate: 1e-3")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    config, given = train("--r", "7", "--config", str(tmp_path / "a"), f"--config={tmp_path / 'b'}")
    assert (config.r, config.lora_alpha, config.learning_rate) == (7, 4.0, 0.001)
    assert given == {"r"}
    config, _ = train("--config", str(tmp_path / "a"), "--config", str(tmp_path / "b"))
    assert (config.r, config.lora_alpha) == (5, 4.0)


@pytest.mark.parametrize("name", ["data", "model", "test", "out", "resume", "tasks", "target-modules"])
@pytest.mark.parametrize(("value", "message"), [("", "is empty"), ("x\udcff", r"\\udcff"), ("x\0", "x00")])
def test_texts_that_cannot_be_are_named(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name.replace('-', '_')} is.*{message}|{message}"):
        train(f"--{name}", value)


def test_a_prompt_may_hold_any_bytes() -> None:
    options = predict("caf\udce9", "--input", "null \udcff")
    assert (options.prompt, options.input) == ("caf?", "null ?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "1e308"], r"epochs is 1e\+308; give a finite number"),
        (["--epochs", ".inf"], "epochs is inf"),
        (["--batch-size", "1" + "0" * 30], "batch_size is 1000"),
        (["--warmup", "1e300"], r"warmup is 1e\+300"),
        (["--lora-alpha", "1e308"], r"lora_alpha is 1e\+308"),
    ],
)
def test_numbers_have_bounds(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(*words)


def test_target_modules_as_names_or_expression() -> None:
    def targets(text: str) -> object:
        return train("--target-modules", text)[0].resolved().target_modules

    assert targets("q_proj") == ["q_proj"]
    assert targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert targets("all-linear") == "all-linear"
    assert targets(r".*layers\.\d{1,2}\..*q_proj") == r".*layers\.\d{1,2}\..*q_proj"
