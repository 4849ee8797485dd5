"""Three tasks about people: who holds a thing, how many there are, whether a claim follows."""

from __future__ import annotations

from random import Random

from manylora.data.suite.lexicon import COMPARISONS, COUNTED, FEMALE, MALE, THINGS, plural
from manylora.data.suite.rows import Row, SuiteTask, fill, options, shuffled

HOLDER_TEMPLATES = (
    "Read the story and say who has the {thing} now.",
    "Where did the {thing} end up? Answer with a name.",
    "{text}\nIn whose hands is the {thing} at the end?",
    "Find the present holder of the {thing}.",
)
SUM_TEMPLATES = (
    "Solve the problem and answer with a number.\n{text} {question}",
    "{text} {question}",
    "Work out the answer to this little problem: {text} {question}",
)
CLAIM_TEMPLATES = (
    "Given the text, is this claim true? {claim}\n{options}",
    "Text: {text}\nClaim: {claim}\nDoes the claim follow from the text?\n{options}",
    "Judge the claim by the passage alone.\nClaim: {claim}\n{options}",
    "According to the passage, what can be said of the claim \"{claim}\"?\n{options}",
)  # fmt: skip
CLAIM_LABELS = ("true", "false", "unknown")

TRANSFERS = (
    "{giver} gave the {thing} to {taker}.",
    "{giver} sold the {thing} to {taker}.",
    "{giver} handed {taker} the {thing}.",
    "{giver} lent {taker} the {thing}.",
    "{taker} got the {thing} from {giver}.",
    "{taker} bought the {thing} from {giver}.",
    "{taker} borrowed the {thing} from {giver}.",
)


def draw_people(rng: Random, count: int) -> list[str]:
    """Different first names, of women and men alike."""
    return rng.sample(FEMALE + MALE, count)


def draw_holder(rng: Random, index: int) -> Row:
    """Two things change hands, in half of the rows one of them twice; the last taker of the asked one."""
    first, second, third, fourth, fifth = draw_people(rng, 5)
    asked, other = rng.sample(THINGS, 2)
    moves = [(asked, first, second), (other, third, fourth)]
    rng.shuffle(moves)
    if rng.random() < 0.5:
        thing, _, holder = rng.choice(moves)
        moves.append((thing, holder, fifth))
    told = [
        rng.choice(TRANSFERS).format(thing=thing, giver=giver, taker=taker) for thing, giver, taker in moves
    ]
    answer = [taker for thing, _, taker in moves if thing == asked][-1]
    instruction, given = fill(rng.choice(HOLDER_TEMPLATES), text=" ".join(told), thing=asked)
    return Row(instruction=instruction, input=given, output=answer, key=("holder", *moves))


def _problem(rng: Random) -> tuple[str, str, int]:
    """(story, question, answer) of one small sum; no number over 40."""
    who, other = draw_people(rng, 2)
    noun = rng.choice(COUNTED)
    many = plural(noun)
    a, b = rng.randint(5, 20), rng.randint(5, 20)
    change = rng.randint(2, min(a, 12) - 1)
    shape = rng.randrange(5)
    if shape == 0:
        verb = rng.choice(("buys", "finds", "wins", "receives"))
        return (
            f"{who} has {a} {many} and {verb} {change} more.",
            f"How many {many} does {who} have now?",
            a + change,
        )
    if shape == 1:
        verb = rng.choice(("loses", "sells", "gives away", "breaks"))
        return f"{who} has {a} {many} and {verb} {change} of them.", f"How many {many} are left?", a - change
    if shape == 2:
        return f"{who} has {a} {many} and {other} has {b}.", f"How many {many} do they have together?", a + b
    story = f"{who} has {a} {many} and {other} has {b}. {who} gives {other} {change}."
    if shape == 3:
        return story, f"How many {many} does {other} have now?", b + change
    return story, f"How many {many} does {who} have now?", a - change


def draw_sum(rng: Random, index: int) -> Row:
    """One addition or subtraction told as a story; the answer is the number alone."""
    story, question, answer = _problem(rng)
    instruction = rng.choice(SUM_TEMPLATES).format(text=story, question=question)
    return Row(instruction=instruction, output=str(answer), key=("sum", story, question))


def _claim(rng: Random, label: str) -> tuple[str, str]:
    """(passage, claim) with the wanted label.

    The passage compares two pairs of people in two respects. A decidable claim is about one of the pairs in its own
    respect, in the same word or in the opposite one; an undecidable one swaps the respects or mixes the pairs.
    """
    names = draw_people(rng, 4)
    pairs = [(names[0], names[1]), (names[2], names[3])]
    respects = rng.sample(COMPARISONS, 2)
    words = [rng.choice(respect[:2]) for respect in respects]
    told = [f"{low} is {word} than {high}." for word, (low, high) in zip(words, pairs, strict=True)]
    which = rng.randrange(2)
    (more, less), word = pairs[which], words[which]
    if label == "unknown":
        if rng.random() < 0.5:
            word = rng.choice(respects[1 - which][:2])
        else:
            less = rng.choice(pairs[1 - which])
        if rng.random() < 0.5:
            more, less = less, more
        return " ".join(told), f"{more} is {word} than {less}."
    up, down, _ = respects[which]
    if rng.random() < 0.5:
        word, more, less = (down if word == up else up), less, more
    if label == "false":
        more, less = less, more
    return " ".join(told), f"{more} is {word} than {less}."


def draw_claim(rng: Random, index: int) -> Row:
    """True, false, or not to be told from the passage."""
    label = CLAIM_LABELS[index % 3]
    text, claim = _claim(rng, label)
    listed = options(shuffled(rng, CLAIM_LABELS))
    instruction, given = fill(rng.choice(CLAIM_TEMPLATES), text=text, claim=claim, options=listed)
    return Row(instruction=instruction, input=given, output=label, key=("claim", text))


TASKS = (
    SuiteTask(
        name="claim_check",
        kind="classification",
        summary="Whether a comparison follows from a passage: true, false or cannot tell",
        skills=("opposite comparatives", "who stands on which side of a relation"),
        draw=draw_claim,
        shares_with=("current_holder",),
        templates=CLAIM_TEMPLATES,
    ),
    SuiteTask(
        name="current_holder",
        kind="extraction",
        summary="Who holds a thing after two or three transfers told from either side",
        skills=("direction of verbs of giving", "binding a thing to its sentence"),
        draw=draw_holder,
        shares_with=("story_sum", "claim_check"),
        templates=HOLDER_TEMPLATES,
    ),
    SuiteTask(
        name="story_sum",
        kind="arithmetic",
        summary="One addition or subtraction up to 40, told as a story",
        skills=("sums to 40", "direction of verbs of giving"),
        draw=draw_sum,
        shares_with=("current_holder",),
        templates=SUM_TEMPLATES,
    ),
)
