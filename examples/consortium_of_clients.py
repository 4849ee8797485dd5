"""A consortium of clients: each keeps its rows and its A, and only B travels (Fed-ALoRA), all in one process.

    python examples/consortium_of_clients.py [ROWS [ROUNDS]]

Each task of the embedded suite plays one client. To compare with, each client is also trained alone, with as many
steps. Clients on machines of their own: docs/federated.md.
"""

import sys

import manylora

TASKS = ["former_owner", "current_holder", "story_sum"]


def main(rows: int | None = None, rounds: int = 5) -> None:
    """Train together and alone, and print what that did for each client."""
    run = manylora.federate(data="embedded", tasks=TASKS, limit=rows, strategy="fed-alora", rounds=rounds)

    print("\nclient: together, alone")
    for client, together in run.scores.items():
        print(f"  {client}: {together.mean:.1f}, {run.reference[client].mean:.1f}")
    print(f"mean over {len(run.scores)} clients: {run.mean:.1f}")
    print(f"the run: {run.path}")
    print(f"a page to look at: {run.report}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
