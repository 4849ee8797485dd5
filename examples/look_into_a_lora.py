"""Look into somebody's LoRAs: how alike their A's and B's are beside chance, and where tasks pull apart.

    python examples/look_into_a_lora.py [LORA_FOLDER LORA_FOLDER ...]

The folders are plain PEFT LoRAs of one base model. Without any, two are trained first, on a task each.
"""

import sys
from pathlib import Path
from statistics import fmean

import manylora

TASKS = ["former_owner", "current_holder"]
ROWS = 40


def make_loras() -> list[Path]:
    """Two plain LoRAs, as somebody else might have sent them."""
    folders = []
    for task in TASKS:
        run = manylora.train(tasks=[task], limit=ROWS, method="lora", report=False, progress=False)
        folders.append(manylora.export(run, to=f"loras/{task}", progress=False).path)
    return folders


def main(*folders: str) -> None:
    """Print what stands in the folders, how alike they are, and what rows say of them."""
    if folders:
        found = manylora.analyze(folders, progress=False)
    else:  # of LoRAs that come from no run, tasks and rows must be said
        loras = make_loras()
        labels = [f"{lora}={task},0" for lora, task in zip(loras, TASKS, strict=True)]
        rows = {"data": "embedded", "tasks": TASKS, "limit": 8}
        found = manylora.analyze(loras, label=labels, **rows, progress=False)

    for source in found.sources:
        print(f"{source.name}: {source.modules} modules, trained on {', '.join(source.tasks) or '?'}")
    for matrix in ("A", "B"):
        pairs = [pair for pair in found.similarity if pair.matrix == matrix]
        if pairs:
            alike, chance = fmean(p.mean_cosine for p in pairs), fmean(p.baseline_cosine for p in pairs)
            print(f"{matrix}: similarity {alike:.3f}, of random matrices {chance:.3f} ({len(pairs)} pairs)")
    for one in found.gradients:
        for pair in one.overall_conflict:  # below 0: a step for one task undoes the other's
            print(f"{one.source}: cosine of gradients on {pair.matrix} {pair.cosine:+.2f}")
    for note in found.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main(*sys.argv[1:])
