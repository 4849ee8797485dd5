"""What `analyze` found, as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from manylora.analysis.routers import ALL as ALL_TASKS
from manylora.analysis.routers import differences, overall
from manylora.analysis.summary import ALL, Spread, change_lines, similarity_lines, spread
from manylora.cli.tables import console

if TYPE_CHECKING:
    from manylora.analysis import Analysis, Gates, Gradients

_MOST_TASKS = 10
"""Tasks that a matrix of cosines on the terminal may have."""

_RELIABLE = 0.5
"""Cosine of two halves of a task's rows below which its gradient is mostly noise: a convention of ours."""


def print_analysis(found: Analysis) -> None:
    """Every table that there is something for, then warnings, then what could not be looked at."""
    out = console()
    shown: list[Table | str | None] = [
        _sources(found),
        _similarity(found),
        _similarity_by_module(found),
        _change(found),
    ]
    for one in found.gradients:
        shown.append(_norms(one))
        for matrix in ("A", "B"):
            shown += _conflict(one, matrix)
    shown += [_gates(found.gates), *_warnings(found.gates)]
    for part in [*shown, *(f"note: {note}" for note in found.notes)]:
        if isinstance(part, str):
            out.print(part, soft_wrap=True)
        elif part is not None and part.row_count:
            out.print(part)


def _sources(found: Analysis) -> Table:
    table = _table(
        "adapters", "adapter", "kind", "tasks", right=("experts", "seed", "score", "modules", "kept steps")
    )
    for source in found.sources:
        kind = "LoRA" if source.num_experts == 1 else f"share {source.share}, {source.router} router"
        many = len(source.tasks) > 3
        table.add_row(
            source.name,
            kind,
            f"{len(source.tasks)} tasks" if many else ", ".join(source.tasks) or "?",
            str(source.num_experts),
            "?" if source.seed is None else str(source.seed),
            "–" if source.score is None else f"{source.score:.1f}",
            str(len(source.layers)),
            ", ".join(map(str, source.snapshots)) or "–",
        )
    return table


def _similarity(found: Analysis) -> Table:
    table = _table(
        "similarity: mean cosine σ of the principal angles and mean σ², ± standard deviation over pairs and modules",
        "matrix", "pairs of",
        right=("σ", "random σ", "σ²", "random σ²", "pairs", "n"),
    )  # fmt: skip
    last = ""
    for line in similarity_lines(found.similarity, per_module=False):
        if last and line.matrix != last:
            table.add_section()
        table.add_row(
            line.matrix if line.matrix != last else "",
            line.label,
            _number(line.cosine),
            f"{line.baseline_cosine:.3f}",
            _number(line.squared),
            f"{line.baseline_squared:.3f}",
            str(line.pairs),
            str(line.cosine.n),
        )
        last = line.matrix
    return table


def _similarity_by_module(found: Analysis) -> Table:
    lines = [line for line in similarity_lines(found.similarity) if line.module != ALL]
    labels = list(dict.fromkeys(line.label for line in lines))
    table = _table(
        "similarity σ by kind of module", "matrix", "module", right=("random σ", *labels, "n of each")
    )
    last = ""
    for matrix, module in dict.fromkeys((line.matrix, line.module) for line in lines):
        if last and matrix != last:
            table.add_section()
        group = {line.label: line for line in lines if (line.matrix, line.module) == (matrix, module)}
        first = next(iter(group.values()))
        table.add_row(
            matrix if matrix != last else "",
            module,
            f"{first.baseline_cosine:.3f}",
            *(_number(group[label].cosine) if label in group else "–" for label in labels),
            ", ".join(dict.fromkeys(str(line.cosine.n) for line in group.values())),
        )
        last = matrix
    return table


def _change(found: Analysis) -> Table:
    table = _table(
        "change during training (± standard deviation over layers)",
        "adapter", "matrix", "module", "steps",
        right=("similarity σ", "magnitude", "direction", "n"),
    )  # fmt: skip
    last = None
    several = len(found.sources) > 1
    for line in change_lines(found.change, per_module=not several):
        if last is not None and line.source != last:
            table.add_section()
        counted = line.direction or line.magnitude
        table.add_row(
            line.source if line.source != last else "",
            line.matrix,
            line.module,
            f"{line.from_step} → {line.to_step}",
            _number(line.similarity),
            _number(line.magnitude),
            _number(line.direction),
            str(counted.n) if counted else "0",
        )
        last = line.source
    return table


