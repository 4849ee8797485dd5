"""Five tasks, one model: three experts that share one B, and a router that mixes them for every token.

    python examples/five_tasks_one_model.py [ROWS]

ROWS is how many rows of each task are trained and tested on; all by default, which is a matter of minutes on two
cores.
"""

import sys

import manylora

TASKS = ["praised_thing", "former_owner", "story_sum", "record_to_text", "register_entry"]


def main(rows: int | None = None) -> None:
    """Train, and set each task's score beside what no model is needed for."""
    run = manylora.train(data="embedded", tasks=TASKS, limit=rows, num_experts=3, share="B")

    print("\none adapter, five tasks (scores of 0 to 100):")
    for task in run.scores.tasks:
        print(f"  {task.task}: {task.score:.1f} on {task.n} test rows")
        for name, by_task in run.baselines.items():  # a constant answer, a keyword rule; of all rows only
            print(f"    {name} alone: {by_task[task.task]:.1f}")
    print(f"mean: {run.scores.mean:.1f} ± {run.scores.standard_error:.1f} (standard error over test rows)")
    print(f"the adapter: {run.adapter}")
    print(f"a page to look at: {run.report}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
