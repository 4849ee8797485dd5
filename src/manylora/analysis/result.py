"""All that was found about some adapters, as one record that becomes `analysis.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from manylora.analysis.change import Change
from manylora.analysis.gradients import Gradients
from manylora.analysis.pairs import PairSimilarity
from manylora.analysis.routers import ALL, Gates, differences, overall
from manylora.analysis.sources import Source
from manylora.analysis.subspaces import DRAWS
from manylora.analysis.summary import change_lines, similarity_lines
from manylora.files import without_nan


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Findings on `sources`."""

    sources: Sequence[Source]
    similarity: Sequence[PairSimilarity] = ()
    change: Sequence[Change] = ()
    gradients: Sequence[Gradients] = ()
    gates: Sequence[Gates] = ()
    baseline_seed: int = 0
    notes: Sequence[str] = field(default_factory=tuple)
    """What could not be looked at, and why."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; see docs/analyze.md for every key."""
        apart = differences(self.gates)
        return without_nan(
            {
                "kind": "analyze",
                "sources": [_source(source) for source in self.sources],
                "baseline": {"seed": self.baseline_seed, "draws": DRAWS},
                "similarity": _records(self.similarity),
                "change": _records(self.change),
                "gradients": _gradients(self.gradients) if self.gradients else None,
                "gates": _records([gate for gate in self.gates if gate.task != ALL]),
                "gates_over_tasks": _records([gate for gate in self.gates if gate.task == ALL]),
                "summary": {
                    "similarity": _records(similarity_lines(self.similarity)),
                    "change": _records(change_lines(self.change, last_only=False)),
                    "gates": [
                        {**dataclasses.asdict(one), "from_all_tasks": apart[one.source, one.task]}
                        for one in overall(self.gates)
                    ],
                },
                "notes": list(self.notes),
            }
        )


def _source(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "path": str(source.path),
        "format": source.format,
        "tasks": list(source.tasks),
        "seed": source.seed,
        "score": source.score,
        "share": source.share,
        "num_experts": source.num_experts,
        "router": source.router,
        "modules": len(source.layers),
        "steps": list(source.snapshots),
    }


def _gradients(found: Sequence[Gradients]) -> dict[str, Any]:
    """One flat list per key over all sources; "shared" is the first source's, `sources` has every one's."""
    together: dict[str, Any] = {
        "shared": found[0].shared,
        "sources": [{"source": one.source, "shared": one.shared, "rows": one.rows} for one in found],
    }
    for key in ("norms", "conflict", "within", "overall_norms", "overall_conflict", "overall_within"):
        together[key] = [record for one in found for record in _records(getattr(one, key))]
    return together


def _records(values: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(value) for value in values]