def _norms(one: Gradients) -> Table:
    table = _table(
        f"{one.source}: gradients on the shared matrix ({one.shared}) at these weights",
        "matrix", "task",
        right=("norm", "halves' cosine", "rows"),
    )  # fmt: skip
    own = {(found.matrix, found.left): found.cosine for found in one.overall_within}
    for norm in one.overall_norms:
        half = own.get((norm.matrix, norm.task))
        table.add_row(
            norm.matrix,
            norm.task,
            f"{norm.norm:.3g}",
            "–" if half is None else f"{half:.2f}",
            str(one.rows[norm.task]),
        )
    return table


def _conflict(one: Gradients, matrix: str) -> list[Table | str | None]:
    """Tasks by tasks (of many tasks the pairs that conflict most), and one line on all pairs and modules."""
    pairs = {
        (found.left, found.right): found.cosine for found in one.overall_conflict if found.matrix == matrix
    }
    if not pairs:
        return []
    tasks = list(dict.fromkeys(task for pair in pairs for task in pair))
    title = f"{one.source}: cosine between tasks' gradients on {matrix}, all modules together"
    if len(tasks) > _MOST_TASKS:
        table = _table(title, "task", "task", right=("cosine",))
        for (left, right), cosine in sorted(pairs.items(), key=lambda item: item[1])[:_MOST_TASKS]:
            table.add_row(left, right, f"{cosine:.2f}")
    else:
        table = _table(title, "", "task", right=[str(number) for number, _ in enumerate(tasks, 1)])
        for number, task in enumerate(tasks, 1):
            row = [pairs.get((task, other), pairs.get((other, task))) for other in tasks]
            table.add_row(str(number), task, *("" if value is None else f"{value:.2f}" for value in row))
    single = [found.cosine for found in one.conflict if found.matrix == matrix]
    negative = sum(cosine < 0 for cosine in single)
    line = (
        f"{matrix}: mean cosine {_number(spread(pairs.values()))} over {len(pairs)} pairs of tasks; negative in "
        f"{negative} of {len(single)} pairs × modules ({100 * negative / len(single):.0f} %)"
    )
    halves = [found.cosine for found in one.overall_within if found.matrix == matrix]
    noisy = sum(cosine < _RELIABLE for cosine in halves)
    if noisy:
        line += (
            f"\nwarning: {one.source}: the gradients on {matrix} of a task's two halves of rows have a cosine below "
            f"{_RELIABLE} for {noisy} of {len(halves)} tasks: so few rows say little. Raise --limit."
        )
    return [table, line]


def _gates(gates: Sequence[Gates]) -> Table | None:
    if not gates:
        return None
    most = max(len(one.weights) for one in gates)
    table = _table(
        "gates: mean routing weight over all modules; entropy as a share of log N",
        "adapter", "task",
        right=(*(f"expert {n}" for n in range(most)), "from all tasks", "entropy", "collapsed in"),
    )  # fmt: skip
    apart = differences(gates)
    for one in overall(gates):
        group = [gate for gate in gates if (gate.source, gate.task) == (one.source, one.task)]
        if one.task == ALL_TASKS:
            table.add_section()
        weights = [f"{weight:.3f}" for weight in one.weights]
        table.add_row(
            one.source,
            one.task,
            *weights,
            *[""] * (most - len(weights)),
            "" if one.task == ALL_TASKS else f"{apart[one.source, one.task]:.3f}",
            f"{one.entropy / math.log(len(one.weights)):.2f}",
            f"{sum(gate.collapsed for gate in group)} of {len(group)}",
        )
    return table


def _warnings(gates: Sequence[Gates]) -> list[str]:
    lines = []
    for source in dict.fromkeys(gate.source for gate in gates):
        group = [gate for gate in gates if gate.source == source and gate.task == ALL_TASKS]
        collapsed = [gate for gate in group if gate.collapsed]
        if collapsed:
            names = ", ".join(gate.name for gate in collapsed[:3]) + (", …" if len(collapsed) > 3 else "")
            lines.append(
                f"warning: {source}: the router has collapsed onto one expert in {len(collapsed)} of {len(group)} "
                f"modules ({names}); try train --load-balance-weight 0.01 or fewer experts."
            )
    return lines


def _number(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3f}" if math.isnan(value.deviation) else f"{value.mean:.3f} ± {value.deviation:.3f}"


def _table(title: str, *left: str, right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table
