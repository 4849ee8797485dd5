"""Three tasks over the same kind of review: the verdict, what was praised, what was blamed.

Every review praises one thing and blames another, and one of the two remarks is conceded ("although", "despite").
So both polarities stand in every review, in either order: which words occur says nothing; how they are joined does.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from manylora.data.suite.lexicon import MONTHS, TOWNS, sentence
from manylora.data.suite.opinions import KINDS, Aspects, Remark, draw_pair, draw_remark
from manylora.data.suite.rows import SuiteRow, SuiteTask, fill, options, shuffled

VERDICT_TEMPLATES = (
    "Is the verdict of this review positive or negative?\n{options}",
    "Decide whether the guest was satisfied on the whole.\n{options}",
    "What is the overall sentiment of the following review?\n{options}",
    "Review: {text}\nHow does the reviewer feel in the end?\n{options}",
)
PRAISE_TEMPLATES = (
    "Which of these did the guest enjoy?\n{options}",
    "Pick the thing that the reviewer praises.\n{options}",
    "Review: {text}\nWhat should the owner keep as it is?\n{options}",
    "Name the strong point mentioned in the following review.\n{options}",
)
BLAME_TEMPLATES = (
    "Which of these did the guest dislike?\n{options}",
    "Pick the thing that the reviewer criticises.\n{options}",
    "Review: {text}\nWhat should the owner improve first?\n{options}",
    "Name the weak point mentioned in the following review.\n{options}",
)


def review(rng: Random, main: Remark, conceded: Remark) -> str:
    """One sentence that asserts `main` against `conceded`, in one of six orders; a third have a lead-in."""
    words = ("although", "even though", "despite", "in spite of")
    word = rng.choice(words[:2] if conceded.adjective.startswith("far from") else words)
    aside = conceded.clause() if word.endswith("though") else conceded.phrase()
    first = rng.random() < 0.5
    text = f"{word} {aside}, {main.clause()}." if first else f"{main.clause()}, {word} {aside}."
    lead = rng.random()
    if lead < 0.15:
        return f"We were in {rng.choice(TOWNS)} in {rng.choice(MONTHS)}. {sentence(text)}"
    if lead < 0.3:
        return f"We came back from {rng.choice(TOWNS)}. {sentence(text)}"
    return sentence(text)


def _key(good: Remark, bad: Remark) -> tuple[str, ...]:
    return ("review", good.noun, good.adjective, bad.noun, bad.adjective)


def deny(rng: Random, remark: Remark) -> Remark:
    """The same judgement in the opposite word: "far from dull" for "gripping"."""
    other = draw_remark(rng, good=not remark.good, kind=kind_of(remark))
    return replace(remark, adjective=f"far from {other.adjective}")


def draw_verdict(rng: Random, index: int) -> SuiteRow:
    """Positive if the main clause praises, negative if it blames."""
    good, bad = draw_pair(rng)
    positive = index % 2 == 0
    pair = [deny(rng, remark) if rng.random() < 0.1 else remark for remark in (good, bad)]
    main, conceded = pair if positive else reversed(pair)
    text = review(rng, main, conceded)
    listed = options(shuffled(rng, ("positive", "negative")))
    instruction, given = fill(rng.choice(VERDICT_TEMPLATES), text=text, options=listed)
    return SuiteRow(
        instruction=instruction,
        input=given,
        output="positive" if positive else "negative",
        key=_key(good, bad),
    )


def kind_of(remark: Remark) -> Aspects:
    """The kind of thing a remark is about."""
    return next(kind for kind in KINDS if remark.noun in kind.nouns)


def _draw_target(rng: Random, templates: tuple[str, ...], *, praised: bool) -> SuiteRow:
    good, bad = draw_pair(rng)
    pair = [good, bad]
    rng.shuffle(pair)
    text = review(rng, *pair)
    other = rng.choice([noun for kind in KINDS for noun in kind.nouns if noun not in (good.noun, bad.noun)])
    listed = options(shuffled(rng, (good.noun, bad.noun, other)))
    instruction, given = fill(rng.choice(templates), text=text, options=listed)
    answer = good.noun if praised else bad.noun
    return SuiteRow(instruction=instruction, input=given, output=answer, key=_key(good, bad))


def draw_praise(rng: Random, index: int) -> SuiteRow:
    """The noun of the praising remark, whether asserted or conceded."""
    return _draw_target(rng, PRAISE_TEMPLATES, praised=True)


def draw_blame(rng: Random, index: int) -> SuiteRow:
    """The noun of the blaming remark, whether asserted or conceded."""
    return _draw_target(rng, BLAME_TEMPLATES, praised=False)


TASKS = (
    SuiteTask(
        name="review_verdict",
        kind="classification",
        summary="Overall sentiment of a review that praises and blames, at times by denial; the main clause decides",
        skills=("polarity of adjectives", "concession", "denial"),
        draw=draw_verdict,
        shares_with=("praised_thing", "blamed_thing"),
        conflicts_with=("praised_thing", "blamed_thing"),
        templates=VERDICT_TEMPLATES,
    ),
    SuiteTask(
        name="praised_thing",
        kind="classification",
        summary="Which of three listed things the review praises",
        skills=("polarity of adjectives", "binding a word to its noun"),
        draw=draw_praise,
        shares_with=("review_verdict", "blamed_thing"),
        conflicts_with=("blamed_thing",),
        templates=PRAISE_TEMPLATES,
    ),
    SuiteTask(
        name="blamed_thing",
        kind="classification",
        summary="Which of three listed things the review blames: the opposite answer to the same input",
        skills=("polarity of adjectives", "binding a word to its noun"),
        draw=draw_blame,
        shares_with=("review_verdict", "praised_thing"),
        conflicts_with=("praised_thing",),
        templates=BLAME_TEMPLATES,
    ),
)
