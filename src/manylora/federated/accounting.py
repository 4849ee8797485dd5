"""What travels, counted from dimensions alone: as the papers count it, and as it is sent here.

Parameters and bytes per client and round. D in, O out, R the intermediate (or only) rank, K_k a client's rank.
The published figures (arXiv 2509.25414, federated tables) follow different rules; each is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from manylora.errors import ConfigError
from manylora.federated.parts import PARTS, PLAIN, sent_as
from manylora.federated.strategies import STRATEGIES, strategy_for
from manylora.federated.strategy import Strategy
from manylora.federated.wire import Format, payload_bytes

Layers: TypeAlias = Mapping[tuple[int, int], int]
"""(O, D) to the number of adapted layers of this size."""

PUBLISHED_MODELS: Mapping[str, Layers] = {
    "llama2-7b": {(4096, 4096): 64},
    "qwen2-7b": {(3584, 3584): 56},
}
"""LLaMA2-7B with q_proj and v_proj in 32 layers, Qwen2-7B with q_proj and o_proj in 28, as the paper counts them."""

PUBLISHED_RANKS = (64, 64, 32, 32, 16, 16, 8, 8)
"""The unequal ranks of the eight clients."""


class Traffic(NamedTuple):
    """What one client sends and receives in a round."""

    parameters_up: float
    parameters_down: float
    bytes_up: float = 0.0
    """Numbers and int8 scales; a message's header comes on top."""
    bytes_down: float = 0.0

    @property
    def parameters(self) -> float:
        """Both ways."""
        return self.parameters_up + self.parameters_down

    @property
    def bytes(self) -> float:
        """Both ways."""
        return self.bytes_up + self.bytes_down


class PublishedFigure(NamedTuple):
    """One figure of the paper, with the rule that gives it."""

    model: str
    strategy: str
    ranks: tuple[int, ...]
    r: int
    rule: str
    millions: float
    """As printed: parameters per client and round, up plus down, mean over clients."""

    def counted(self) -> float:
        """The same figure from the dimensions, in parameters."""
        return published_parameters(self.rule, PUBLISHED_MODELS[self.model], self.ranks, r=self.r)


def published_parameters(rule: str, layers: Layers, ranks: Sequence[int], *, r: int) -> float:
    """Parameters per client and round, up plus down, mean over clients, by one of the papers' rules.

    Raises:
        ConfigError: there is no such rule.
    """
    k, largest = math.fsum(ranks) / len(ranks), max(ranks)
    rules: Mapping[str, Callable[[int, int], float]] = {
        "A and B, both ways": lambda o, d: 2 * k * (o + d),
        "A, both ways": lambda o, d: 2 * k * d,
        "B, both ways": lambda o, d: 2 * k * o,
        "A and B, up at each rank, down at the largest": lambda o, d: (k + largest) * (o + d),
        "B2 up, B0 down": lambda o, d: k * o + r * o,
        "B2 up, B0 down, and the r × rank terms of B1 and M": lambda o, d: k * o + r * o + 2 * r * k,
        "A and B up, the stack of all down": lambda o, d: (k + math.fsum(ranks)) * (o + d),
        "nothing": lambda o, d: 0.0,
    }
    if rule not in rules:
        raise ConfigError(f"there is no rule {rule!r} of counting; see `Strategy.published`.")
    return math.fsum(count * rules[rule](out, in_) for (out, in_), count in layers.items())


_EIGHT = (8,) * 8
_PADDED, _WITH_TERMS = (
    "A and B, up at each rank, down at the largest",
    "B2 up, B0 down, and the r × rank terms of B1 and M",
)
PUBLISHED = (
    PublishedFigure("llama2-7b", "fedit", _EIGHT, 8, "A and B, both ways", 8.39),
    PublishedFigure("llama2-7b", "fed-alora", _EIGHT, 8, "B, both ways", 4.19),
    PublishedFigure("qwen2-7b", "fedit", _EIGHT, 8, "A and B, both ways", 6.42),
    PublishedFigure("qwen2-7b", "fed-alora", _EIGHT, 8, "B, both ways", 3.21),
    PublishedFigure("llama2-7b", "zero-padding", PUBLISHED_RANKS, 16, _PADDED, 49.28),
    PublishedFigure("llama2-7b", "fed-alora", PUBLISHED_RANKS, 16, _WITH_TERMS, 12.12),
    PublishedFigure("qwen2-7b", "zero-padding", PUBLISHED_RANKS, 16, _PADDED, 37.73),
    PublishedFigure("qwen2-7b", "fed-alora", PUBLISHED_RANKS, 16, "B2 up, B0 down", 9.23),
)
"""The eight figures (arXiv 2509.25414, federated tables)."""


def as_sent(
    strategy: Strategy, layers: Layers, ranks: Sequence[int], *, r: int, wire: Format = "fp32"
) -> list[Traffic]:
    """What each client sends and receives in a round here, where all take part.

    A product goes as its factors where they are lighter, a truncated state at the client's own rank, and FLoRA's
    stack has every client's factors.

    Args:
        strategy: of the run.
        layers: sizes of the adapted layers.
        ranks: of the clients.
        r: intermediate rank.
        wire: number format.
    """
    traffic = []
    for rank in ranks:
        down = [(part, rank) for part in strategy.down]
        if strategy.restarts:
            down = [(part, sum(ranks)) for part in PLAIN]
        totals = [0, 0, 0, 0]  # in the order of `Traffic`
        for layer, count in layers.items():
            forms = [sent_as(part, layer=layer, rank=rank, intermediate=r) for part in strategy.up]
            up = [(part, rank) for form in forms for part in form]
            for way, sent in enumerate((up, down)):
                for part, own in sent:
                    shape = PARTS[part].shape(layer=layer, rank=own, intermediate=r)
                    totals[way] += count * math.prod(shape)
                    components = shape[PARTS[part].components]
                    totals[2 + way] += count * payload_bytes(shape, wire, components=components)
        traffic.append(Traffic(*totals))
    return traffic


def mean_traffic(clients: Sequence[Traffic]) -> Traffic:
    """The mean over clients."""
    return Traffic(*(math.fsum(column) / len(clients) for column in zip(*clients, strict=True)))


def parse_dimensions(text: str) -> Layers:
    """ "4096x4096x64,1024x4096x32" or the name of a published model to layer sizes.

    Raises:
        ConfigError: it is neither.
    """
    if text in PUBLISHED_MODELS:
        return PUBLISHED_MODELS[text]
    layers: dict[tuple[int, int], int] = {}
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", word.strip())
        if match is None or 0 in map(int, match.groups()):
            raise ConfigError(
                f"dimensions {word.strip()!r} is neither OxDxNUMBER, as 4096x4096x64, nor one of "
                f"{', '.join(PUBLISHED_MODELS)}."
            )
        out, in_, count = map(int, match.groups())
        layers[out, in_] = layers.get((out, in_), 0) + count
    return layers


def strategies_for(ranks: Sequence[int]) -> list[Strategy]:
    """Every strategy that can work with these ranks, those without traffic left out."""
    unequal = len(set(ranks)) > 1
    found = (strategy_for(name, unequal=unequal) for name in STRATEGIES)
    return [strategy for strategy in found if strategy.travels and (strategy.unequal or not unequal)]
