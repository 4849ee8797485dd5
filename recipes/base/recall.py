"""Dense recall: pairs told once, then asked for in another order, many answers to a short text.

Looking a word up where it stood before is what every exercise about a text needs, and what a small model takes longest
to find from sparse examples. Here nearly every line has a marked answer, so it is found early.
"""

from __future__ import annotations

from random import Random

from manylora.data.suite.lexicon import COLOURS, JOBS, THINGS, TOWNS, sentence
from manylora.data.suite.opinions import KINDS, Remark, draw_remark
from recipes.base.scenes import conceding, joined
from recipes.base.words import ADJECTIVES, NAMES, NOUNS
from recipes.base.wrappers import mark

PAIRS = ("{k} {v}", "{k}: {v}", "{k} = {v}", "the {k} was {v}", "{k} is {v}", "{k} has {v}", "{k} - {v}")
GAPS = ("\n", "; ", ", ", ". ")


def keys(rng: Random, count: int) -> list[tuple[str, str]]:
    """Different keys, each with a value of its own."""
    left = rng.sample(rng.choice((NAMES, NOUNS, THINGS, JOBS, TOWNS)), count)
    right = rng.sample(rng.choice((ADJECTIVES, COLOURS, THINGS, NAMES, NOUNS)), 2 * count)
    return list(zip(left, [word for word in right if word not in left], strict=False))


def recall(rng: Random, low: int = 2, high: int = 6) -> str:
    """Pairs, then all of them again in another order, asked in one direction or both."""
    pairs = keys(rng, rng.randint(low, high))
    form, gap = rng.choice(PAIRS), rng.choice(GAPS)
    told = gap.join(form.format(k=k, v=v) for k, v in pairs)
    lines = []
    same, back = rng.random() < 0.5, rng.random() < 0.3
    ask = form if same else rng.choice(PAIRS[:3])
    for _ in range(2):
        for k, v in rng.sample(pairs, len(pairs)):
            if back and not same:
                k, v = v, k
            lines.append(ask.format(k=k, v=mark(v)))
    return told + "\n\n" + gap.join(lines)


def bindings(rng: Random) -> str:
    """A text of two to four remarks, then a dozen answers about which word goes with which."""
    remarks = _remarks(rng, rng.choice((2, 2, 3, 4)))
    sign = rng.choice((" ", ": ", " = ", " -> ", "? "))
    gap = rng.choice(("\n", "\n", "; "))
    good = [r.noun for r in remarks if r.good]
    bad = [r.noun for r in remarks if not r.good]
    nice, nasty = rng.choice((("nice", "nasty"), ("+", "-"), ("pro", "con"), ("up", "down")))
    blocks = [
        [f"{r.noun}{sign}{mark(r.adjective)}" for r in rng.sample(remarks, len(remarks))],
        [f"{r.adjective}{sign}{mark(r.noun)}" for r in rng.sample(remarks, len(remarks))],
        [f"{r.noun}{sign}{mark(nice if r.good else nasty)}" for r in rng.sample(remarks, len(remarks))],
        rng.sample(
            [
                f"{nice}{sign}{mark(', '.join(good) or 'none')}",
                f"{nasty}{sign}{mark(', '.join(bad) or 'none')}",
            ],
            2,
        ),
    ]
    lines = [line for block in rng.sample(blocks, len(blocks)) for line in block]
    return _told(rng, remarks) + "\n\n" + gap.join(lines)


def _remarks(rng: Random, count: int) -> list[Remark]:
    """Remarks about different things in different words, both polarities in most texts."""
    kind, drawn = rng.choice(KINDS), []
    for index in range(count):
        while True:
            good = index == 0 if index < 2 and rng.random() < 0.9 else rng.random() < 0.5
            remark = draw_remark(rng, good=good, kind=kind if rng.random() < 0.6 else None)
            if all(remark.noun != r.noun and remark.adjective != r.adjective for r in drawn):
                break
        drawn.append(remark)
    rng.shuffle(drawn)
    return drawn


def _told(rng: Random, remarks: list[Remark]) -> str:
    left, parts = list(remarks), []
    while left:
        if len(left) > 1 and rng.random() < 0.75:
            one, two = left.pop(), left.pop()
            parts.append(conceding(rng, one, two) if rng.random() < 0.7 else joined(rng, one, two))
        else:
            remark = left.pop()
            parts.append(
                sentence(remark.clause()) + "." if rng.random() < 0.6 else f"{sentence(remark.phrase())}."
            )
    return " ".join(parts)
