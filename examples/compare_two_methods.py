"""Compare two methods: a study of methods × seeds × tasks whose claim is named before it runs.

    python examples/compare_two_methods.py [ROWS [SEEDS]]

Each cell is a process of its own and is kept: run it again after a crash, or with more seeds, and it goes on.
"""

import sys
from pathlib import Path

import manylora

STUDY = """\
name: two-methods
question: Does sharing B score higher than sharing A?
settings:
  tasks: [former_owner, record_to_text]
  limit: {rows}
methods: [alora, hydralora]
reference: alora
seeds: {seeds}
contrasts:
  - {{first: alora, second: hydralora, text: Sharing B scores higher than sharing A}}
"""


def main(rows: int = 100, seeds: int = 2) -> None:
    """Write the study, run it, print scores and verdict."""
    Path("two-methods.yaml").write_text(STUDY.format(rows=rows, seeds=seeds), encoding="utf-8")
    found = manylora.compare("two-methods.yaml")
    for name, log in found.failed.items():
        print(f"{name} failed; see {log}")
    if found.summary is None:
        return
    for score in found.summary.table:
        spread = "" if score.low is None else f", 95 % interval {score.low:.1f} to {score.high:.1f}"
        print(f"  {score.method} on {score.task}: {score.mean:.1f}{spread}")
    for claim in found.summary.claims:
        print(claim.text)
    for note in found.summary.notes:
        print(f"note: {note}")
    print(f"the study's folder: {found.path}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
