"""What a site lets leave, whatever a server asks for: pinned where the client runs, not told by the server."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from manylora.errors import ConfigError
from manylora.federated.config import FederateConfig
from manylora.federated.faults import ClientError, Fault
from manylora.federated.strategies import FED_ALORA_UNEQUAL, STRATEGIES, strategy_for


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Strategies and parts that a site has agreed to.

    Raises:
        ConfigError: there is no such strategy or part.
    """

    strategies: Collection[str] | None = None
    """Names. Default: every one."""
    parts: Collection[str] | None = None
    """Parts that may leave, as `Strategy.up` names them: A, B, dB (the product B2 B1, or its two factors). Default:
    every one that an allowed strategy sends."""

    def __post_init__(self) -> None:
        known = {part for one in (*STRATEGIES.values(), FED_ALORA_UNEQUAL) for part in one.up}
        for what, given, there in (
            ("strategy", self.strategies, STRATEGIES.keys()),
            ("part", self.parts, known),
        ):
            if unknown := sorted(set(given or ()) - set(there)):
                raise ConfigError(
                    f"there is no {what} {unknown[0]!r}; choose from {', '.join(sorted(there))}."
                )

    def check(self, config: FederateConfig) -> None:
        """Refuse a run that would let anything else leave.

        Raises:
            ClientError: it would.
        """
        if self.strategies is not None and config.strategy not in self.strategies:
            raise ClientError(
                Fault.NOT_ALLOWED,
                f"the server runs strategy {config.strategy}, this site allows {', '.join(sorted(self.strategies))} "
                "(--allow-strategy); nothing left.",
            )
        leaving = strategy_for(config.strategy, unequal=config.ranks is not None).up
        if self.parts is not None and not leaving <= set(self.parts):
            raise ClientError(
                Fault.NOT_ALLOWED,
                f"strategy {config.strategy} sends {', '.join(sorted(leaving))}, this site allows "
                f"{', '.join(sorted(self.parts))} (--allow-parts); nothing left.",
            )
