"""The help of every verb: each option explained, in groups, its default where it has one."""

from __future__ import annotations

import dataclasses
import re

import pytest

from manylora.cli import options
from manylora.cli.help import field_notes, help_page
from manylora.jobs.evaluate import EvaluateConfig
from manylora.jobs.settings import AnalyzeConfig, ExportConfig

KINDS = {
    "analyze": AnalyzeConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    **{
        name.removesuffix("Options").lower(): kind
        for name, kind in vars(options).items()
        if name.endswith("Options") and name != "RunOptions"
    },
}


def page(verb: str) -> str:
    return help_page(KINDS[verb], verb=verb, description="What it does.", width=100)


def test_every_verb_with_options_of_its_own_is_here() -> None:
    assert set(KINDS) == {"train", "evaluate", "predict", "export", "federate", "analyze", "compare"}


@pytest.mark.parametrize("verb", KINDS)
def test_every_option_is_explained_once(verb: str) -> None:
    notes, text = field_notes(KINDS[verb]), page(verb)
    for field in dataclasses.fields(KINDS[verb]):
        assert len(notes[field.name]) > 10, field.name
        assert notes[field.name].count("Default:") <= 1, field.name
        option = f"--{field.name.replace('_', '-')}"
        assert len(re.findall(rf"^  {option}\b(?!-)", text, flags=re.MULTILINE)) == 1, option


def test_options_stand_in_groups_those_of_the_verb_first() -> None:
    titles = re.findall(r"^(\S.*):$", page("train"), flags=re.MULTILINE)
    assert titles[:4] == ["Options", "Settings of one run", "The base model", "Rows"]
    assert "Optimisation" in titles
    assert len(titles) == len(set(titles))


def test_defaults_are_values_or_said_in_words() -> None:
    text = " ".join(page("evaluate").split())
    assert "Rows per batch. It does not change the answers. [64]" in text
    assert "Default: the one the adapter was trained on, else the embedded one." in text
    text = " ".join(page("train").split())
    assert "or a Hub id. [embedded]" in text  # no "Default:" beside a value
    assert "--seed N" in text
    assert "validation rows are cut. [0]" in text
    assert "--gradient-checkpointing Recompute" in text  # a flag takes nothing, and is off
    assert "--share A|B|none" in text
