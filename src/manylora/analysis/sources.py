"""Adapters from disk as matrices: ours and plain PEFT LoRAs, finished runs and bare folders, safetensors only.

No base model is needed. A source is one adapter; where it comes from a run, the run tells its tasks, its seed and the
snapshots that it kept.

Shape letters: D in, O out, R rank, N experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from peft import LoraConfig, PeftConfig
from torch import Tensor

from manylora.adapters import ManyLoraConfig, expert_names, read_any
from manylora.adapters.export import PREFIX
from manylora.adapters.layout import Layout
from manylora.analysis.records import SourceFacts
from manylora.errors import ModelError
from manylora.files import Record, read_record, whole_number
from manylora.training import RunFolder, adapter_folder, check_layers, find_snapshots, read_task_facts

Format = Literal["manylora", "lora"]

_CONFIG = "adapter_config.json"
_BANK = ".manylora_experts."


class _Score(Record):
    mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The matrices of one adapted linear layer, by expert; the one of a shared matrix, or of a single LoRA, is ""."""

    A: Mapping[str, Tensor]
    """(R, D) each."""
    B: Mapping[str, Tensor]
    """(O, R) each."""

    def vectors(self, matrix: str) -> dict[str, Tensor]:
        """The R vectors of each A, its rows (R, D), or of each B, its columns (R, O)."""
        return dict(self.A) if matrix == "A" else {name: B.T for name, B in self.B.items()}


Layers = Mapping[str, Layer]
"""Full module name to its matrices."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One adapter and what is known of it."""

    name: str
    path: Path
    """As given."""
    folder: Path
    """The PEFT folder."""
    format: Format
    layers: Layers
    share: Literal["A", "B", "none"]
    """Which matrix the experts share; "B" for a single LoRA too, which shares both."""
    num_experts: int = 1
    router: str | None = None
    expert_tasks: Mapping[str, str] = field(default_factory=dict)
    """Expert to its task, under the task router."""
    tasks: tuple[str, ...] = ()
    """Tasks it was trained on; empty where unknown."""
    seed: int | None = None
    score: float | None = None
    """Mean score of its run on test rows: what was learnt at all."""
    snapshots: Mapping[int, Path] = field(default_factory=dict)
    """Step to safetensors file."""
    last_step: int | None = None
    """Step of `layers`, where known."""
    drawn_apart: str | None = None
    """Tells adapters with one seed apart whose initialisation was drawn apart all the same (federated clients)."""

    def initialisation(self) -> tuple[object, ...] | None:
        """Equal for two adapters that began with the same A; None where the seed is unknown.

        One seed draws the same numbers only for the same layers, ranks and number of experts.
        """
        if self.seed is None:
            return None
        shapes = tuple(
            (name, expert, tuple(A.shape))
            for name, layer in self.layers.items()
            for expert, A in layer.A.items()
        )
        return (self.seed, self.drawn_apart, self.router == "token", shapes)

    def facts(self) -> SourceFacts:
        """What analysis.json says of it."""
        return SourceFacts(
            name=self.name,
            path=str(self.path),
            format=self.format,
            tasks=self.tasks,
            seed=self.seed,
            score=self.score,
            share=self.share,
            num_experts=self.num_experts,
            router=self.router,
            modules=len(self.layers),
            steps=tuple(self.snapshots),
        )

    def snapshot(self, step: int) -> Layers:
        """The matrices at a kept step."""
        _, layers = _read(self.folder, self.snapshots[step])
        if lacking := sorted(self.layers.keys() ^ layers.keys()):
            raise ModelError(
                f"{self.snapshots[step]} and {self.folder} do not hold the same layers (first {lacking[0]!r}); leave "
                "that step out."
            )
        return layers


