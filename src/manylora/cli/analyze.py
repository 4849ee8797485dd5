"""`manylora analyze`: how alike adapters are, how far they moved, where tasks conflict, what routers do."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.cli.options import AnalyzeOptions
from manylora.cli.parsing import parse
from manylora.errors import ConfigError, RunError
from manylora.files import whole_number

if TYPE_CHECKING:
    from manylora.analysis import Analysis, Source
    from manylora.training import RunFolder

DESCRIPTION = """\
Look into adapters, ours or plain PEFT LoRAs, and write what is found to analysis.json:

  similarity   of A's and of B's between adapters and between experts, beside that of random subspaces
  change       of A and of B during training, from the weights that a run kept (train --keep-adapters 4)
  gradients    norms and conflict between tasks on the shared matrix, measured on rows
  gates        what a token router does with each task

The first two look at matrices alone; the last two load the base model.

  manylora analyze runs/train-001                              one run
  manylora analyze runs/train-001 runs/train-002               two, compared
  manylora analyze loras/a loras/b --label loras/a=sums,0 --label loras/b=stories,0
  manylora analyze --figures                                   the paper's figures 1 and 2; a few minutes

docs/analyze.md says what each number means."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    options, _ = parse(
        AnalyzeOptions, arguments, verb="analyze", description=DESCRIPTION, several=("adapters", "label")
    )
    if options.figures:
        from manylora.cli.figures import run_figures

        return run_figures(options)
    with _reserved(options.out):
        found = analyse(_sources(options), options)
        from manylora.training import RunFolder

        with RunFolder.create(
            options.out, config=dataclasses.asdict(options), seed=options.seed, kind="analyze"
        ) as folder:
            conclude(found, folder)
    return 0


@contextlib.contextmanager
def _reserved(out: str | None) -> Iterator[None]:
    """Make `out` at once, so that minutes of measuring are not lost to a bad name; after an error it is gone again.

    Raises:
        RunError: it exists and is not an empty folder.
    """
    folder = None if out is None else Path(out).expanduser()
    made = False
    if folder is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{out} exists already; choose another --out.")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if folder is not None and made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only while it is empty
        raise


def _sources(options: AnalyzeOptions) -> list[Source]:
    from manylora.analysis import load_sources, with_labels
    from manylora.training.config import as_list

    sources = load_sources(as_list(options.adapters) or [])
    labels = [options.label] if isinstance(options.label, str) else options.label or []
    return with_labels(sources, dict(map(_label, labels)))


def _label(text: str) -> tuple[str, tuple[tuple[str, ...], int | None]]:
    path, equals, value = text.rpartition("=")
    task, _, seed = value.rpartition(",")
    if (
        not equals
        or not path
        or (seed.strip() and whole_number(seed.strip()) is None)
        or not value.strip(", ")
    ):
        raise ConfigError(
            f"--label {text} cannot be read; write PATH=TASK,SEED, such as loras/a=sums,0 (or PATH=TASK, or PATH=,0)."
        )
    return str(Path(path)), ((task.strip(),) if task.strip() else (), int(seed) if seed.strip() else None)


def analyse(sources: Sequence[Source], options: AnalyzeOptions) -> Analysis:
    """Everything that the sources, and rows where `options` ask for them, tell.

    Raises:
        ModelError, ConfigError, DataError: the adapters cannot be compared, or what was asked for cannot be measured.
    """
    from manylora.analysis import Analysis, RandomBaseline, changes, similarities
    from manylora.cli.measuring import measure

    similarity = similarities(sources, baseline=RandomBaseline(seed=options.seed))
    change = [one for source in sources for one in changes(source)]
    notes = []
    if not similarity:
        notes.append("similarity: there is one A and one B; give a second adapter to compare with.")
    if not change:
        notes.append("change: no run kept weights of earlier steps; train with --keep-adapters 4.")
    gradients, gates, more = measure(sources, options)
    return Analysis(
        sources=[source.facts() for source in sources],
        similarity=similarity,
        change=change,
        gradients=gradients,
        gates=gates,
        baseline_seed=options.seed,
        notes=[*notes, *more],
    )


def conclude(found: Analysis, folder: RunFolder) -> None:
    """Print the tables, write analysis.json and its page, and say where they are."""
    from manylora.cli.analysis_tables import print_analysis
    from manylora.cli.console import draw_report
    from manylora.files import write_json

    print_analysis(found)
    write_json(folder.path / "analysis.json", found.to_dict())
    folder.set_state("finished")
    print(f"written to {folder.path / 'analysis.json'}")
    draw_report(folder.path)
