"""What a study may say, and what it hears when it says something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from manylora.cli import main
from manylora.errors import ConfigError
from manylora.studies.config import Study, load_study, parse_study
from manylora.studies.presets import DEFAULT, PRESETS
from manylora.studies.results import read_cells
from manylora.studies.summary import summarise

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
SMALL: dict[str, Any] = {"name": "small", "methods": ["lora", "alora"], "settings": {"limit": 8}}


def with_(**more: Any) -> Study:
    return parse_study({**SMALL, **more})


def test_a_study_fills_in_what_it_does_not_say() -> None:
    study = with_()
    assert study.names == ["lora", "alora"]
    assert with_(methods=["lora", "moelora"]).reference == "lora"
    assert (study.reference, study.seeds, study.learning_rates) == ("alora", (0, 1), ())
    assert [claim.sentence for claim in study.claims] == ["alora scores higher than lora"]
    assert study.method("lora").settings == {"limit": 8, "method": "lora"}


def test_a_method_overrides_the_study_and_a_preset_the_defaults() -> None:
    study = with_(
        model="some/base",
        methods={
            "alora": None,
            "wide": {"preset": "alora", "r": 32, "limit": 4},
            "mine": {"method": "moelora"},
        },
    )
    assert study.method("wide").settings == {"model": "some/base", "limit": 4, "method": "alora", "r": 32}
    assert study.method("mine").settings["method"] == "moelora"


def test_methods_of_several_kinds() -> None:
    study = with_(methods=["fedsa", "fed-alora"], reference="fed-alora")
    assert {method.kind for method in study.methods} == {"federate"}
    assert with_(methods=["transfer-b"], reference="transfer-b").method("transfer-b").kind == "transfer"


def test_seeds_may_be_a_number() -> None:
    assert with_(seeds=5).seeds == (0, 1, 2, 3, 4)


def test_single_is_the_per_task_lora_where_there_is_one() -> None:
    assert with_().single_of("alora") is None
    assert with_(methods=["alora", "lora-per-task"]).single_of("alora") == "lora-per-task"
    own = with_(methods={"alora": {"single": "lora"}, "lora": None, "lora-per-task": None})
    assert own.single_of("alora") == "lora"


def test_groups_and_patterns_name_tasks() -> None:
    study = with_(groups={"few": ["*@8"], "both": ["a@8", "b@32"]})
    tasks = ["a@8", "a@32", "b@8", "b@32"]
    assert study.tasks_of("mean", tasks) == tasks
    assert study.tasks_of("few", tasks) == ["a@8", "b@8"]
    assert study.tasks_of("both", tasks) == ["a@8", "b@32"]
    assert study.tasks_of("a@32", tasks) == ["a@32"]
    with pytest.raises(ConfigError, match="'c' is no task"):
        study.tasks_of("c", tasks)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"metods": ["lora"]}, "the study has no setting 'metods'; did you mean 'methods'"),
        ({"methods": {"alora": {"rr": 3}}}, "method alora: kind train has no setting 'rr'; did you mean 'r'"),
        ({"settings": {"limitt": 3}}, r"method lora: .*no setting 'limitt'; did you mean 'limit'"),
        ({"methods": ["alora", "hydra"]}, "method 'hydra' has no settings and is no preset; did you mean 'hydralora'"),
        ({"methods": {"x": {"preset": "aloras"}}}, "method x: preset is 'aloras'; did you mean 'alora'"),
        ({"methods": {"x": {"kind": "trains"}}}, "method x: kind is 'trains'; did you mean 'train'"),
        ({"methods": ["lora", "lora"]}, "names one twice"),
        ({"methods": []}, "methods is"),
        ({"methods": {"a/b": {"r": 3}}}, "cannot be a folder's name"),
        ({"methods": {"alora": {"seed": 3}}}, "alora sets seed, which a study gives each cell itself"),
        ({"settings": {"learning_rate": 0.1}}, "sets learning_rate"),
        ({"methods": {"alora": {"r": -1}}}, "method alora: r is -1"),
        ({"methods": {"alora": {"r": "wide"}}}, "method alora: r is 'wide', not a whole number"),
        ({"methods": {"alora": {"match": "lora"}}}, "match raises the rank of a LoRA"),
        ({"methods": {"lora": {"match": "fedsa"}}}, "match is 'fedsa'"),
        ({"methods": {"alora": {"score_epochs": 3}}}, "score_epochs is 3"),
        ({"methods": {"alora": {"test_limit": 0}}}, "test_limit is 0"),
        ({"methods": ["fedsa"], "settings": {"engine": "flower"}}, "method fedsa: engine is 'flower'"),
        ({"methods": {"transfer-b": {"frozen": "C"}}}, "frozen is 'C'"),
        ({"model": 5}, "method .*: model is 5, not text"),
        ({"seeds": float("inf")}, "seeds is inf"),
        ({"seeds": 10**9}, "seeds is 1000000000"),
        ({"learning_rates": [1e308]}, r"learning_rates is 1e\+308"),
        ({"settings": {"data": None}}, "data is null, not text"),
        ({"methods": {"a": {"kind": ["x"]}}}, r"kind is \['x'\]"),
        ({"methods": {"a": {"preset": [1]}}}, r"preset is \[1\]"),
        ({"methods": {"lora": {"score_epochs": [float("inf")]}}}, r"score_epochs is \[inf\]"),
        ({"methods": {"transfer-b": {"shots": 8}}}, "shots is 8"),
        ({"methods": {"transfer-b": {"router": "task"}}}, "router follows from frozen"),
        ({"reference": "hydralora"}, "reference is 'hydralora', which is no method of .*; did you mean 'alora'"),
        ({"single": "lora-per-tsk", "methods": ["alora", "lora-per-task"]}, "did you mean 'lora-per-task'"),
        ({"contrasts": [{"first": "alora"}]}, "has no second"),
        ({"contrasts": [{"first": "alora", "second": "hydra"}]}, "a contrast's second is 'hydra'"),
        ({"contrasts": [{"first": "alora", "second": "alora"}]}, "with itself"),
        ({"contrasts": [{"first": "alora", "second": "lora", "claim": "equal"}]}, "claim is 'equal'"),
        ({"contrasts": [{"first": "alora", "secnd": "lora"}]}, "did you mean 'second'"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"seeds": [0.5]}, "not a list of whole numbers"),
        ({"seeds": "many"}, "seeds is 'many'"),
        ({"learning_rates": [0]}, "holds 0"),
        ({"learning_rates": [1e-3, 1e-2], "screening_seeds": []}, "screening_seeds is empty"),
        ({"margin": -1}, "margin is -1"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"name": None}, "name is None"),
        ({"question": 3}, "question is 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_remedy(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_(**more)


def test_the_command_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    for text, said in (
        ("name: x\nmetods: [lora]\n", "did you mean 'methods'"),
        ("name: [x\n", "is no YAML"),
        ("- lora\n", "a study is a mapping"),
    ):
        path.write_text(text, encoding="utf-8")
        assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert main(["compare", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["compare", str(path), "--dry-run", "--tables"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_default_study_and_all_committed_ones_are_sound() -> None:
    assert parse_study(yaml.safe_load(DEFAULT)).reference == "alora"
    studies = [load_study(path) for path in sorted(STUDIES.glob("*.yaml"))]
    assert len(studies) >= 5
    assert all(study.question and study.contrasts for study in studies)
    assert all(len(study.seeds) >= 5 for study in studies)
    for study in studies:
        ran = [read_cells(path)[0]["study"] for path in STUDIES.glob(f"{study.name}*.cells.jsonl")]
        ran = [one for one in map(parse_study, ran) if one.name == study.name]
        assert ran, study.name
        assert all((one.claims, one.seeds) == (study.claims, study.seeds) for one in ran), study.name


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.cells.jsonl")), ids=lambda path: path.name)
def test_the_tables_of_a_committed_study_come_again_from_its_cells(path: Path) -> None:
    head, rows = read_cells(path)
    summary = summarise(parse_study(head["study"]), rows, {})
    assert summary.missing == ()
    assert summary.claims
    finals = {(row.method, row.learning_rate) for row in rows if row.stage == "final"}
    assert len(finals) == len({method for method, _ in finals})
    read = [float(x) for x in re.findall(r"\d+\.\d", (STUDIES / "README.md").read_text(encoding="utf-8"))]
    for row in summary.table:
        if row.task == "mean":
            assert min(abs(row.mean - x) for x in read) < 0.051, row.method


def test_every_preset_is_sound() -> None:
    study = with_(methods=[name for name in PRESETS if PRESETS[name][0] == "train"])
    assert len(study.methods) == 10


@pytest.mark.parametrize("kind", ["train", "federate", "transfer"])
def test_cells_are_asked_in_the_alpaca_form_unless_the_study_says_otherwise(kind: str) -> None:
    from manylora.studies import federated_cells, train_cells, transfer_cells

    config_of = {
        "train": train_cells.train_config,
        "federate": federated_cells._config,
        "transfer": lambda settings: transfer_cells._cell_settings({"frozen": "B", **settings}),
    }[kind]
    assert config_of({"model": "a/chat-model"}).template == "alpaca"
    assert config_of({"model": "a/chat-model", "template": "auto"}).template == "auto"
