"""`manylora federate`: many clients, rounds of local training, and what a strategy lets travel between."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manylora.cli.console import complain, draw_report
from manylora.cli.options import FederateOptions, refuse_beside_resume
from manylora.cli.parsing import parse
from manylora.cli.progress import ConsoleProgress
from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.files.settings import settings_of
from manylora.jobs.launch import refuse_launcher
from manylora.training.config import as_list

if TYPE_CHECKING:
    from manylora.jobs.run import FederatedRun

DESCRIPTION = """\
Fine-tune one base model with many clients; each keeps its rows, and what else leaves it is the strategy's choice.

Without options: the 8 tasks of the embedded suite as 8 clients, Fed-ALoRA (only B travels), 5 rounds of one local
epoch, in one process; then the same training without any exchange, to compare with. A few minutes on two CPU cores.

  manylora federate --dry-run                                 what would travel, counted
  manylora federate --strategy fedit --wire fp32              another strategy, nothing rounded
  manylora federate --ranks 16,16,8,8,4,4,2,2                 clients of unequal ranks
  manylora federate --partition dirichlet --clients 20 --participation 0.3
  manylora federate --data flan8/train --test flan8/test      your own rows (JSON, JSONL, CSV, Parquet, Hub id)
  manylora federate --engine flower --superlink HOST:PORT --clients 3 --recipe    clients on machines of their own
  manylora federate --resume runs/federate-001                go on after a crash
  manylora federate --resume runs/federate-001 --from-round 3    go back to a round"""

_ON_RESUME = frozenset({"resume", "from_round", "reset_client"})
"""Options that may stand beside --resume."""


def run(arguments: Sequence[str]) -> int:
    """Run the verb; see `DESCRIPTION`."""
    refuse_launcher("federate", complain)
    options, given = parse(FederateOptions, arguments, verb="federate", description=DESCRIPTION)
    if options.resume is not None:
        refuse_beside_resume(given, _ON_RESUME)
        reset = as_list(options.reset_client) or []
        return _resume(options.resume, from_round=options.from_round, reset=reset)
    if given & _ON_RESUME:
        raise ConfigError(
            "--from-round and --reset-client are about a run that there is; name it with --resume."
        )
    if options.node is not None:
        return _work_for_node(options, given)
    if given & {"allow_strategy", "allow_parts"}:
        raise ConfigError("--allow-strategy and --allow-parts are for a client; give them beside --node.")
    if options.dimensions is not None and not options.dry_run:
        raise ConfigError("--dimensions has no weights behind it; add --dry-run.")
    config = settings_of(options, FederateConfig)
    if options.dry_run:
        from manylora.cli.federating import print_traffic

        print_traffic(config.resolved(), dimensions=options.dimensions)
        return 0
    if options.recipe:
        from manylora.federated.engines.flower_recipe import recipe

        print(recipe(config.resolved()))
        return 0
    from manylora.jobs.federate import federate

    return _conclude(federate(config, out=options.out, progress=ConsoleProgress()))


def _resume(path: str, *, from_round: int | None, reset: Sequence[str]) -> int:
    from manylora.cli.federating import print_result
    from manylora.jobs.federate import finished_run, resume

    run = None if reset or from_round is not None else finished_run(path)
    if run is None:
        return _conclude(resume(path, from_round=from_round, reset=reset, progress=ConsoleProgress()))
    print(f"{path} is finished already.")
    print_result(run.path)
    draw_report(run.path)
    return 0


def _conclude(run: FederatedRun) -> int:
    from manylora.cli.federating import print_result

    print_result(run.path)
    print(f"{run.state['seconds']:.0f} s")
    draw_report(run.path)
    return 0


def _work_for_node(options: FederateOptions, given: set[str]) -> int:
    """Be a client: work for a SuperNode until Ctrl-C."""
    if extra := sorted(given - {"node", "engine", "allow_strategy", "allow_parts"}):
        raise ConfigError(
            f"--{extra[0].replace('_', '-')} beside --node: a client's settings stand in its SuperNode's --node-config."
        )
    from manylora.federated.allowed import Allowed
    from manylora.federated.engines.flower_node import work

    allowed = Allowed(strategies=as_list(options.allow_strategy), parts=as_list(options.allow_parts))
    work(str(options.node), say=lambda line: print(line, file=sys.stderr, flush=True), allowed=allowed)
    return 0
