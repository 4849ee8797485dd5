"""Who takes part: clients with the base that most have, and how much each one's rows count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from manylora.errors import AnswerError, RunError, WireError
from manylora.federated.check import agreed_counts, check_joined
from manylora.federated.clients import Clients, Reply
from manylora.federated.config import FederateConfig
from manylora.federated.faults import clean_text
from manylora.federated.parts import Shapes
from manylora.federated.progress import RoundsDisplay
from manylora.federated.wire import JOINING, unpack
from manylora.training import same_base


@dataclass(kw_only=True)
class _Group:
    """Clients that have the same base."""

    base: str
    shapes: Shapes
    examples: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Participants:
    """What came of joining."""

    examples: dict[str, int]
    """Client to the rows that it claims."""
    agreed: dict[str, int]
    """Client to the rows that count."""
    base: str
    """Fingerprint of the base that all of them have."""
    shapes: Shapes
    refused: dict[str, str]
    """Client to why it does not take part."""


class Joining:
    """Takes in the answers to "join", one after the other.

    Args:
        config: resolved.
        clients: who were asked; says how many rows a client has, where it knows.
        progress: told who is refused.
    """

    def __init__(self, config: FederateConfig, clients: Clients, progress: RoundsDisplay) -> None:
        self.config, self.clients, self.progress = config, clients, progress
        self._groups: list[_Group] = []
        self._refused: dict[str, str] = {}

    def take(self, reply: Reply) -> None:
        """One client's answer."""
        name = reply.client
        if name in self._refused or any(name in group.examples for group in self._groups):
            return
        try:
            if reply.data is None:
                raise AnswerError(reply.reason or "no answer")
            examples, base, shapes = check_joined(
                unpack(reply.data, JOINING),
                name=name,
                max_examples=self.config.max_examples,
                known=self.clients.examples(name),
            )
        except (AnswerError, WireError) as error:
            self._refuse(name, clean_text(error))
            return
        self._group(base, shapes).examples[name] = examples

    def _group(self, base: str, shapes: Shapes) -> _Group:
        """The clients with this base; marks of one base may differ a little (see `same_base`)."""
        for group in self._groups:
            if group.shapes == shapes and same_base(group.base, base):
                return group
        self._groups.append(_Group(base=base, shapes=shapes))
        return self._groups[-1]

    def result(self, names: Iterable[str], *, no_answer: str) -> Participants:
        """Who takes part: of several bases the one that most clients have, whoever came first.

        Args:
            names: who were asked.
            no_answer: why one that is missing does not take part.

        Raises:
            RunError: no base has most.
        """
        groups = sorted(self._groups, key=lambda group: (-len(group.examples), min(group.examples)))
        if len(groups) > 1 and len(groups[0].examples) == len(groups[1].examples):
            both = " and ".join(f"{_listed(group.examples)} {group.base}" for group in groups[:2])
            raise RunError(
                f"clients have different base models, or other layers of them, and none has most: {both} "
                "(fingerprints); give all the same."
            )
        most = groups[0] if groups else _Group(base="", shapes={})
        for group in groups[1:]:
            for name in sorted(group.examples):
                self._refuse(
                    name,
                    f"it has another base model, or other layers of it, than {len(most.examples)} others "
                    f"(fingerprints {group.base} and {most.base}); give all the same",
                )
        for name in names:
            if name not in most.examples and name not in self._refused:
                self._refused[name] = no_answer
        return Participants(
            examples=most.examples,
            agreed=self._agreed(most.examples),
            base=most.base,
            shapes=most.shapes,
            refused=self._refused,
        )

    def _agreed(self, claims: dict[str, int]) -> dict[str, int]:
        known = {name for name in claims if self.clients.examples(name) is not None}
        agreed = agreed_counts(claims, vouched=known if self.config.max_examples is None else claims)
        for name, count in agreed.items():
            if count < claims[name]:
                self.progress.noted(
                    f"{name} claims {claims[name]:,} examples; they count as {count:,}, 10 times the median of the "
                    "others' (--max-examples lets more count)"
                )
        return agreed

    def _refuse(self, name: str, reason: str) -> None:
        self._refused[name] = reason
        self.progress.refused(name, reason)


def _listed(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:5]) + (", …" if len(first) > 5 else "")
