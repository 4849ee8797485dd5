"""A finished or broken-off run, read from its folder: what `train` and `federate` return, and `open_run` finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from manylora.errors import RunError
from manylora.evaluation import (
    Baselines,
    ClientScores,
    Gains,
    SavedScores,
    Scores,
    read_client_scores,
    read_scores,
    scores_table,
)
from manylora.federated.config import FederateConfig
from manylora.federated.results import clients_table, read_result
from manylora.training.config import TrainConfig
from manylora.training.facts import TaskFacts, read_task_facts
from manylora.training.runs import RunFolder


@dataclass(frozen=True)
class _AnyRun:
    """What runs of all verbs have."""

    path: Path
    """The run folder."""

    @property
    def state(self) -> Mapping[str, Any]:
        """Contents of state.json: "state" ("running", "finished" or "failed") and facts."""
        return self._folder.state

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.state["state"] == "finished")

    @property
    def report(self) -> Path | None:
        """The page report.html; None where none was drawn."""
        page = self.path / "report.html"
        return page if page.is_file() else None

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.open(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, repr=False)
class Run(_AnyRun):
    """A run of `train`. What it holds is read when it is asked for, and checked; damage raises a `RunError`."""

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration as run, every default filled in."""
        return self._folder.config(TrainConfig, verb="train")

    @property
    def adapter(self) -> Path:
        """Folder of the adapter, in PEFT format."""
        return self.path / "adapter"

    @property
    def facts(self) -> TaskFacts:
        """What is known of the tasks.

        Raises:
            RunError: the run has not got so far.
        """
        facts = read_task_facts(self.adapter)
        if facts is None:
            raise RunError(f"{self.path} has no tasks.json yet; let it finish.")
        return facts

    @property
    def has_scores(self) -> bool:
        """Whether test rows were scored."""
        return (self.path / "scores.json").is_file()

    @property
    def scores(self) -> Scores:
        """Of the test rows: `run.scores["entailment"].score`, `run.scores.mean`, in points of 0 to 100.

        Raises:
            RunError: there are none, as the run had no test rows or is not finished.
        """
        return self._saved_scores

    @property
    def baselines(self) -> Baselines:
        """What something simpler reaches on the same rows: its name → task → score."""
        return self._saved_scores.baselines

    @property
    def gains(self) -> Gains:
        """Task to what training changed of it; empty where the base was not scored (`score_base`)."""
        return self._saved_scores.gains

    @property
    def notes(self) -> Sequence[str]:
        """What is to be said of the scores."""
        return self._saved_scores.notes

    @cached_property
    def _saved_scores(self) -> SavedScores:
        if not self.has_scores:
            raise RunError(f"{self.path} has no scores; it had no test rows, or is not finished.")
        return read_scores(self.path)

    def __repr__(self) -> str:
        scores = f", mean {self.scores.mean:.1f}" if self.has_scores else ""
        return f"Run({str(self.path)!r}, {self.state['state']}{scores})"

    def _repr_html_(self) -> str:
        if not self.has_scores:
            return repr(self)
        table = scores_table(self.scores, title=repr(self), baselines=self.baselines, gains=self.gains)
        return table._repr_html_()


@dataclass(frozen=True, repr=False)
class FederatedRun(_AnyRun):
    """A run of `federate`. What it holds is read when it is asked for, and checked; damage raises a `RunError`."""

    @cached_property
    def config(self) -> FederateConfig:
        """The configuration as run, every default filled in."""
        return self._folder.config(FederateConfig, verb="federate")

    @property
    def scores(self) -> dict[str, Scores]:
        """Client to the scores of its personal model on its own tasks."""
        return self._saved_scores.clients

    @property
    def reference(self) -> dict[str, Scores]:
        """The same without any exchange; empty where that was not trained."""
        return self._saved_scores.reference

    @cached_property
    def _saved_scores(self) -> ClientScores:
        return read_client_scores(self.path)

    @property
    def mean(self) -> float:
        """Mean over the clients of their mean scores."""
        values = [own.mean for own in self.scores.values()]
        return sum(values) / len(values) if values else float("nan")

    def __repr__(self) -> str:
        scored = (self.path / "scores.json").is_file()
        told = f", {len(self.scores)} clients, mean {self.mean:.1f}" if scored else ""
        return f"FederatedRun({str(self.path)!r}, {self.state['state']}{told})"

    def _repr_html_(self) -> str:
        if not (self.path / "scores.json").is_file():
            return repr(self)
        return replace(clients_table(read_result(self.path)), caption=repr(self))._repr_html_()


def open_run(path: str | Path) -> Run | FederatedRun:
    """The run in a folder that `train` or `federate` wrote.

    Raises:
        RunError: it is no run folder, or one of another verb.
    """
    folder = RunFolder.open(path)
    kind = FederatedRun if "strategy" in folder.read_config() else Run
    run = kind(folder.path)
    _ = run.config  # a run of another verb, or a damaged one, is refused here
    return run