def load_source(path: str | Path) -> Source:
    """Read one adapter.

    Args:
        path: a finished run, an adapter folder of ours or of PEFT's LoRA, or a trainer's output folder whose
            checkpoint-STEP folders are adapters.

    Raises:
        ModelError: no adapter there, another method's, pickled or damaged weights, numbers that are not finite,
            or weights that are not those which such an adapter has on its base (where its base is at hand).
        RunError: the run's files are damaged.
    """
    given = Path(path).expanduser()
    checkpoints = _checkpoints(given)
    newest = checkpoints[max(checkpoints)] if checkpoints else None
    folder = newest if newest and not (given / _CONFIG).is_file() else adapter_folder(given)
    about, layers = _read(folder)
    run = folder.parent if folder.name == "adapter" else given
    facts = _run_facts(run)
    snapshots = find_snapshots(run) or {
        step: file
        for step, place in checkpoints.items()
        if (file := place / "adapter_model.safetensors").is_file()
    }
    last = facts.pop("last_step", None)
    return Source(
        name=(given.resolve().parent if given.name == "adapter" else given.resolve()).name,
        path=given,
        folder=folder,
        layers=layers,
        snapshots=snapshots,
        last_step=last if last is not None else max(checkpoints, default=None),
        **about,
        **facts,
    )


def load_sources(paths: list[str]) -> list[Source]:
    """Read several adapters and give them names that differ; a federated run stands for all its clients.

    Raises:
        ModelError, RunError: as `load_source`.
    """
    sources: list[Source] = []
    for path in paths:
        clients = sorted(Path(path).expanduser().glob(f"clients/*/adapter/{_CONFIG}"))
        if clients:
            sources += [_client(Path(path).expanduser(), place.parents[1]) for place in clients]
        else:
            sources.append(load_source(path))
    return _with_distinct_names(sources)


def _with_distinct_names(sources: list[Source]) -> list[Source]:
    names = [source.name for source in sources]
    longer = [
        source.name
        if names.count(source.name) == 1
        else "-".join(
            [part for part in source.path.resolve().parts if part not in ("clients", "adapter")][-2:]
        )
        for source in sources
    ]
    seen: dict[str, Path] = {}
    for name, source in zip(longer, sources, strict=True):
        if name in seen:
            raise ModelError(f"{seen[name]} and {source.path} would both be called {name!r}; give each once.")
        seen[name] = source.path
    return [replace(source, name=name) for name, source in zip(longer, sources, strict=True)]


def _client(run: Path, home: Path) -> Source:
    """A federated run's client: its personal LoRA."""
    source, settings = load_source(home), RunFolder(run).read_config()
    client = unquote(home.name)
    return replace(
        source,
        name=client,
        tasks=(client,) if settings.get("partition") == "task" else (),
        seed=settings.get("seed"),
        drawn_apart=None if settings.get("a_init") == "common" else client,
    )


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Step to adapter folder, as transformers' Trainer names them."""
    found = {}
    for config in folder.glob(f"checkpoint-*/{_CONFIG}"):
        number = whole_number(config.parent.name.removeprefix("checkpoint-"))
        if number is not None:
            found[number] = config.parent
    return dict(sorted(found.items()))


def _run_facts(run: Path) -> dict[str, Any]:
    """Tasks, seed and last step, as far as a run folder tells them."""
    if not (run / "config.yaml").is_file() or not (run / "state.json").is_file():
        return {}
    known = RunFolder(run)
    settings = known.read_config()
    facts = read_task_facts(run / "adapter")
    listed = settings.get("tasks")
    tasks = list(facts.tasks) if facts is not None else listed if isinstance(listed, list) else []
    seed = settings.get("seed")
    # where the best weights were kept, it is not known which step's they are
    last = known.state.get("steps") if settings.get("keep", "last") == "last" else None
    scored = (run / "scores.json").is_file()
    score = read_record(run / "scores.json", _Score, remedy="put a copy of it back").mean if scored else None
    return {
        "tasks": tuple(map(str, tasks)),
        "seed": seed if isinstance(seed, int) else None,
        "score": score,
        "last_step": last,
    }


