"""`manylora compare`: run a study's cells, then print and write its tables and the verdict on every claim."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from manylora.cli.console import complain, draw_report
from manylora.cli.options import CompareOptions
from manylora.cli.parsing import parse
from manylora.studies.compare import (
    Comparison,
    begin_study,
    compare,
    open_study,
    run_study_in,
    workers_of,
)

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
    config, _ = parse(
        CompareOptions, arguments, verb="compare", description=DESCRIPTION, positional=("study",)
    )
    if config.from_cells is not None or config.tables:
        return _show(compare(config))
    if config.cell is not None:
        return _run_cell(config, config.cell)
    if config.dry_run:
        return _print_plan(config)
    opened = begin_study(config)
    if config.print_cells:
        from manylora.studies.runner import cell_command, pending

        for cell in pending(opened.study, opened.path):
            print(shlex.join(cell_command(opened.path / "study.yaml", opened.path, cell)))
        return 0
    from manylora.cli.studying import CellProgress

    print(f"study folder: {opened.path}", flush=True)
    began = time.monotonic()
    progress = CellProgress(workers_of(config, opened.study))
    code = _show(run_study_in(opened, config, progress=progress), study=config.study)
    if code == 0:
        print(f"{time.monotonic() - began:.0f} s")
    return code


def _run_cell(config: CompareOptions, cell_id: str) -> int:
    from manylora.studies.cells import run_cell
    from manylora.studies.runner import find_cell

    opened = open_study(config)
    run_cell(opened.study, find_cell(opened.study, opened.path, cell_id), opened.path)
    return 0


def _print_plan(config: CompareOptions) -> int:
    from manylora.cli.studying import print_cells_plan
    from manylora.studies.config import check_tasks

    opened = open_study(config)
    check_tasks(opened.study)
    print_cells_plan(opened.study, opened.path, workers=workers_of(config, opened.study))
    return 0


def _show(found: Comparison, *, study: str = "") -> int:
    """Print the tables, and which cells failed."""
    from manylora.cli.studying import print_study

    if found.remark:
        complain(found.remark)
    if found.summary is not None:
        print_study(found.summary)
        if found.path is not None:
            draw_report(found.path)
    for cell, log in found.failed.items():
        complain(f"the cell {cell} failed; its log is {log}")
    if found.failed:
        again = shlex.join(["manylora", "compare", *([study] if study else []), "--out", str(found.path)])
        complain(f"{len(found.failed)} cells failed; try them again with: {again}")
    return 2 if found.failed else 0
