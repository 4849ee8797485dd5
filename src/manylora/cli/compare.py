"""`manylora compare`: run a study's cells, then print and write its tables and the verdict on every claim."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.cli.options import CompareOptions
from manylora.cli.parsing import parse
from manylora.errors import RunError
from manylora.files import dump_yaml, parse_yaml, refuse_links, write_json, write_text

if TYPE_CHECKING:
    from manylora.studies import CellResult, Study

DESCRIPTION = """\
Run a study, methods × seeds × tasks, and try its claims with statistics.

Without a file: a small study of five methods on a part of the embedded suite, two seeds each; a first look.

  manylora compare study.yaml --dry-run            the cells, and about how long they take
  manylora compare study.yaml                      run what is not done, then print the tables; start it again after
                                                   a crash, or with more seeds or methods in the file
  manylora compare study.yaml --tables             the tables of what is done
  manylora compare --from-cells study.cells.jsonl  the tables again, from committed results
  manylora compare study.yaml --launcher 'srun -c 4 {command}' --workers 20      every cell as a job of a cluster

What a study says: docs/compare.md."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, _ = parse(
        CompareOptions, arguments, verb="compare", description=DESCRIPTION, positional=("study",)
    )
    if options.from_cells is not None:
        return _from_cells(options)
    study, text = _study(options)
    out = Path(options.out or f"runs/compare-{study.name}").expanduser()
    if out.is_dir():
        refuse_links(out)
    if options.cell is not None:
        return _cell(study, out, options.cell)
    from manylora.studies.config import check_tasks

    if options.dry_run:
        from manylora.cli.studying import print_cells_plan

        check_tasks(study)
        print_cells_plan(study, out, workers=_workers(options, study))
        return 0
    if options.tables:
        return _finish(study, out)
    from manylora.studies.cells import check_folder
    from manylora.studies.runner import launched

    launched([], options.launcher)  # refuse one without a place for the command before anything is written
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "study.yaml").is_file())):
        raise RunError(f"{out} exists and is no study's folder; choose another --out.")
    check_tasks(study)
    check_folder(study, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "study.yaml", text)
    if options.print_cells:
        return _print_cells(study, out)
    return _run(study, out, options)


def _study(options: CompareOptions) -> tuple[Study, str]:
    """The study, and its text as it is kept in its folder."""
    from manylora.studies import load_study, parse_study
    from manylora.studies.presets import DEFAULT

    study = load_study(options.study) if options.study else parse_study(parse_yaml(DEFAULT))
    text = Path(options.study).expanduser().read_text(encoding="utf-8") if options.study else DEFAULT
    if options.model is not None:
        changed = {**study.source, "model": options.model}
        study, text = parse_study(changed), dump_yaml(changed)
    return study, text


def _workers(options: CompareOptions, study: Study) -> int:
    from manylora.studies.cells import screening_cells
    from manylora.studies.runner import default_workers

    if options.workers is not None:
        return options.workers
    return default_workers(len(screening_cells(study)) or len(study.methods) * len(study.seeds))


def _cell(study: Study, out: Path, cell_id: str) -> int:
    from manylora.studies import run_cell
    from manylora.studies.runner import find_cell

    run_cell(study, find_cell(study, out, cell_id), out)
    return 0


def _print_cells(study: Study, out: Path) -> int:
    from manylora.studies.runner import cell_command, pending

    for cell in pending(study, out):
        print(shlex.join(cell_command(out / "study.yaml", out, cell)))
    return 0


def _run(study: Study, out: Path, options: CompareOptions) -> int:
    from manylora.cli.studying import CellProgress
    from manylora.studies import run_study

    workers = _workers(options, study)
    print(f"study folder: {out}", flush=True)
    began = time.monotonic()
    progress = CellProgress(workers)
    outcome = run_study(
        study,
        out,
        study_file=out / "study.yaml",
        workers=workers,
        launcher=options.launcher,
        progress=progress.as_hooks(),
    )
    if outcome.failed:
        done = _finish(study, out, complain=False)
        for cell, log in outcome.failed.items():
            print(f"manylora: the cell {cell} failed; its log is {log}", file=sys.stderr)
        again = shlex.join(
            ["manylora", "compare", *([options.study] if options.study else []), "--out", str(out)]
        )
        print(f"manylora: {len(outcome.failed)} cells failed; try them again with: {again}", file=sys.stderr)
        return done or 2
    code = _finish(study, out)
    print(f"{time.monotonic() - began:.0f} s")
    return code


def _finish(study: Study, out: Path, *, complain: bool = True) -> int:
    """Write cells.jsonl and study.json, print the tables."""
    from manylora._version import __version__
    from manylora.studies import read_cells, results_of, write_cells
    from manylora.training import environment

    results = results_of(study, out)
    if not any(row.stage == "final" for row in results):
        if complain:
            raise RunError(f"{out} has no finished cell yet; run the study without --tables.")
        return 2
    facts = environment(seed=study.seeds[0])
    for key in ("seed", "command"):  # of one cell; paths of this machine have no place in a file to commit
        facts.pop(key)
    write_cells(out / "cells.jsonl", study, results, {"manylora": __version__, "environment": facts})
    head, rows = read_cells(out / "cells.jsonl")
    return _write(study, head, rows, out)


def _from_cells(options: CompareOptions) -> int:
    from manylora.studies import load_study, parse_study, read_cells

    assert options.from_cells is not None
    path = Path(options.from_cells).expanduser()
    head, rows = read_cells(path)
    study = load_study(options.study) if options.study else parse_study(head["study"])
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and out.exists() and not out.is_dir():
        raise RunError(f"{out} is no folder; choose another --out.")
    if options.study and study.source != head["study"]:
        print(f"manylora: {options.study} is not the study as it was run; its claims may come after the fact.",
              file=sys.stderr)  # fmt: skip
    return _write(study, head, rows, out)


def _write(study: Study, head: Mapping[str, Any], rows: Sequence[CellResult], out: Path | None) -> int:
    from manylora.cli.console import draw_report
    from manylora.cli.studying import print_study
    from manylora.studies import summarise

    facts = {key: value for key, value in head.items() if key not in ("kind", "study")}
    summary = summarise(study, rows, facts)
    print_study(summary)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "study.json", summary.to_dict())
        draw_report(out)
    return 0
