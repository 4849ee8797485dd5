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
        PredictOptions, ["--adapter", "x", *words], verb="predict", description="", positional=("prompt",)
    )[0]


def test_dashes_flags_and_given() -> None:
    options, given = train("--learning-rate", "1e-4", "--dry-run", "--num_experts=5", "--seed", "0")
    assert (options.learning_rate, options.dry_run, options.num_experts, options.seed) == (1e-4, True, 5, 0)
    assert given == {"learning_rate", "dry_run", "num_experts", "seed"}


@pytest.mark.parametrize("text", ["null", "# a comment?", "[1, 2]", "--abc", "-3 + 4 =", "a: b", "ÄÖ\n1"])
def test_a_prompt_arrives_as_it_was_typed(text: str) -> None:
    assert predict("--prompt=" + text).prompt == text
    if not text.startswith("-"):
        assert predict(text).prompt == text
        assert predict(text, "--task", "t").prompt == text


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


def test_target_modules_as_names_or_expression() -> None:
    def targets(text: str) -> object:
        return train("--target-modules", text)[0].resolved().target_modules

    assert targets("q_proj") == ["q_proj"]
    assert targets("q_proj, v_proj") == ["q_proj", "v_proj"]
    assert targets("all-linear") == "all-linear"
    assert targets(r".*layers\.\d{1,2}\..*q_proj") == r".*layers\.\d{1,2}\..*q_proj"