def _read(folder: Path, file: Path | None = None) -> tuple[dict[str, Any], dict[str, Layer]]:
    """What the settings say, and the matrices (of `file` in place of the folder's own)."""
    config, weights = read_any(folder, weights=file)
    if file is None:
        _check_layers(config, weights, folder)
    if isinstance(config, ManyLoraConfig):
        layers = _expert_layers(config, weights, folder)
        named = config.routes_by_task and config.task_names is not None
        about: dict[str, Any] = {
            "format": "manylora",
            "share": config.share,
            "num_experts": config.num_experts,
            "router": config.router if config.num_experts > 1 else None,
            "expert_tasks": {task: task for task in expert_names(config)} if named else {},
        }
    elif config.get("peft_type") == "LORA":
        layers = _lora_layers(weights, folder)
        about = {"format": "lora", "share": "B"}
    else:
        raise ModelError(
            f"{folder} holds a {config.get('peft_type')} adapter; this reads those of ManyLoRA and PEFT's LoRA."
        )
    return about, layers


def _check_layers(
    config: ManyLoraConfig | Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path
) -> None:
    """Ours, and LoRAs that say they are of a language model; of what architecture others are, nobody says."""
    if isinstance(config, ManyLoraConfig):
        settings: PeftConfig = config
    elif config.get("peft_type") == "LORA" and config.get("task_type") == "CAUSAL_LM":
        known = {one.name for one in dataclasses.fields(LoraConfig)}
        settings = LoraConfig(**{name: value for name, value in config.items() if name in known})
    else:
        return
    check_layers(settings, weights, base=settings.base_model_name_or_path, source=folder)


def _expert_layers(config: ManyLoraConfig, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Layer]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        module, mark, leaf = key.removeprefix(PREFIX).rpartition(_BANK)
        if mark:
            found.setdefault(module, {})[leaf] = tensor
    names = expert_names(config)
    layers = {}
    for module, parts in found.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ModelError(f"The weights of {module!r} in {folder} are incomplete; save the adapter again.")
        A, B = parts["lora_A"], parts["lora_B"]
        layout = Layout.of_matrices(A, B, num_experts=config.num_experts, share=config.share)
        if layout is None:
            raise ModelError(
                f"The weights of {module!r} in {folder} have shapes {tuple(A.shape)} and {tuple(B.shape)}, which are "
                f"not those of {config.num_experts} experts with share={config.share!r}; save the adapter again."
            )
        layers[module] = Layer(
            A=_by_expert(A.split(layout.rank), names, layout.a_of),
            B=_by_expert(B.split(layout.rank, dim=1), names, layout.b_of),
        )
    if not layers:
        raise ModelError(f"{folder} holds no experts; save the adapter again.")
    return layers


def _by_expert(matrices: Sequence[Tensor], names: Sequence[str], of: Sequence[int]) -> dict[str, Tensor]:
    """Each expert's matrix by its name; "" for the one that all have in common."""
    if len(matrices) == 1:
        return {"": matrices[0]}
    return {name: matrices[number] for name, number in zip(names, of, strict=True)}


def _lora_layers(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Layer]:
    """Linear layers only: embeddings and convolutions have no (R, D) and (O, R), and are left out."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        module, mark, leaf = key.removeprefix(PREFIX).rpartition(".lora_")
        if mark and leaf in ("A.weight", "B.weight") and tensor.dim() == 2:
            pairs.setdefault(module, {})[leaf[0]] = tensor
    if not pairs:
        raise ModelError(f"{folder} holds no LoRA of a linear layer.")
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {part: tuple(tensor.shape) for part, tensor in pair.items()}
            raise ModelError(f"{folder} is damaged: the weights of {module!r} are {shapes}.")
    return {module: Layer(A={"": pair["A"]}, B={"": pair["B"]}) for module, pair in pairs.items()}
