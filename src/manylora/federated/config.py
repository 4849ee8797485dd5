"""What a federated run is: groups of settings as one flat, frozen record that server and clients share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from manylora.data import EMBEDDED, today
from manylora.errors import ConfigError
from manylora.federated.faults import shown
from manylora.federated.strategies import STRATEGIES, strategy_for
from manylora.files import whole_number
from manylora.files.settings import (
    Bound,
    Count,
    CountOrZero,
    NotNegative,
    Positive,
    Settings,
    field_types,
    has_type,
)
from manylora.training.config import RECIPES, TrainConfig, as_list
from manylora.training.settings import BEFORE, Seed, TrainingSettings

Schedule: TypeAlias = Literal["auto", "embedded", "standard", "published"]
if TYPE_CHECKING:
    StrategyName: TypeAlias = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]

_AT_MOST_1 = Bound(lambda value: 0 <= value <= 1, "a share of at most 1, such as 0.5")
Fraction: TypeAlias = Annotated[float, _AT_MOST_1]
PositiveFraction: TypeAlias = Annotated[Positive, _AT_MOST_1]


def _like_training(recipe: str) -> dict[str, Any]:
    """Five rounds of one local epoch, trained as `manylora train` trains on the same base."""
    return {"rounds": 5, "local_epochs": 1.0} | {k: v for k, v in RECIPES[recipe].items() if k != "epochs"}


SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "embedded": _like_training("embedded"),
    "standard": _like_training("standard"),
    # The settings that were released with arXiv 2509.25414 for its federated runs.
    "published": {
        "rounds": 11,
        "local_epochs": 10.0,
        "learning_rate": 5e-4,
        "batch_size": 16,
        "warmup": 0.0,
        "target_modules": ["q_proj", "v_proj"],
    },
}

NODE_SETTINGS = (
    "model", "data", "test", "tasks", "task_column", "limit", "device", "dtype", "eval_batch_size",
    "gradient_checkpointing", "micro_batch_size", "attention",
)  # fmt: skip
"""Settings that are each machine's own: a server does not tell a client which files to read."""
_NEVER_SENT = frozenset({*NODE_SETTINGS, "reference", "engine", "superlink", "certificate", "node_keys"})


@dataclass(frozen=True, kw_only=True)
class StrategySettings(Settings):
    """Clients, and what travels between them"""

    strategy: StrategyName = "fed-alora"
    """fed-alora (B travels), fedsa (A), fedit (both), ffa (B, with A frozen), local (nothing), centralized (the
    data), zero-padding, flora, flexlora."""
    clients: Count | None = None
    """Number of clients. Default: one per task."""
    partition: Literal["task", "iid", "dirichlet"] = "task"
    """How rows are dealt out: by task; alike for all; or each task by shares drawn from a Dirichlet."""
    dirichlet_alpha: Positive = 0.5
    """Concentration of the "dirichlet" partition; small values leave each client few tasks."""
    participation: PositiveFraction = 1.0
    """Share of the clients that take part in a round, drawn by seed."""
    ranks: list[int] | str | None = None
    """A rank for each client, as "64,64,32", repeated where there are more clients; r is then the intermediate rank
    that Fed-ALoRA's clients have in common, and the scale stays lora_alpha / r. Default: all have rank r."""
    a_state: Literal["persist", "reset"] = "persist"
    """Where A stays with the client: keep it from round to round (the paper's text), or set it back to its initial
    value each round (the released code)."""
    a_init: Literal["common", "per_client"] = "common"
    """Where A stays with the client: whether all clients begin with the same A."""
    personal: Literal["received", "trained"] = "received"
    """The personal model that is saved and scored: with what the server sent after the last round, or as the client
    itself had trained it last, before that was averaged."""
    optimizer: Literal["reset", "persist"] = "reset"
    """Adam's moments of what stays with the client: forgotten after each round, or kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", _as_ranks(self.ranks))


@dataclass(frozen=True, kw_only=True)
class RoundSettings(Settings):
    """Rounds"""

    schedule: Schedule = "auto"
    """Rounds, local epochs, learning rate, batch size, warm-up and target modules as one choice. auto: "embedded" for
    the embedded base, "standard" for any other; "published": 11 rounds of 10 epochs at 5e-4."""
    rounds: Count | None = None
    """Rounds. Default: from `--schedule`."""
    local_epochs: Positive | None = None
    """Passes of a client over its rows in a round. Default: from `--schedule`."""
    local_steps: Count | None = None
    """Optimizer steps of a client in a round, in place of --local-epochs. Default: --local-epochs counts."""
    reference: Literal["local", "none"] = "local"
    """local: also train each client alone, with equal steps, to compare with; left out where nothing travels anyway."""
    scored_clients: CountOrZero | None = None
    """Score the personal models of this many clients, in order; 0 for none. Default: all."""
    keep_rounds: Count = 3
    """How many finished rounds stay on disk, at the server and at the clients, so that --resume --from-round can go
    back."""


@dataclass(frozen=True, kw_only=True)
class AnswerCheckSettings(Settings):
    """What a client's answer may be, and how answers are added up"""

    wire: Literal["fp32", "bf16", "int8"] = "int8"
    """Numbers on the wire. int8 has one scale per rank component; what rounding loses goes into the next message. It
    showed no loss against fp32 in five seeds (docs/log.md), at a quarter of the bytes."""
    quorum: Fraction = 0.5
    """Share of a round's clients whose answers must count; with fewer the run stops."""
    deadline: Positive | None = None
    """Seconds that joining, a round, or scoring may take; later answers are dropped. Default: none."""
    max_examples: Count | None = None
    """Most examples that a client may claim to have; up to this they count as claimed. Default: 10 million, of which
    at most 10 times the median of the other clients' count."""
    max_update: Positive = 4.0
    """Largest change of a matrix that counts, as a multiple of what AdamW can move it (learning rate × steps; root
    mean square). Honest ones were measured below 1, products of unequal ranks below 1.5."""
    max_ratio: Positive = 10.0
    """Largest change of a client that counts, as a multiple of the median of the others' in its round (norm). Honest
    ones were measured below 2, with 4 to 197 rows a client."""
    robust: Literal["none", "clip", "trimmed-mean", "median"] = "none"
    """How the server adds changes up. none: weighted by examples; clip: likewise, none longer than --clip times the
    median; trimmed-mean, median: number by number, every client alike (Yin et al. 2018)."""
    clip: Positive = 1.0
    """With --robust clip: longest change, as a multiple of the median of the round's."""
    trim: Annotated[
        float, Bound(lambda value: 0 < value < 0.5, "a share between 0 and 0.5, such as 0.25")
    ] = 0.25
    """With --robust trimmed-mean: share of the clients left out at each end of every number, at least one."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """Where clients are"""

    engine: Literal["local", "flower"] = "local"
    """What carries messages: "local", all clients in this process; "flower", each on a machine of its own."""
    superlink: str | None = None
    """With --engine flower: HOST:PORT of the SuperLink."""
    certificate: str | None = None
    """With --engine flower: PEM file of the authority that signed the SuperLink's certificate. Without it, nothing is
    encrypted and no node authenticated: for tries on one machine."""
    node_keys: str | None = None
    """With --engine flower: folder with each client's public key as NAME.pub; only these may take part."""


