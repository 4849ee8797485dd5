"""One expert per task: each task has an A of its own, all share one B, and you say which task a prompt is of.

    python examples/one_expert_per_task.py [ROWS]

Each expert is exactly one LoRA, so each task can be handed on as a plain PEFT folder.
"""

import sys
from pathlib import Path

import manylora
from manylora.data import load_examples

TASKS = ["praised_thing", "blamed_thing", "former_owner"]


def main(rows: int | None = None) -> None:
    """Train, ask two experts about one review, and write each expert as a LoRA."""
    run = manylora.train(data="embedded", tasks=TASKS, limit=rows, router="task")
    print(f"\nmean score {run.scores.mean:.1f}")

    # Two tasks that want opposite answers to one kind of prompt: only the expert differs.
    review = load_examples("embedded", split="test", tasks=["praised_thing"])["praised_thing"][0]
    print(f"\n{review.instruction}\n{review.input}".rstrip())
    for task in ("praised_thing", "blamed_thing"):
        answer = manylora.predict(run, review.instruction, input=review.input, task=task, progress=False)[0]
        print(f"  expert {answer.expert}, {task}: {answer.text!r}")

    folder = Path(run) / "loras"
    exported = manylora.export(run, to=folder, progress=False)
    print("\nplain LoRAs, for PEFT, vLLM or SGLang:")
    for task, place in exported.folders.items():
        print(f"  {task}: {place}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
