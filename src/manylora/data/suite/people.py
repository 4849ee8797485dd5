"""Three tasks about people: who had a thing, who has it, and how many there are."""

from __future__ import annotations

from random import Random

from manylora.data.suite.lexicon import COUNTED, FEMALE, MALE, THINGS, plural
from manylora.data.suite.rows import SuiteRow, SuiteTask, fill, options, shuffled

HOLDER_TEMPLATES = (
    "Read the story and say who has the {thing} now.",
    "Where did the {thing} end up? Answer with a name.",
    "{text}\nIn whose hands is the {thing} at the end?",
    "Find the present holder of the {thing}.",
)
FORMER_TEMPLATES = (
    "Read the story and say who had the {thing} before.\n{options}",
    "Where did the {thing} come from?\n{options}",
    "{text}\nWho gave the {thing} away?\n{options}",
    "Find the former owner of the {thing}.\n{options}",
)
SUM_TEMPLATES = (
    "Solve the problem and answer with a number.\n{text} {question}",
    "{text} {question}",
    "Work out the answer to this little problem: {text} {question}",
)
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


def draw_holder(rng: Random, index: int) -> SuiteRow:
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
    return SuiteRow(instruction=instruction, input=given, output=answer, key=("holder", *moves))


def draw_former(rng: Random, index: int) -> SuiteRow:
    """One thing changes hands, in half of the rows a second one too; the giver of the asked one, of three people."""
    giver, taker, third, fourth = draw_people(rng, 4)
    asked, other = rng.sample(THINGS, 2)
    moves = [(asked, giver, taker)]
    if rng.random() < 0.5:
        moves.append((other, third, fourth))
        rng.shuffle(moves)
    told = [rng.choice(TRANSFERS).format(thing=t, giver=g, taker=k) for t, g, k in moves]
    listed = options(shuffled(rng, (giver, taker, rng.choice((third, fourth)))))
    text = " ".join(told)
    instruction, given = fill(rng.choice(FORMER_TEMPLATES), text=text, thing=asked, options=listed)
    return SuiteRow(instruction=instruction, input=given, output=giver, key=("holder", *moves))


def _problem(rng: Random) -> tuple[str, str, int]:
    """(story, question, answer) of one small sum; no number over 24."""
    who, other = draw_people(rng, 2)
    noun = rng.choice(COUNTED)
    many = plural(noun)
    a, b = rng.randint(4, 12), rng.randint(4, 12)
    change = rng.randint(2, a - 1)
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


def draw_sum(rng: Random, index: int) -> SuiteRow:
    """One addition or subtraction told as a story; the answer is the number alone."""
    story, question, answer = _problem(rng)
    instruction = rng.choice(SUM_TEMPLATES).format(text=story, question=question)
    return SuiteRow(instruction=instruction, output=str(answer), key=("sum", story, question))


TASKS = (
    SuiteTask(
        name="former_owner",
        kind="classification",
        summary="Which of three listed people gave a thing away: the opposite side of the same kind of story",
        skills=("direction of verbs of giving", "binding a thing to its sentence"),
        draw=draw_former,
        shares_with=("current_holder", "story_sum"),
        conflicts_with=("current_holder",),
        templates=FORMER_TEMPLATES,
    ),
    SuiteTask(
        name="current_holder",
        kind="extraction",
        summary="Who holds a thing after two or three transfers told from either side",
        skills=("direction of verbs of giving", "binding a thing to its sentence"),
        draw=draw_holder,
        shares_with=("former_owner", "story_sum"),
        conflicts_with=("former_owner",),
        templates=HOLDER_TEMPLATES,
    ),
    SuiteTask(
        name="story_sum",
        kind="arithmetic",
        summary="One addition or subtraction up to 24, told as a story",
        skills=("sums to 24", "direction of verbs of giving"),
        draw=draw_sum,
        shares_with=("current_holder", "former_owner"),
        templates=SUM_TEMPLATES,
    ),
)
