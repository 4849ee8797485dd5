"""Exercises about single words, lists and numbers: categories, copying, order, case, sums."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from manylora.data.suite.lexicon import (
    CATEGORIES,
    COLOURS,
    COMPARISONS,
    COUNTED,
    FEMALE,
    JOBS,
    MALE,
    MONTHS,
    SURNAMES,
    THINGS,
    TOWNS,
    article,
    plural,
    sentence,
    word_list,
)
from manylora.data.suite.opinions import BAD, GOOD, KINDS
from recipes.base.wrappers import Exercise, Scene, choices

NUMBER_WORDS = word_list("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
""")
ADJECTIVES = tuple(dict.fromkeys([*GOOD, *BAD, *(w for k in KINDS for w in (*k.good, *k.bad))]))
NOUNS = tuple(dict.fromkeys([*THINGS, *COUNTED, *JOBS, *(w for k in KINDS for w in k.nouns)]))
NAMES = FEMALE + MALE
COMMON = tuple(
    dict.fromkeys(
        word_list("""
a about above according account across act add advice after again against age ago agree all almost alone along
already also always among amount and animal another answer any anyone anything are area arm around art ask away baby
back bad be because become been before began begin behind being believe below beside best better between beyond big
bit bird body book both bring build business but buy by call can cannot care carry case catch change check child
choose city claim clear close cold come common complete contain context could country course cut data day decide
deep describe did different do does done door down draw during each early earth easy eat either else end enjoy
enough even evening ever every example explain eye face fact fall family far fast father feel few field figure fill
final find fire first five fly follow following food foot for form format found four friend from front full game
garden gave general get girl give given go goes good got great ground group grow guest had half hand happy hard has
have head hear heart help her here high him his hold home hope hour house how hundred idea if important improve in
input instruction interest into is it item its job judge just keep kind know land language large last late learn
least leave left less let letter life light like line list listen little live long look lost love low made main make
man many mean mention middle might mind mistake moment money month more morning most mother mountain move much music
must name near need never new news next night nine no none nor not note nothing now number of off office often old
on once one only open opinion option or order other our out outside over own owner page paper parent part party pass
passage past people perhaps person picture piece place plain plan plant play point poor possible present print
problem put question quick quiet quite rain reach read ready real reason record region rest review right river road
room round run said same sat saw say school sea second see seem sell send sense sentence set seven shall she ship
short should show side simple since sister six sleep small so some someone something song soon sort sound speak
stand star start state statement stay step still stop story street strong style subject such summary sun sure table
take talk task teach tell ten test than that the their them then there these they thing think this those though
three through time to today together told tomorrow too took top toward town translate tree true try turn two under
understand until up upon use usual value verdict very visit voice wait walk wall want war warm was water way we weak
week well went were what when where whether which while who whole whose why wide will wind winter wish with without
woman word work world worse worst would write wrong year yes yet you your true false unknown positive negative
reviewer guest satisfied overall sentiment enjoy dislike praise praises criticise criticises strong weak mentioned
owner holder hands present buys finds wins receives loses sells gives breaks lives works born keeps plays register
catalogue entry style line card index member members bring pick judge wins left
""")
    )
)
ANY = (NAMES, SURNAMES, TOWNS, JOBS, THINGS, COUNTED, COLOURS, MONTHS, ADJECTIVES, NOUNS, COMMON, COMMON)


def rare(rng: Random) -> str:
    """A made-up string, so that no byte is quite unseen."""
    pool = rng.choice(
        ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "aeioubdklmnrst")
    )
    word = "".join(rng.choice(pool) for _ in range(rng.randint(3, 8)))
    if rng.random() < 0.1:
        word += chr(
            rng.choice((rng.randint(0xA1, 0x17F), rng.randint(0x391, 0x3C9), rng.randint(0x4E00, 0x4E80)))
        )
    return word + (rng.choice("!?%&*+=@#$~^") if rng.random() < 0.2 else "")


def some(rng: Random, low: int, high: int) -> list[str]:
    """Different words: of one list, of all lists, or made-up ones."""
    count, kind = rng.randint(low, high), rng.random()
    if kind < 0.12:
        return list(dict.fromkeys(rare(rng) for _ in range(count)))
    if kind < 0.5:
        return rng.sample(rng.choice(ANY), count)
    return list(dict.fromkeys(rng.choice(rng.choice(ANY)) for _ in range(count)))


def lists(rng: Random) -> Scene:
    """Copying, picking by place, membership, following: what attention heads need first."""
    words = some(rng, 2, 6)
    text = rng.choice((", ", " ", "; ", " - ")).join(words)
    place = rng.randrange(len(words))
    inside, stranger = rng.choice(words), rng.choice(NOUNS)
    asks = [
        (rng.choice(("say again", "copy", "repeat the words")), text),
        (rng.choice(("backwards", "last word first")), " ".join(words[::-1])),
        (rng.choice(("first one", "which comes first?")), words[0]),
        (rng.choice(("last one", "which comes last?")), words[-1]),
        (f"number {place + 1}", words[place]),
        ("how many words?", str(len(words))),
        (f"is {inside} in the list?", "yes"),
    ]
    asks += [(f"what follows {one}?", two) for one, two in pairwise(words)]
    if stranger not in words:
        asks.append((f"is {stranger} in the list?", "no"))
    return Scene(text, asks)


