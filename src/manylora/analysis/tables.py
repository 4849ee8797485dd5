"""What was found about adapters, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from manylora.analysis.records import Change, Gates, Gradients, PairSimilarity, SourceFacts
from manylora.analysis.routers import ALL as ALL_TASKS
from manylora.analysis.routers import differences, mean_gates
from manylora.analysis.summary import ALL, Spread, change_lines, similarity_lines
from manylora.table import Column, Table, Value
from manylora.table import Spread as SpreadCell

_MOST_TASKS = 10
"""Tasks that a matrix of cosines may have."""


def sources_table(sources: Sequence[SourceFacts], *, paths: bool = False) -> Table:
    """The adapters and what is known of them, with `paths` also where they stand."""
    rows: list[dict[str, Value]] = []
    for source in sources:
        many = len(source.tasks) > 3
        rows.append(
            {
                "adapter": source.name,
                "kind": "LoRA"
                if source.num_experts == 1
                else f"share {source.share}, {source.router} router",
                "tasks": f"{len(source.tasks)} tasks" if many else ", ".join(source.tasks) or "?",
                "experts": source.num_experts,
                "seed": source.seed,
                "score": source.score,
                "modules": source.modules,
                "kept steps": ", ".join(map(str, source.steps)) or None,
                **({"path": source.path} if paths else {}),
            }
        )
    columns = (
        Column(name="seed", form="d"), Column(name="score", digits=1), Column(name="kept steps", align="right"),
    )  # fmt: skip
    return Table.of("sources", "adapters", rows, columns=columns)


def similarity_table(pairs: Sequence[PairSimilarity]) -> Table:
    """Similarity of subspaces by kind of pair: 1 is the same space, random is what unrelated ones have."""
    rows: list[dict[str, Value]] = [
        {
            "matrix": line.matrix,
            "pairs of": line.label,
            "σ": _cell(line.cosine),
            "random σ": line.baseline_cosine,
            "σ²": _cell(line.squared),
            "random σ²": line.baseline_squared,
            "pairs": line.pairs,
            "n": line.cosine.n,
        }
        for line in similarity_lines(pairs, per_module=False)
    ]
    caption = "similarity: mean cosine σ of the principal angles and mean σ², "
    caption += "± standard deviation over pairs and modules"
    return Table.of("similarity", caption, rows, digits=3, grouped=True)


def similarity_by_module_table(pairs: Sequence[PairSimilarity]) -> Table:
    """The same by kind of module."""
    lines = [line for line in similarity_lines(pairs) if line.module != ALL]
    rows: list[dict[str, Value]] = []
    for matrix, module in dict.fromkeys((line.matrix, line.module) for line in lines):
        own = {line.label: line for line in lines if (line.matrix, line.module) == (matrix, module)}
        rows.append(
            {
                "matrix": matrix,
                "module": module,
                "random σ": next(iter(own.values())).baseline_cosine,
                **{
                    line.label: _cell(own[line.label].cosine) if line.label in own else None for line in lines
                },
                "n of each": ", ".join(dict.fromkeys(str(line.cosine.n) for line in own.values())),
            }
        )
    columns = (Column(name="n of each", align="right"),)
    caption = "similarity σ by kind of module"
    return Table.of("similarity-modules", caption, rows, columns=columns, digits=3, grouped=True)


def change_table(changes: Sequence[Change], *, per_module: bool) -> Table:
    """How far the matrices of each adapter moved up to its last step, by kind of module where asked."""
    rows: list[dict[str, Value]] = []
    for line in change_lines(changes, per_module=per_module):
        counted = line.direction or line.magnitude
        rows.append(
            {
                "adapter": line.source,
                "matrix": line.matrix,
                "module": line.module,
                "steps": f"{line.from_step} → {line.to_step}",
                "similarity σ": _cell(line.similarity),
                "magnitude": _cell(line.magnitude),
                "direction": _cell(line.direction),
                "n": counted.n if counted else 0,
            }
        )
    caption = "change during training (± standard deviation over layers)"
    return Table.of("change", caption, rows, digits=3, grouped=True)


def norms_table(one: Gradients, *matrices: str) -> Table:
    """Gradient norms over all modules together, and how far the two halves of a task's rows agree.

    Args:
        one: of an adapter.
        matrices: those to show. Default: all that the tasks share.
    """
    own = {(found.matrix, found.left): found.cosine for found in one.overall_within}
    rows: list[dict[str, Value]] = [
        {
            "matrix": norm.matrix,
            "task": norm.task,
            "norm": norm.norm,
            "halves' cosine": own.get((norm.matrix, norm.task)),
            "rows": one.rows.get(norm.task),
        }
        for norm in one.overall_norms
        if norm.matrix in matrices or not matrices
    ]
    caption = f"{one.source}: gradients on the shared matrix ({one.shared}) at these weights"
    return Table.of("gradients", caption, rows, columns=[Column(name="norm", form=".3g")])


def cosines_table(one: Gradients, matrix: str) -> Table:
    """Cosines between tasks' gradients, tasks by tasks; of many tasks the pairs that conflict most."""
    pairs = {
        (found.left, found.right): found.cosine for found in one.overall_conflict if found.matrix == matrix
    }
    tasks = list(dict.fromkeys(task for pair in pairs for task in pair))
    caption = f"{one.source}: cosine between tasks' gradients on {matrix}, all modules together"
    rows: list[dict[str, Value]]
    if len(tasks) > _MOST_TASKS:
        worst = sorted(pairs.items(), key=lambda item: item[1])[:_MOST_TASKS]
        rows = [{"task": left, "other task": right, "cosine": cosine} for (left, right), cosine in worst]
        return Table.of("cosines", caption, rows)
    numbered = {str(number): task for number, task in enumerate(tasks, 1)}
    rows = [
        {
            "": number,
            "task": task,
            **{
                n: pairs.get((task, other), pairs.get((other, task), "" if other == task else None))
                for n, other in numbered.items()
            },
        }
        for number, task in numbered.items()
    ]
    return Table.of("cosines", caption, rows)


