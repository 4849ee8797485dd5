"""The surface forms of the pretraining instructions, none of them the Alpaca form or an OPTIONS list.

An exercise is (instruction, text, answer). A wrapper joins the three; the marks `OPEN` and `CLOSE` surround what
counts fully in the loss (answers and plain prose), and are removed before tokenisation.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

OPEN, CLOSE = "\x02", "\x03"


class Exercise(NamedTuple):
    instruction: str
    text: str
    answer: str


class Scene(NamedTuple):
    """One text and several questions about it: more answers for the same reading."""

    text: str
    asks: list[tuple[str, str]]


def mark(text: str) -> str:
    return f"{OPEN}{text}{CLOSE}"


ASK = ("Q", "Task", "Do", "Teacher", "Order", "Exercise", "To do", "Ask")
GIVEN = ("Text", "Given", "Data", "Note", "Words", "Source", "Here")
REPLY = ("A", "Answer", "Result", "Pupil", "Done", "Reply", "Out", "Solution")


def draw_wrapper(rng: Random) -> str:
    """A format string with {i}, {x} and {y}, to be used for all exercises of a document."""
    ask, given, reply = rng.choice(ASK), rng.choice(GIVEN), rng.choice(REPLY)
    return rng.choice(
        (
            "{i}: {x} -> {y}",
            "{x} | {i} | {y}",
            "{i}\n{x}\n{y}",
            "{x}\n{i}\n{y}",
            "({i}) {x} => {y}",
            f"{ask}: {{i}}\n{given}: {{x}}\n{reply}: {{y}}",
            f"{given}: {{x}}\n{ask}: {{i}}\n{reply}: {{y}}",
            f"{ask}: {{i}} {{x}}\n{reply}: {{y}}",
            f"{ask}: {{x}} {{i}}\n{reply}: {{y}}",
            f"# {ask}\n{{i}}\n# {given}\n{{x}}\n# {reply}\n{{y}}",
            f"# {ask}\n{{x}}\n{{i}}\n# {reply}\n{{y}}",
            f"== {ask}: {{i}}\n\n{{x}}\n\n== {reply}:\n{{y}}",
            f"[{ask.lower()}] {{i}}\n[{given.lower()}] {{x}}\n[{reply.lower()}] {{y}}",
        )
    )


def wrap(wrapper: str, exercise: Exercise) -> str:
    answer = mark(exercise.answer)
    if not exercise.text:
        return wrapper.format(i=exercise.instruction, x="", y=answer).replace(": \n", ":\n")
    return wrapper.format(i=exercise.instruction, x=exercise.text, y=answer)


def wrap_scene(rng: Random, scene: Scene, count: int) -> str:
    """The text once, then `count` questions and answers; half of the time everything under the text's own line."""
    asks = rng.sample(scene.asks, min(count, len(scene.asks)))
    ask, given, reply = rng.choice(ASK), rng.choice(GIVEN), rng.choice(REPLY)
    head, line = rng.choice(
        (
            ("{x}", "{i} -> {y}"),
            ("{x}", "{i} -> {y}"),
            ("{x}", "{i} => {y}"),
            ("{x}", "{i} | {y}"),
            ("{x}\n", "{i}: {y}"),
            ("{x}", "({i}) {y}"),
            (f"{given}: {{x}}", f"{ask}: {{i}}\n{reply}: {{y}}"),
            (f"{given}: {{x}}\n", "- {i}\n{y}"),
            (f"# {given}\n{{x}}", f"# {ask}\n{{i}}\n# {reply}\n{{y}}"),
            (f"== {given}:\n{{x}}\n", f"== {ask}: {{i}}\n\n== {reply}:\n{{y}}\n"),
            (f"[{given.lower()}] {{x}}", f"[{ask.lower()}] {{i}} [{reply.lower()}] {{y}}"),
            (f"{given}: {{x}}", "{i} {y}"),
        )
    )
    lines = [line.format(i=instruction, y=mark(answer)) for instruction, answer in asks]
    return "\n".join([head.format(x=scene.text), *lines])


def choices(rng: Random, items: list[str]) -> str:
    """A list of choices, in any form but FLAN's."""
    items = rng.sample(items, len(items))
    return rng.choice(
        (
            " / ".join(items),
            ", ".join(items[:-1]) + " or " + items[-1],
            "; ".join(items),
            "* " + "\n* ".join(items),
            " ".join(f"({letter}) {item}" for letter, item in zip("abcdefgh", items, strict=False)),
            "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)),
            "Choices:\n+ " + "\n+ ".join(items),
        )
    )