def pick(rng: Random) -> Exercise:
    """Pick from a list of choices what a short text is about: the choice that is repeated."""
    group = rng.choice((NAMES, THINGS, TOWNS, JOBS, NOUNS))
    a, b, c = rng.sample(group, 3)
    colour = rng.sample(COLOURS, 2)
    if group is NAMES:
        text, ask, answer = f"{a} wears {colour[0]}, {b} wears {colour[1]}.", f"who is in {colour[0]}?", a
    elif group is TOWNS:
        who = rng.sample(NAMES, 2)
        text, ask, answer = f"{who[0]} went to {a}, {who[1]} to {b}.", f"where is {who[0]}?", a
    else:
        text, ask, answer = (
            f"The {a} is here. The {b} is far away.",
            rng.choice(("which is near?", "what is at hand?")),
            a,
        )
    return Exercise(f"{ask} {choices(rng, [a, b, c])}", text, answer)


def category(rng: Random) -> Exercise:
    name = rng.choice(list(CATEGORIES))
    members = rng.sample(CATEGORIES[name], 3)
    kind = rng.randrange(4)
    if kind == 0:
        return Exercise("kind of thing", members[0], name)
    if kind == 1:
        return Exercise("what are these?", ", ".join(members), plural(name))
    other = rng.choice([k for k in CATEGORIES if k != name])
    stranger = rng.choice(CATEGORIES[other])
    if kind == 2:
        return Exercise("which does not belong?", ", ".join(rng.sample([*members, stranger], 4)), stranger)
    shown = choices(rng, [stranger, members[0], rng.choice(COLOURS)])
    return Exercise(f"find the {name}", shown, members[0])


def spelling(rng: Random) -> Exercise:
    word = rng.choice(rng.choice(ANY))
    kind = rng.randrange(5)
    if kind == 0:
        noun = rng.choice(THINGS + JOBS + CATEGORIES["animal"])
        return Exercise("with its article", noun, f"{article(noun)} {noun}")
    if kind == 1:
        noun = rng.choice(COUNTED + THINGS)
        return Exercise("plural", noun, plural(noun))
    if kind == 2:
        return Exercise("in capitals", word, word.upper())
    if kind == 3:
        name = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"
        return Exercise("proper case", name.lower(), name)
    return Exercise("spell it", word, "-".join(word))


def numbers(rng: Random) -> Exercise:
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    kind = rng.randrange(6)
    if kind == 0:
        return Exercise("bigger number", f"{a} {b}", str(max(a, b)))
    if kind == 1:
        return Exercise("smaller number", f"{a}, {b}", str(min(a, b)))
    if kind == 2:
        return Exercise("next number", str(a), str(a + 1))
    if kind == 3:
        number = rng.randrange(21)
        return Exercise("in words", str(number), NUMBER_WORDS[number])
    if kind == 4:
        number = rng.randrange(21)
        return Exercise("in figures", NUMBER_WORDS[number], str(number))
    three = [str(n) for n in sorted(rng.sample(range(1, 41), 3))]
    return Exercise("smallest to biggest", " ".join(rng.sample(three, 3)), " ".join(three))


def sums(rng: Random) -> Exercise:
    """Bare sums in several notations."""
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        forms = (
            f"{a} + {b}",
            f"{a} plus {b}",
            f"{b} more than {a}",
            f"the sum of {a} and {b}",
            f"add {b} to {a}",
        )
        return Exercise(rng.choice(("work out", "total", "calculate")), rng.choice(forms), str(a + b))
    a, b = max(a, b), min(a, b)
    forms = (f"{a} - {b}", f"{a} minus {b}", f"{b} less than {a}", f"take {b} from {a}", f"{b} off {a}")
    return Exercise(rng.choice(("work out", "rest", "calculate")), rng.choice(forms), str(a - b))


def small_sums(rng: Random) -> Exercise:
    """Sums up to 24 in figures alone: few enough to be known by heart."""
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    if rng.random() < 0.5:
        return Exercise(
            "", rng.choice((f"{a} + {b} =", f"{a} plus {b} is", f"{a} and {b} more:")), str(a + b)
        )
    a, b = max(a, b), min(a, b)
    return Exercise("", rng.choice((f"{a} - {b} =", f"{a} minus {b} is", f"{a} and {b} less:")), str(a - b))


def opposites(rng: Random) -> Exercise:
    up, down, plain = rng.choice(COMPARISONS)
    kind = rng.randrange(3)
    if kind == 0:
        return Exercise("opposite", up, down)
    if kind == 1:
        return Exercise("opposite", down, up)
    return Exercise("comparative", plain, up)


def title(rng: Random) -> Exercise:
    words = " ".join(some(rng, 2, 3)).lower()
    return Exercise("as a sentence", words, sentence(words) + ".")
