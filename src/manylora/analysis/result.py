"""All that was found about some adapters, as one record that becomes `analysis.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manylora.analysis.records import MEASURED, Findings, Gradients
from manylora.analysis.routers import ALL, differences, overall
from manylora.analysis.summary import change_lines, similarity_lines
from manylora.analysis.tables import change_table, gates_table, similarity_table, sources_table
from manylora.files import Record, without_nan


class Analysis(Findings):
    """Findings on `sources`."""

    baseline_seed: int = 0
    """Of the random subspaces."""

    def __repr__(self) -> str:
        return f"Analysis({', '.join(source.name for source in self.sources)})"

    def _repr_html_(self) -> str:
        shown = [sources_table(self.sources)]
        shown += [similarity_table(self.similarity)] if self.similarity else []
        shown += [change_table(self.change, per_module=False)] if self.change else []
        shown += [gates_table(self.gates)] if self.gates else []
        return "".join(table._repr_html_() for table in shown)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; see docs/analyze.md for every key."""
        from manylora.analysis.subspaces import DRAWS

        apart = differences(self.gates)
        return without_nan(
            {
                "kind": "analyze",
                "sources": _rows(self.sources),
                "baseline": {"seed": self.baseline_seed, "draws": DRAWS},
                "similarity": _rows(self.similarity),
                "change": _rows(self.change),
                "gradients": _gradients(self.gradients) if self.gradients else None,
                "gates": _rows([gate for gate in self.gates if gate.task != ALL]),
                "gates_over_tasks": _rows([gate for gate in self.gates if gate.task == ALL]),
                "summary": {
                    "similarity": _rows(similarity_lines(self.similarity)),
                    "change": _rows(change_lines(self.change, last_only=False)),
                    "gates": [
                        {**one.model_dump(), "from_all_tasks": apart[one.source, one.task]}
                        for one in overall(self.gates)
                    ],
                },
                "notes": list(self.notes),
            }
        )


def _gradients(found: Sequence[Gradients]) -> dict[str, Any]:
    """One flat list per key over all sources; "shared" is the first source's, `sources` has every one's."""
    return {
        "shared": found[0].shared,
        "sources": [{"source": one.source, "shared": one.shared, "rows": one.rows} for one in found],
        **{key: [row.model_dump() for one in found for row in getattr(one, key)] for key in MEASURED},
    }


def _rows(values: Sequence[Record]) -> list[dict[str, Any]]:
    return [value.model_dump() for value in values]