@dataclass(frozen=True, kw_only=True)
class FederateConfig(TrainingSettings, StrategySettings, RoundSettings, AnswerCheckSettings, EngineSettings):
    """Settings of one federated run. A value left at `None` is filled in by `--schedule`."""

    date: str | None = None
    """The day, YYYY-MM-DD, that a chat template is told which asks for it, at every client the same. Default: the day
    on which the run begins."""
    r: Count = 8
    """Rank of every client's adapter; beside --ranks the intermediate rank."""
    target_modules: list[str] | str | None = None
    """Default: from `--schedule`."""
    learning_rate: Positive | None = None
    """Default: from `--schedule`."""
    warmup: NotNegative | None = None
    """Warm-up: a share of a client's steps in all rounds where below 1, else a number of steps. Default: from
    `--schedule`."""
    batch_size: Count | None = None
    """Rows per optimizer step of a client. Default: from `--schedule`."""
    seed: Seed = 0
    """Seeds initialisation, order and dropout, how rows are dealt out, and which clients take part in a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None and self.learning_rate > 1:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}; give at most 1, as AdamW moves every number by about that "
                "much in a step."
            )
        self._check_strategy()
        self._check_engine()

    def _check_engine(self) -> None:
        if self.engine == "local":
            for name in ("superlink", "certificate", "node_keys"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} means nothing to the engine local; add --engine flower.")
            return
        host, _, port = (self.superlink or "").rpartition(":")
        if not host or not 0 < (whole_number(port) or 0) < 65536:
            raise ConfigError(
                f"superlink is {self.superlink!r}; the engine flower needs the SuperLink's HOST:PORT."
            )
        if self.clients is None and self.node_keys is None:
            raise ConfigError(
                "clients is not set; tell the engine flower how many to wait for with --clients."
            )
        if self.node_keys is not None and self.certificate is None:
            raise ConfigError("node_keys needs TLS; give the authority's certificate with --certificate.")
        if self.strategy == "centralized":
            raise ConfigError(
                "strategy centralized needs all rows in one place, which the engine flower never has."
            )

    def _check_strategy(self) -> None:
        strategy = strategy_for(self.strategy, unequal=self.ranks is not None)
        if self.ranks is not None and not strategy.unequal:
            able = sorted({"fed-alora", *(name for name, value in STRATEGIES.items() if value.unequal)})
            raise ConfigError(
                f"strategy {self.strategy} needs one rank for all; leave --ranks out, or choose {', '.join(able)}."
            )
        linear = ", ".join(sorted(name for name, value in STRATEGIES.items() if value.linear))
        for name, usual, means_something, why in (
            ("a_state", "persist", strategy.keeps_a, "whose clients keep no A of their own"),
            ("a_init", "common", strategy.keeps_a, "whose clients keep no A of their own"),
            ("personal", "received", strategy.travels, "which sends nothing back"),
            ("personal", "received", not strategy.restarts, "whose clients start each round anew"),
            (
                "robust",
                "none",
                strategy.linear,
                f"whose answers are not added up one by one (choose {linear})",
            ),
        ):
            value = getattr(self, name)
            if value != usual and not means_something:
                raise ConfigError(
                    f"{name} {value} means nothing to strategy {self.strategy}, {why}; leave it out."
                )
        if self.strategy == "centralized" and self.clients not in (None, 1):
            raise ConfigError(
                f"clients is {self.clients}, but strategy centralized has all rows in one place."
            )

    def resolved(self) -> FederateConfig:
        """Fill every value that the schedule governs, and the date; idempotent."""
        name = self.schedule
        if name == "auto":
            name = "embedded" if self.model == EMBEDDED else "standard"
        updates = {key: value for key, value in SCHEDULES[name].items() if getattr(self, key) is None}
        local = dataclasses.replace(self, schedule=name, **updates)
        trained = local.train_config().resolved()
        paths: dict[str, Any] = {
            key: str(Path(value).expanduser().absolute())
            for key in ("certificate", "node_keys")
            if (value := getattr(local, key)) is not None
        }
        paths |= {key: getattr(trained, key) for key in ("model", "data", "test", "tasks", "target_modules")}
        return dataclasses.replace(local, date=self.date or today(), **paths)

    def train_config(self) -> TrainConfig:
        """The same settings as the training room knows them: one LoRA, whose epochs are those of all rounds."""
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainingSettings)}
        epochs = None if self.local_epochs is None else self.local_epochs * (self.rounds or 1)
        return TrainConfig(**common, method="lora", epochs=epochs)

    def rank_of(self, index: int) -> int:
        """The rank of the client that stands at `index` among all, sorted as the partition gives them."""
        return self.r if self.ranks is None else int(self.ranks[index % len(self.ranks)])

    def check_number_of_clients(self, number: int) -> None:
        """Refuse ranks for clients that do not exist.

        Raises:
            ConfigError: there are more ranks than clients.
        """
        if self.ranks is not None and len(self.ranks) > number:
            raise ConfigError(
                f"ranks names {len(self.ranks)} clients, but there are {number}; give at most {number} ranks."
            )

    @property
    def largest_rank(self) -> int:
        """The largest of all ranks."""
        return self.r if self.ranks is None else max(map(int, self.ranks))

    @property
    def scaling(self) -> float:
        """s, common to all clients."""
        return self.lora_alpha / self.r

    def local_reference(self) -> FederateConfig:
        """The same run in which nothing travels."""
        return dataclasses.replace(
            self,
            strategy="local",
            wire="fp32",
            a_state="persist",
            a_init="common",
            personal="received",
            robust="none",
            clients=None if self.strategy == "centralized" else self.clients,
        )

    def for_clients(self) -> dict[str, Any]:
        """The settings that a server sends its clients, as plain values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _NEVER_SENT}

    def accept_settings(self, settings: Mapping[str, Any]) -> FederateConfig:
        """This machine's own settings with those that a server sent.

        Raises:
            ConfigError: the server sent something unknown or impossible.
        """
        known = {field.name for field in dataclasses.fields(self)} - _NEVER_SENT
        if unknown := sorted(set(settings) - known):
            raise ConfigError(
                f"the server sets {shown(unknown[0])}, which this version of manylora does not know."
            )
        check_sent_types(settings, "the server")
        return dataclasses.replace(self, **{**BEFORE, **settings})


def check_sent_types(settings: Mapping[str, Any], who: str) -> None:
    """Refuse settings from elsewhere, each of a known name, that are of another type than they are here.

    Raises:
        ConfigError: one is.
    """
    for name, value in settings.items():
        too_large = isinstance(value, int) and abs(value) > 2**53
        if too_large or not has_type(value, field_types(FederateConfig)[name]):
            raise ConfigError(f"{who} sets {name} to {shown(value)}, which it cannot be.")


def _as_ranks(ranks: Sequence[int] | str | None) -> list[int] | None:
    words = as_list(ranks) if isinstance(ranks, str) else ranks
    if words is None:
        return None
    try:
        values = [int(word) for word in words]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"ranks {ranks!r} is no list of whole numbers; give one such as 64,32,8."
        ) from error
    if not values or min(values) < 1:
        raise ConfigError(f"ranks {ranks!r} must hold one or more numbers, each 1 or more.")
    return values
