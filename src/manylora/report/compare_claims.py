"""The claims of a study: their verdicts in words, as intervals, and with all their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manylora.report.common import point_of, signed
from manylora.report.files import number, text, whole
from manylora.report.page import Figure, Section
from manylora.report.plots import Intervals, Series
from manylora.table import Cell, Column, Table


def claims_section(claims: list[dict[str, Any]]) -> Section | None:
    """Sentences, figure and table; `None` without a claim."""
    if not claims:
        return None
    sentences = tuple(
        (text(claim.get("verdict")).capitalize(), text(claim.get("text"), limit=600)) for claim in claims
    )
    drawn = [claim for claim in claims if number(claim.get("difference")) is not None]
    figures: tuple[Figure, ...] = ()
    if drawn:
        figures = (
            Figure(
                name="claims",
                title="The difference behind each claim",
                caption="Mean difference over paired seeds and its 95 % interval; the line is no difference.",
                alt="; ".join(
                    f"{_short_claim(claim)}: {signed(number(claim['difference']) or 0.0, 2)}"
                    for claim in drawn[:12]
                )
                + ".",
                plot=Intervals(
                    rows=tuple(f"{claims.index(claim) + 1}. {_short_claim(claim)}" for claim in drawn),
                    series=(
                        Series(name="difference", points=tuple(point_of(c, "difference") for c in drawn)),
                    ),
                    xlabel="difference in points",
                    zero=True,
                    sentences=True,
                ),
            ),
        )
    return Section(
        title="Claims", points=sentences, figures=figures, tables=(_claims_table(claims),), folded=True
    )


def _short_claim(claim: Mapping[str, Any]) -> str:
    """What is claimed, without the numbers that its sentence may have."""
    return text(claim.get("claim") or claim.get("text"))


def _claims_table(claims: list[dict[str, Any]]) -> Table:
    names = (
        "claim",
        "verdict",
        "difference",
        "low",
        "high",
        "p",
        "p (Holm)",
        "bootstrap low",
        "bootstrap high",
        "detectable",
        "n",
    )
    found: list[tuple[Cell, ...]] = []
    for claim in claims:
        span = claim.get("bootstrap")
        bootstrap = (
            [number(value) for value in span] if isinstance(span, list) and len(span) == 2 else [None, None]
        )
        values = [number(claim.get(key)) for key in ("difference", "low", "high", "p", "p_holm")]
        found.append(
            (
                _short_claim(claim),
                text(claim.get("verdict")),
                *values,
                *bootstrap,
                number(claim.get("detectable")),
                whole(claim.get("n")),
            )
        )
    return Table(
        name="claims",
        caption="Differences in points with 95 % intervals; p of the paired t test, and after Holm’s correction",
        columns=tuple(Column(name=name, digits=4 if name.startswith("p") else 2) for name in names),
        rows=tuple(found),
    )  # fmt: skip
