"""Compare: a study → its cells, each a job → tables, and the verdict on every claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from manylora._version import __version__
from manylora.errors import ConfigError, RunError
from manylora.files import dump_yaml, parse_yaml, refuse_links, write_json, write_text
from manylora.files.settings import Bound, Settings

if TYPE_CHECKING:
    from manylora.studies.config import Study
    from manylora.studies.records import Summary
    from manylora.studies.results import CellResult
    from manylora.studies.runner import Progress


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Which study, where, and what to do with it."""

    study: str = ""
    """YAML file of the study (docs/compare.md), also as a word by itself. Default: a small study of the embedded
    suite."""
    out: str | None = None
    """Folder of the study; one that is there is continued. Default: runs/compare-NAME."""
    model: str | None = None
    """Base model of all methods, in place of the study's."""
    workers: Annotated[int, Bound(lambda value: value >= 1, "1 or more")] | None = None
    """Cells side by side. Default: as many as cores and memory allow."""
    launcher: str | None = None
    """Command that starts a cell elsewhere, such as "srun -c 4 {command}"."""
    tables: bool = False
    """Print and write the tables of what is done, and run nothing."""
    from_cells: str | None = None
    """Rebuild the tables from this cells.jsonl; nothing is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tables and self.from_cells:
            raise ConfigError("--tables and --from-cells exclude each other; give one.")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a study found so far."""

    path: Path | None
    """Folder of the study; None where tables were rebuilt and not written."""
    summary: Summary | None
    """Tables, costs, curves and claims, as study.json holds them; None where no cell is done."""
    failed: Mapping[str, Path] = field(default_factory=dict)
    """Cells that failed, to their logs."""
    remark: str = ""
    """What to know before the claims are read."""

    def __repr__(self) -> str:
        cells = f", {len(self.failed)} cells failed" if self.failed else ""
        return f"Comparison({str(self.path)!r}{cells})"

    def _repr_html_(self) -> str:
        if self.summary is None:
            return repr(self)
        from manylora.studies.tables import claims_table, costs_table, scores_table

        shown = [scores_table(self.summary), costs_table(self.summary), claims_table(self.summary)]
        return "".join(table._repr_html_() for table in shown)


@dataclass(frozen=True, kw_only=True)
class OpenStudy:
    """A study and the folder that its cells lie in."""

    study: Study
    text: str
    """As it is kept in its folder."""
    path: Path


def open_study(config: CompareConfig) -> OpenStudy:
    """The study that is asked for; nothing is written.

    Raises:
        ConfigError: it cannot be read, or says what cannot be.
        RunError: its folder holds links.
    """
    from manylora.studies.config import load_study, parse_study
    from manylora.studies.presets import DEFAULT

    study = load_study(config.study) if config.study else parse_study(parse_yaml(DEFAULT))
    text = Path(config.study).expanduser().read_text(encoding="utf-8") if config.study else DEFAULT
    if config.model is not None:
        changed = {**study.source, "model": config.model}
        study, text = parse_study(changed), dump_yaml(changed)
    path = Path(config.out or f"runs/compare-{study.name}").expanduser()
    if path.is_dir():
        refuse_links(path)
    return OpenStudy(study=study, text=text, path=path)


def workers_of(config: CompareConfig, study: Study) -> int:
    """How many cells run side by side."""
    from manylora.studies.cells import screening_cells
    from manylora.studies.runner import default_workers

    if config.workers is not None:
        return config.workers
    return default_workers(len(screening_cells(study)) or len(study.methods) * len(study.seeds))


def begin_study(config: CompareConfig) -> OpenStudy:
    """Make the study's folder, or go on with it.

    Raises:
        RunError: the folder holds something else, or cells of other settings.
        ConfigError: see `open_study`; or the launcher has no place for a command.
    """
    from manylora.studies.cells import check_folder
    from manylora.studies.config import check_tasks
    from manylora.studies.runner import launched

    opened = open_study(config)
    out = opened.path
    launched([], config.launcher)  # refuse one without a place for the command before anything is written
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "study.yaml").is_file())):
        raise RunError(f"{out} exists and is no study's folder; choose another --out.")
    check_tasks(opened.study)
    check_folder(opened.study, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "study.yaml", opened.text)
    return opened


def run_study_in(opened: OpenStudy, config: CompareConfig, *, progress: Progress | None = None) -> Comparison:
    """Run the cells that are not done, then sum up; the same call goes on after a crash."""
    from manylora.studies.runner import run_study

    study, out = opened.study, opened.path
    failed = run_study(
        study,
        out,
        study_file=out / "study.yaml",
        workers=workers_of(config, study),
        launcher=config.launcher,
        progress=progress,
    )
    return sum_up(opened, failed=failed)


def compare(config: CompareConfig, *, progress: Progress | None = None) -> Comparison:
    """Run a study's cells and sum up; or (`tables`, `from_cells`) sum up alone.

    Raises:
        ConfigError, RunError: what is wrong with the study or its folder.
    """
    if config.from_cells is not None:
        return rebuild(config)
    if config.tables:
        return sum_up(open_study(config))
    return run_study_in(begin_study(config), config, progress=progress)


def sum_up(opened: OpenStudy, *, failed: Mapping[str, Path] | None = None) -> Comparison:
    """Write cells.jsonl and study.json of the cells that are done.

    Raises:
        RunError: none is done, and none has failed.
    """
    from manylora.studies.cells import results_of
    from manylora.studies.results import read_cells, write_cells
    from manylora.training import environment

    study, out = opened.study, opened.path
    results = results_of(study, out)
    if not any(row.stage == "final" for row in results):
        if failed:
            return Comparison(path=out, summary=None, failed=failed)
        raise RunError(f"{out} has no finished cell yet; run the study without --tables.")
    facts = environment(seed=study.seeds[0])
    for key in ("seed", "command"):  # of one cell; paths of this machine have no place in a file to commit
        facts.pop(key)
    write_cells(out / "cells.jsonl", study, results, {"manylora": __version__, "environment": facts})
    head, rows = read_cells(out / "cells.jsonl")
    return _summary(study, head, rows, out, failed=failed or {})


def rebuild(config: CompareConfig) -> Comparison:
    """The tables again, from a cells.jsonl.

    Raises:
        ConfigError: the file cannot be read.
        RunError: `config.out` is no folder.
    """
    from manylora.studies.config import load_study, parse_study
    from manylora.studies.results import read_cells

    path = Path(str(config.from_cells)).expanduser()
    head, rows = read_cells(path)
    study = load_study(config.study) if config.study else parse_study(head["study"])
    out = Path(config.out).expanduser() if config.out else None
    if out is not None and out.exists() and not out.is_dir():
        raise RunError(f"{out} is no folder; choose another --out.")
    remark = ""
    if config.study and study.source != head["study"]:
        remark = f"{config.study} is not the study as it was run; its claims may come after the fact."
    return dataclasses.replace(_summary(study, head, rows, out, failed={}), remark=remark)


def _summary(
    study: Study,
    head: Mapping[str, Any],
    rows: Sequence[CellResult],
    out: Path | None,
    *,
    failed: Mapping[str, Path],
) -> Comparison:
    from manylora.studies.summary import summarise

    facts = {key: value for key, value in head.items() if key not in ("kind", "study")}
    summary = summarise(study, rows, facts)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "study.json", summary.to_dict())
    return Comparison(path=out, summary=summary, failed=failed)
