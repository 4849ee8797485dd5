"""The pretraining corpus: short documents without end, drawn by seed.

About nine documents in ten are a few exercises in one of many surface forms; the rest is plain prose. Nothing is
labelled with a task, no document has the Alpaca headers or an OPTIONS list, and none uses a prompt template of the
suite (a test compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Literal

from recipes.base import recall, scenes, words
from recipes.base.wrappers import CLOSE, OPEN, Exercise, Scene, draw_wrapper, wrap, wrap_scene

EXERCISES: dict[Callable[[Random], Exercise | Scene], float] = {
    words.lists: 2.5,
    words.pick: 2.0,
    words.category: 0.8,
    words.spelling: 0.8,
    words.numbers: 0.8,
    words.sums: 2.0,
    words.opposites: 0.4,
    words.title: 0.3,
    scenes.polarity: 1.5,
    scenes.review: 5.0,
    scenes.point: 1.5,
    scenes.rewrite: 0.5,
    scenes.transfers: 4.0,
    scenes.counting: 3.5,
    scenes.relations: 4.0,
    scenes.records: 3.5,
}
PROSE: dict[Callable[[Random], str], float] = {
    scenes.day_prose: 1.0,
    scenes.review_prose: 1.0,
    scenes.profile_prose: 1.0,
    scenes.tongue: 0.4,
}


EASY: dict[Callable[[Random], Exercise | Scene], float] = {
    words.lists: 3.0,
    words.pick: 2.0,
    scenes.polarity: 1.0,
    words.sums: 1.0,
    scenes.point: 1.0,
    scenes.relations: 1.0,
}
"""The diet of the first steps, until attention has learnt to copy."""

LATE: dict[Callable[[Random], Exercise | Scene], float] = {
    words.lists: 0.7,
    words.pick: 0.7,
    words.category: 0.2,
    words.spelling: 0.2,
    words.numbers: 0.2,
    words.opposites: 0.2,
    words.title: 0.1,
    scenes.polarity: 2.0,
    scenes.review: 7.0,
    scenes.point: 2.0,
    scenes.rewrite: 0.2,
    scenes.transfers: 3.5,
    scenes.small_counting: 4.0,
    scenes.relations: 4.0,
    scenes.records: 2.0,
}
"""The diet of the second half: more of what the first half left weak."""

Phase = Literal["easy", "main", "late", "recall"]


def draw_document(rng: Random, phase: Phase = "main") -> str:
    """One document, with the marks that say which characters count fully in the loss."""
    if phase == "easy":
        kind = rng.choices(list(EASY), list(EASY.values()))[0]
        first = kind(rng)
        if isinstance(first, Scene):
            return wrap_scene(rng, first, 3)
        return wrap(draw_wrapper(rng), first)
    if phase == "recall" and (kind := rng.random()) < 0.75:
        return recall.bindings(rng) if kind < 0.4 else recall.recall(rng) if kind < 0.6 else scenes.drill(rng)
    mixture = LATE if phase in ("late", "recall") else EXERCISES
    if phase == "late" and rng.random() < 0.25:
        return scenes.drill(rng)
    if rng.random() < 0.1:
        return rng.choices(list(PROSE), list(PROSE.values()))[0](rng)
    wrapper = draw_wrapper(rng)
    gap = rng.choice(("\n", "\n\n"))
    kind = rng.choices(list(mixture), list(mixture.values()))[0]
    first = kind(rng)
    if isinstance(first, Scene) and rng.random() < 0.75:
        return wrap_scene(rng, first, rng.randint(2, 6))
    drawn = [first]
    for _ in range(rng.choice((0, 1, 2, 3))):
        other = kind if rng.random() < 0.4 else rng.choices(list(mixture), list(mixture.values()))[0]
        drawn.append(other(rng))
    return gap.join(wrap(wrapper, _single(rng, item)) for item in drawn)


def _single(rng: Random, item: Exercise | Scene) -> Exercise:
    if isinstance(item, Exercise):
        return item
    instruction, answer = rng.choice(item.asks)
    return Exercise(instruction, item.text, answer)


def documents(seed: int | str, phase: Phase = "main") -> Iterator[str]:
    """An endless stream of marked documents."""
    rng = Random(f"manylora-corpus/{seed}")
    while True:
        yield draw_document(rng, phase)


def plain(document: str) -> str:
    """The document without its marks."""
    return document.replace(OPEN, "").replace(CLOSE, "")


def spans(document: str) -> tuple[str, list[tuple[int, int]]]:
    """The plain text and the (start, end) character spans that were marked."""
    text, marked, position = [], [], 0
    for index, piece in enumerate(document.replace(CLOSE, OPEN).split(OPEN)):
        text.append(piece)
        if index % 2:
            marked.append((position, position + len(piece)))
        position += len(piece)
    return "".join(text), marked
