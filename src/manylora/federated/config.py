"""What a federated run is: one flat, frozen record that the command line, YAML files, server and clients share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from manylora.data import EMBEDDED, check_date, today
from manylora.errors import ConfigError
from manylora.federated.faults import shown
from manylora.files import check_values, whole_number
from manylora.training.config import RECIPES, TrainConfig, Words, as_list

Schedule: TypeAlias = Literal["auto", "embedded", "standard", "published"]
StrategyName: TypeAlias = Literal[
    "fed-alora", "fedsa", "fedit", "ffa", "local", "centralized", "zero-padding", "flora", "flexlora"
]


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

_NODES_OWN = frozenset(
    {"model", "data", "test", "tasks", "task_column", "limit", "device", "dtype", "eval_batch_size",
     "gradient_checkpointing", "micro_batch_size", "reference", "engine", "superlink",
     "certificate", "node_keys"}
)  # fmt: skip
"""Settings that are each machine's own: a server does not tell a client which files to read."""


@dataclass(frozen=True, kw_only=True)
class FederateConfig:
    """Settings of one federated run. A value left at `None` is filled in by `--schedule`."""

    model: str = EMBEDDED
    """Base model: "embedded" (carried by the package), a local folder or a Hub id of a causal language model."""
    data: str = EMBEDDED
    """Training rows of all clients: "embedded" (the suite of 8 tasks), a file or folder of JSON, JSONL, CSV,
    TSV or Parquet, or a Hub data set id."""
    test: str | None = None
    """Test rows, in the same formats. Default: the data's own test split where it has one."""
    tasks: list[str] | str | None = None
    """Only these tasks, as "a,b" or a YAML list. Default: all."""
    task_column: str | None = None
    """Column that names a row's task. Default: the column "task", else the file's name."""
    limit: int | None = None
    """At most this many rows per task and split: a sample, the same each time, in which each answer keeps its share.
    Default: all."""
    loss_on: Literal["answer", "all"] = "answer"
    """Tokens that carry the loss: the answer alone, or prompt and answer."""
    max_length: int = 256
    """Tokens a row may have (the paper's cut-off). A longer prompt loses its beginning, an answer never anything."""
    date: str | None = None
    """The day, YYYY-MM-DD, that a chat template is told which asks for it, at every client the same. Default: the day
    on which the run begins, at the server."""

    strategy: StrategyName = "fed-alora"
    """fed-alora (B travels), fedsa (A), fedit (both), ffa (B, with A frozen), local (nothing), centralized (the
    data), zero-padding, flora, flexlora."""
    clients: int | None = None
    """Number of clients. Default: one per task."""
    partition: Literal["task", "iid", "dirichlet"] = "task"
    """How rows are dealt out: by task; alike for all; or each task by shares drawn from a Dirichlet."""
    dirichlet_alpha: float = 0.5
    """Concentration of the "dirichlet" partition; small values leave each client few tasks."""
    participation: float = 1.0
    """Share of the clients that take part in a round, drawn by seed."""
    ranks: list[int] | str | None = None
    """A rank for each client, as "64,64,32", repeated where there are more clients. Default: all have rank r."""
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

    r: int = 8
    """Rank; with --ranks, Fed-ALoRA's intermediate rank that all clients have in common."""
    lora_alpha: float = 16.0
    """The adapter's output is scaled by lora_alpha / r, with --ranks for every client alike."""
    lora_dropout: float = 0.05
    """Dropout on the adapter's input."""
    target_modules: list[str] | str | None = None
    """Layers that get an adapter: names such as "q_proj,v_proj", a regular expression, or "all-linear".
    Default: from `--schedule`."""

    schedule: Schedule = "auto"
    """Rounds, local epochs, learning rate, batch size, warm-up and target modules as one choice. auto: "embedded" for
    the embedded base, "standard" for any other; "published": 11 rounds of 10 epochs at 5e-4."""
    rounds: int | None = None
    """Rounds. Default: from `--schedule`."""
    local_epochs: float | None = None
    """Passes of a client over its rows in a round. Default: from `--schedule`."""
    local_steps: int | None = None
    """Optimizer steps of a client in a round, in place of --local-epochs."""
    learning_rate: float | None = None
    """Peak step size. Default: from `--schedule`."""
    warmup: float | None = None
    """Warm-up: a share of a client's steps in all rounds where below 1, else a number of steps. Default: from
    `--schedule`."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Shape of the learning rate over all rounds after the warm-up."""
    batch_size: int | None = None
    """Rows per optimizer step. Default: from `--schedule`."""
    micro_batch_size: int | None = None
    """Rows per forward pass; the rest of a batch is accumulated. Default: the whole batch."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen base. auto: float32 on CPU, bfloat16 on a GPU that has it. Adapters stay in float32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes a GPU where there is one."""
    seed: int = 0
    """Seeds the partition, the participation, initialisation, order and dropout."""

    wire: Literal["fp32", "bf16", "int8"] = "int8"
    """Numbers on the wire. int8 has one scale per rank component; what rounding loses goes into the next message. The
    default because five seeds show no loss against fp32 (docs/log.md), at a quarter of the bytes."""
    quorum: float = 0.5
    """Share of a round's clients whose answers must count; with fewer the run stops."""
    deadline: float | None = None
    """Seconds that joining, a round, or scoring may take; later answers are dropped. Default: none."""
    max_examples: int | None = None
    """Most examples that a client may claim to have; up to this they count as claimed. Default: 10 million, of which
    at most 10 times the median of the other clients' count."""
    max_update: float = 4.0
    """Largest change of a matrix that counts, as a multiple of what AdamW can move it (learning rate × steps; root
    mean square). Honest ones were measured below 1, products of unequal ranks below 1.5."""
    max_ratio: float = 10.0
    """Largest change of a client that counts, as a multiple of the median of the others' in its round (norm). Honest
    ones were measured below 2, with 4 to 197 rows a client."""
    robust: Literal["none", "clip", "trimmed-mean", "median"] = "none"
    """How the server adds changes up. none: weighted by examples; clip: likewise, none longer than --clip times the
    median; trimmed-mean, median: number by number, every client alike (Yin et al. 2018)."""
    clip: float = 1.0
    """With --robust clip: longest change, as a multiple of the median of the round's."""
    trim: float = 0.25
    """With --robust trimmed-mean: share of the clients left out at each end of every number, at least one."""
    keep_rounds: int = 3
    """How many finished rounds stay on disk, at the server and at the clients, so that --resume --from-round can go
    back."""

    engine: Literal["local", "flower"] = "local"
    """What carries messages: "local", all clients in this process; "flower", each on a machine of its own."""
    superlink: str | None = None
    """With --engine flower: HOST:PORT of the SuperLink."""
    certificate: str | None = None
    """With --engine flower: PEM file of the authority that signed the SuperLink's certificate. Without it, nothing is
    encrypted and no node authenticated: for tries on one machine."""
    node_keys: str | None = None
    """With --engine flower: folder with each client's public key as NAME.pub; only these may take part."""

    reference: Literal["local", "none"] = "local"
    """Also train each client alone, with equal steps, to compare with; left out where nothing travels anyway."""
    scored_clients: int | None = None
    """Score the personal models of this many clients, in order; 0 for none. Default: all."""
    eval_batch_size: int = 64
    """Rows per batch when answers are generated. It does not change the answers."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: per task, the longest training answer plus 8."""
    rouge: Words = "all"
    """What ROUGE-1 counts as words: "all", those of every script; "published", runs of a-z and 0-9 alone."""

    def __post_init__(self) -> None:
        check_values(self)
        positive = (
            "limit", "clients", "dirichlet_alpha", "participation", "r", "lora_alpha", "rounds", "local_epochs",
            "local_steps", "learning_rate", "batch_size", "micro_batch_size", "max_length", "deadline",
            "max_examples", "max_update", "max_ratio", "clip", "keep_rounds", "eval_batch_size", "max_new_tokens",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; give a value above 0.")
        if self.learning_rate is not None and self.learning_rate > 1:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}; give at most 1, as AdamW moves every number by about that "
                "much in a step."
            )
        for name in ("participation", "quorum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a share of at most 1, such as 0.5.")
        if self.scored_clients is not None and self.scored_clients < 0:
            raise ConfigError(f"scored_clients is {self.scored_clients}; give 0 or more.")
        check_date(self.date)
        if not 0 < self.trim < 0.5:
            raise ConfigError(f"trim is {self.trim}; give a share between 0 and 0.5, such as 0.25.")
        object.__setattr__(self, "ranks", _as_ranks(self.ranks))
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
        from manylora.federated.strategies import STRATEGIES, strategy_for

        strategy = strategy_for(self.strategy, unequal=self.ranks is not None)
        if self.ranks is not None and not strategy.unequal:
            able = sorted({"fed-alora", *(name for name, value in STRATEGIES.items() if value.unequal)})
            raise ConfigError(
                f"strategy {self.strategy} needs one rank for all; leave --ranks out, or choose {', '.join(able)}."
            )
        for name, usual in (("a_state", "persist"), ("a_init", "common")):
            value = getattr(self, name)
            if value != usual and not strategy.keeps_a:
                raise ConfigError(
                    f"{name} {value} means nothing to strategy {self.strategy}, whose clients keep no A of their "
                    "own; leave it out."
                )
        if self.personal == "trained" and not strategy.travels:
            raise ConfigError(
                f"personal trained means nothing to strategy {self.strategy}, which sends nothing back; leave it out."
            )
        if self.personal == "trained" and strategy.restarts:
            raise ConfigError(
                f"personal trained means nothing to strategy {self.strategy}, whose clients start each round anew; "
                "leave it out."
            )
        if self.robust != "none" and not strategy.linear:
            able = sorted(name for name, value in STRATEGIES.items() if value.linear)
            raise ConfigError(
                f"robust {self.robust} means nothing to strategy {self.strategy}, whose answers are not added up one "
                f"by one; leave it out, or choose {', '.join(able)}."
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
        shared = {field.name for field in dataclasses.fields(TrainConfig)} & {
            field.name for field in dataclasses.fields(self)
        }
        settings = {name: getattr(self, name) for name in shared}
        epochs = None if self.local_epochs is None else self.local_epochs * (self.rounds or 1)
        return TrainConfig(**settings, method="lora", epochs=epochs)

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
        """The settings that a server tells its clients, as plain values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in _NODES_OWN}

    def told(self, settings: Mapping[str, Any]) -> FederateConfig:
        """This machine's own settings with those that a server told.

        Raises:
            ConfigError: the server told something unknown or impossible.
        """
        known = {field.name for field in dataclasses.fields(self)} - _NODES_OWN
        if unknown := sorted(set(settings) - known):
            raise ConfigError(
                f"the server sets {shown(unknown[0])}, which this version of manylora does not know."
            )
        check_types(settings, "the server")
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `config.yaml`."""
        return dataclasses.asdict(self)


def check_types(settings: Mapping[str, Any], who: str) -> None:
    """Refuse settings from elsewhere, each of a known name, that are of another type than they are here.

    Raises:
        ConfigError: one is.
    """
    types = get_type_hints(FederateConfig)
    for name, value in settings.items():
        if not _is_of(value, types[name]):
            raise ConfigError(f"{who} sets {name} to {shown(value)}, which it cannot be.")


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value that came as JSON is of a field's type; numbers are finite and not beyond any use."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(one, get_args(kind)[0]) for one in value)
    if get_args(kind):
        return any(_is_of(value, one) for one in get_args(kind))
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) <= 2**53  # type: ignore[arg-type]
    return type(value) is kind


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
