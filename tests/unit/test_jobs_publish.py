"""What a training makes of its adapter on request, and what of that is refused before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import manylora
from manylora.errors import ConfigError, ModelError
from manylora.jobs.progress import Progress
from manylora.jobs.publish import check_publishing, push_to_hub
from manylora.jobs.train import plan, resume, train
from manylora.training import TrainConfig


class Lines(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show_line(self, line: str) -> None:
        """Keep it."""
        self.lines.append(line)


def config(base: Path, data: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"epochs": 0.5, "batch_size": 8, "device": "cpu", "save_merged": True, **more}
    return TrainConfig(model=str(base), data=str(data), learning_rate=0.05, **settings)


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"method": "lora"}, [""]),
        ({"router": "task"}, ["first_word", "last_word", "swap"]),
    ],
)
def test_the_merged_model_gives_what_the_adapter_gives(
    tiny_base: Path, small_data: Path, tmp_path: Path, settings: dict[str, Any], places: list[str]
) -> None:
    progress = Lines()
    settled = config(tiny_base, small_data, **settings)
    run = train(settled, out=tmp_path / "run", progress=progress)
    assert run.state["state"] == "finished"
    ids = torch.arange(3, 23)[None]
    from manylora.training import Writing

    adapted, kind, _ = Writing.load(str(run.path), model=None, dtype="float32", device="cpu")
    for place in places:
        folder = run.path / "merged" / place
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        routing = {"expert_ids": torch.tensor([kind.expert(place)])} if place else {}
        with torch.no_grad():
            torch.testing.assert_close(
                plain(input_ids=ids).logits, adapted(input_ids=ids, **routing).logits, rtol=1e-3, atol=1e-3
            )
        assert any("merged model" in line and place in line for line in progress.lines)


def test_a_run_that_was_killed_while_it_merged_merges_on_resume(
    tiny_base: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def kill(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("manylora.jobs.session.Session.finish", kill)
        with pytest.raises(KeyboardInterrupt):
            train(config(tiny_base, small_data, method="lora"), out=tmp_path / "run", progress=Progress())
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    run = resume(tmp_path / "run", progress=Progress())
    assert run.state["state"] == "finished"
    assert (run.path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "save_merged: a token router .* --router task or --method lora"),
        ({"task_type": "SEQ_CLS", "router": "task"}, "save_merged: the adapter classifies"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_the_plan(
    tiny_base: Path, small_data: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(config(tiny_base, small_data, **settings), progress=Progress())


def test_the_hub_is_refused_before_training_without_a_login_or_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = TrainConfig(push_to_hub="me/my-adapter")
    monkeypatch.setattr("manylora.jobs.publish.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"push_to_hub me/my-adapter: nobody is logged in .* hf auth login"):
        check_publishing(asked)
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(
        ConfigError, match=r"push_to_hub me/my-adapter: the Hub cannot be reached \(.*offline"
    ):
        check_publishing(asked)
    with pytest.raises(ConfigError, match="push_to_hub is 'me/my/adapter', no name of a repository"):
        check_publishing(TrainConfig(push_to_hub="me/my/adapter"))


def test_an_upload_that_fails_says_how_to_try_again(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"run is finished, .* hf upload me/x .*adapter"):
        push_to_hub(tmp_path, "me/x", progress=Progress())


def test_a_study_refuses_both() -> None:
    from manylora.studies.settings import TrainCellSettings

    for settings in ({"save_merged": True}, {"push_to_hub": "me/x"}):
        with pytest.raises(ConfigError, match="is for one training"):
            TrainCellSettings(**settings)  # type: ignore[arg-type]


def test_python_takes_the_same_settings(tiny_base: Path, small_data: Path, tmp_path: Path) -> None:
    run = manylora.train(
        model=str(tiny_base), data=str(small_data), method="lora", epochs=0.2, batch_size=8, learning_rate=0.01,
        device="cpu", save_merged=True, optimizer="sgd", attention="eager", out=tmp_path / "run",
    )  # fmt: skip
    assert (run.path / "merged" / "config.json").is_file()
    assert (run.config.optimizer, run.config.attention) == ("sgd", "eager")