def conflict_table(one: Gradients, matrix: str) -> Table:
    """Cosines between tasks' gradients, pair by pair over the modules; below 0 they pull apart."""
    values: dict[tuple[str, str], list[float]] = {}
    for found in one.conflict:
        if found.matrix == matrix:
            values.setdefault((found.left, found.right), []).append(found.cosine)
    rows: list[dict[str, Value]] = [
        {
            "task": left,
            "other task": right,
            "mean cosine": math.fsum(own) / len(own),
            "lowest": min(own),
            "highest": max(own),
            "matrices": len(own),
        }
        for (left, right), own in values.items()
    ]
    caption = f"Cosine between tasks’ gradients on the shared {matrix or one.shared}; below 0 they pull apart"
    return Table.of("conflict", caption, rows, digits=3)


def gates_table(gates: Sequence[Gates]) -> Table:
    """Mean routing weights of each adapter and task, how even they are, and how far from those over all tasks."""
    rows: list[dict[str, Value]] = []
    apart = differences(gates)
    for (source, task), (weights, entropy) in mean_gates(gates).items():
        group = [gate for gate in gates if (gate.source, gate.task) == (source, task)]
        largest = math.log(len(weights))
        rows.append(
            {
                "adapter": source,
                "task": task,
                **{f"expert {number}": weight for number, weight in enumerate(weights)},
                "from all tasks": "" if task == ALL_TASKS else apart.get((source, task)),
                "entropy": entropy / largest if largest else math.nan,
                "collapsed in": f"{sum(gate.collapsed for gate in group)} of {len(group)}",
            }
        )
    columns = (Column(name="entropy"), Column(name="collapsed in", align="right"))
    caption = "gates: mean routing weight over all modules; entropy as a share of log N"
    return Table.of("gates", caption, rows, columns=columns, digits=3, grouped=True)


def _cell(value: Spread | None) -> SpreadCell | None:
    return None if value is None else SpreadCell(value.mean, value.deviation)
