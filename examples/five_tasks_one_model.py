"""Five tasks, one model: three experts that share one B, and a router that mixes them for every token.

    python examples/five_tasks_one_model.py [ROWS]

ROWS is how many rows of each task are trained and tested on; 300 by default, about two minutes on two cores.
"""

import sys

import manylora

TASKS = ["praised_thing", "former_owner", "story_sum", "record_to_text", "register_entry"]


def main(rows: int = 300) -> None:
    """Train, and set each task's score beside what no model is needed for."""
    run = manylora.train(data="embedded", tasks=TASKS, limit=rows, num_experts=3, share="B")

    print("\none adapter, five tasks (scores of 0 to 100):")
    for task in run.scores.tasks:
        constant, keyword = (run.baselines[name].get(task.task, 0.0) for name in ("majority", "keyword"))
        print(
            f"  {task.task}: {task.score:.1f} on {task.n} test rows "
            f"(a constant answer: {constant:.1f}, the best keyword rule: {keyword:.1f})"
        )
    print(f"mean: {run.scores.mean:.1f} ± {run.scores.standard_error:.1f} (standard error over test rows)")
    print(f"the adapter: {run.adapter}")
    print(f"a page to look at: {run.report}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
