"""The committed cells give the numbers that they gave when they were committed, to the byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from manylora.files import json_text
from manylora.studies.config import parse_study
from manylora.studies.results import read_cells
from manylora.studies.summary import summarise

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
SUMS = {
    "ablations": "b91fdb409403f18a",
    "families-gpt2": "6eb6ab1547c19b68",
    "families-llama": "f96956215da0a17a",
    "families-mistral": "e8629d281cd2e832",
    "families-qwen": "26737186e77b6d72",
    "federated": "688f54d09be1bcdc",
    "long-runs": "3e41d3f89df5fed4",
    "transfer": "fddd25394abe822b",
    "what-to-share-encoder": "8f61cf99c8a9fe96",
    "what-to-share-task": "7f1c5fa9931f6305",
    "what-to-share": "539b7ccefe9e496c",
}
"""Of each study.json as version 0.1 wrote it from the same cells: the beginning of its SHA-256."""


@pytest.mark.parametrize("name", SUMS)
def test_study_json_comes_again_to_the_byte(name: str) -> None:
    head, rows = read_cells(STUDIES / f"{name}.cells.jsonl")
    facts = {key: value for key, value in head.items() if key not in ("kind", "study")}
    found = summarise(parse_study(head["study"]), rows, facts).to_dict()
    for costs in found["costs"]:
        costs.pop("bytes_sent", None)  # which stood in the cells alone
    assert hashlib.sha256(json_text(found, indent=2).encode()).hexdigest()[:16] == SUMS[name]


def test_every_committed_study_is_among_them() -> None:
    assert {path.name.removesuffix(".cells.jsonl") for path in STUDIES.glob("*.cells.jsonl")} == set(SUMS)
