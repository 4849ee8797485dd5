"""Exercises and prose about reviews, transfers, comparisons and records.

They teach what the suite's tasks are made of, each as another task: sorting both remarks into pro and con instead of
naming one, telling who passed a thing to whom instead of who has it, restating a comparison instead of judging one.
"""

from __future__ import annotations

from random import Random

from manylora.data.suite.lexicon import (
    CATEGORIES,
    COMPARISONS,
    COUNTED,
    JOBS,
    MONTHS,
    SURNAMES,
    THINGS,
    TOWNS,
    article,
    plural,
    sentence,
)
from manylora.data.suite.opinions import BAD, GOOD, KINDS, Remark, draw_pair, draw_remark
from recipes.base.words import ADJECTIVES, NAMES, small_sums
from recipes.base.wrappers import Exercise, Scene, choices, mark


def drill(rng: Random) -> str:
    """What has to be known by heart, several to a document: small sums, polarities, opposite comparatives."""
    kind = rng.random()
    if kind < 0.4:
        drawn = [small_sums(rng) for _ in range(7)]
        return "\n".join(f"{item.text} {mark(item.answer)}" for item in drawn)
    if kind < 0.9:
        yes, no = rng.choice(
            (("nice", "nasty"), ("nice", "nasty"), ("+", "-"), ("good", "bad"), ("smile", "frown"))
        )
        sign = rng.choice((" ", ": ", " = "))
        remarks = [draw_remark(rng, good=rng.random() < 0.5) for _ in range(7)]
        bare = rng.random() < 0.5
        return "\n".join(
            f"{r.adjective if bare else r.phrase()}{sign}{mark(yes if r.good else no)}" for r in remarks
        )
    pairs = [rng.choice(COMPARISONS)[:2] for _ in range(5)]
    return "\n".join(f"{a} {mark(b)}" for a, b in (rng.sample(pair, 2) for pair in pairs))


HAPPY = ("happy", "pleased", "content")
CROSS = ("cross", "upset", "annoyed")


def polarity(rng: Random) -> Exercise:
    good = rng.random() < 0.5
    remark = draw_remark(rng, good=good)
    kind = rng.randrange(3)
    if kind == 0:
        return Exercise(
            rng.choice(("nice or nasty?", "nasty or nice?")), remark.adjective, "nice" if good else "nasty"
        )
    if kind == 1:
        sign = "+" if good else "-"
        return Exercise("plus or minus", sentence(remark.clause()) + ".", f"{remark.noun} {sign}")
    answer = "thumbs up" if good else "thumbs down"
    return Exercise(rng.choice(("thumbs?", "thumbs up or thumbs down?")), sentence(remark.clause()), answer)


def joined(rng: Random, first: Remark, second: Remark) -> str:
    """Two remarks on an equal footing, or one conceded."""
    word = rng.choice(("but", "and", "whereas", "yet"))
    return sentence(f"{first.clause()} {word} {second.clause()}.")


def conceding(rng: Random, main: Remark, aside: Remark) -> str:
    word = rng.choice(("although", "even though", "though", "despite", "in spite of"))
    side = aside.clause() if word.endswith("though") else aside.phrase()
    if rng.random() < 0.5:
        return sentence(f"{word} {side}, {main.clause()}.")
    return sentence(f"{main.clause()}, {word} {side}.")


def review(rng: Random) -> Scene:
    """Both remarks sorted; each thing with its judgement; and, where one is conceded, what the main clause means."""
    good, bad = draw_pair(rng)
    main, aside = rng.sample([good, bad], 2)
    asks = [
        ("pro and con", f"pro {good.noun}, con {bad.noun}"),
        ("con and pro", f"con {bad.noun}, pro {good.noun}"),
        ("sort", f"+ {good.noun}\n- {bad.noun}"),
        ("sort from bad to good", f"{bad.noun} < {good.noun}"),
        ("sort from good to bad", f"{good.noun} > {bad.noun}"),
    ]
    for one in (good, bad):
        asks += [
            (f"how was the {one.noun}?", one.adjective),
            (f"what was {one.adjective}?", one.noun),
            (f"nice or nasty {one.noun}?", "nice" if one.good else "nasty"),
            (f"nice or nasty {one.noun}?", "nice" if one.good else "nasty"),
        ]
    if rng.random() < 0.25:
        return Scene(joined(rng, main, aside), asks)
    who = rng.choice(NAMES)
    asks += [
        (f"how did {who} go home?", f"{who} went home {rng.choice(HAPPY if main.good else CROSS)}."),
        ("stars", "four stars" if main.good else "two stars"),
        ("main point", main.clause()),
        ("side point", aside.clause()),
        ("smile or frown", "smile" if main.good else "frown"),
        ("frown or smile", "smile" if main.good else "frown"),
        ("come again?", "gladly" if main.good else "hardly"),
    ]
    return Scene(conceding(rng, main, aside), asks)


def point(rng: Random) -> Exercise:
    """Of two bare adjective-noun pairs, the one with the wanted polarity, in telegram style."""
    good, bad = draw_pair(rng)
    pair = rng.sample([good, bad], 2)
    text = ", ".join(f"{r.noun} {r.adjective}" for r in pair)
    third = rng.choice([noun for noun in rng.choice(KINDS).nouns if noun not in (good.noun, bad.noun)])
    listed = choices(rng, [good.noun, bad.noun, third])
    if rng.random() < 0.5:
        return Exercise(f"best: {listed}", text, good.noun)
    return Exercise(f"worst: {listed}", text, bad.noun)


def rewrite(rng: Random) -> Exercise:
    """Replace one word of a sentence."""
    first, second = draw_pair(rng)
    text = joined(rng, first, second)
    new = rng.choice(ADJECTIVES)
    return Exercise(f"put {new} for {first.adjective}", text, text.replace(first.adjective, new, 1))


GIVE = ("gave", "sold", "handed", "lent", "passed", "sent", "brought")
TAKE = (("got", "from"), ("bought", "from"), ("borrowed", "from"), ("received", "from"), ("took", "from"))


def move(rng: Random, giver: str, thing: str, taker: str) -> str:
    if rng.random() < 0.5:
        verb = rng.choice(GIVE)
        if rng.random() < 0.5:
            return f"{giver} {verb} {taker} the {thing}."
        return f"{giver} {verb} the {thing} to {taker}."
    verb, word = rng.choice(TAKE)
    return f"{taker} {verb} the {thing} {word} {giver}."


def transfers(rng: Random) -> Scene:
    a, b, c, d, e = rng.sample(NAMES, 5)
    one, two = rng.sample(THINGS, 2)
    told = [(one, a, b)] if rng.random() < 0.3 else [(one, a, b), (two, c, d)]
    rng.shuffle(told)
    if len(told) == 2 and rng.random() < 0.5:
        thing, _, holder = rng.choice(told)
        told.append((thing, holder, e))
    text = " ".join(move(rng, giver, thing, taker) for thing, giver, taker in told)
    paths = {
        t: [g for u, g, _ in told if u == t] + [[k for u, _, k in told if u == t][-1]] for t, _, _ in told
    }
    asks = [
        ("arrows", ", ".join(f"{g} > {k}" for _, g, k in told)),
        ("final list", ", ".join(f"{t}: {path[-1]}" for t, path in paths.items())),
        ("owners", "; ".join(f"{path[-1]} owns the {t}" for t, path in paths.items())),
    ]
    for t, path in paths.items():
        asks += [
            (f"path of the {t}", " > ".join(path)),
            (f"trace {t}", " to ".join(path)),
            (f"trace {t} back", " < ".join(path[::-1])),
            (f"who parted with the {t} first?", path[0]),
        ]
    asks += [(f"{g} dealt with", k) for _, g, k in told[:2]]
    return Scene(text, asks)


def small_counting(rng: Random) -> Scene:
    """The same with numbers up to 12."""
    return counting(rng, top=12)


def counting(rng: Random, top: int = 20) -> Scene:
    """Stories of more and less, with and without the sum written out."""
    a, b = rng.sample(NAMES, 2)
    many = plural(rng.choice(COUNTED))
    x, y = rng.randint(2, top), rng.randint(2, top)
    less = rng.randint(1, max(1, min(x, 12) - 1))
    kind = rng.randrange(7)
    if kind == 0:
        text, calc, total = f"{y} {many} join {x} {many}.", f"{x} + {y}", x + y
    elif kind == 1:
        text, calc, total = f"There were {x} {many}; {less} went missing.", f"{x} - {less}", x - less
    elif kind == 2:
        verb = rng.choice(("got", "found", "bought", "won", "received"))
        text, calc, total = f"{a} owned {x} {many}, then {verb} {y}.", f"{x} + {y}", x + y
    elif kind == 3:
        verb = rng.choice(("gave", "lost", "sold", "broke", "handed out"))
        text, calc, total = f"{a} owned {x} {many}, then {verb} {less}.", f"{x} - {less}", x - less
    elif kind == 4:
        text, calc, total = f"{a} counts {x} {many} and {b} counts {y}, all different.", f"{x} + {y}", x + y
    else:
        verb = rng.choice(("gives", "hands", "sends", "passes"))
        text = rng.choice(
            (
                f"{a}: {x} {many}, {b}: {y} {many}. {a} {verb} {b} {less}.",
                f"{a} owns {x} {many}, {b} owns {y}. {a} {verb} {less} to {b}.",
            )
        )
        asks = [("both counts after that", f"{a} {x - less}, {b} {y + less}")]
        for who, sum_, after in ((a, f"{x} - {less}", x - less), (b, f"{y} + {less}", y + less)):
            asks += [(f"count for {who}", str(after)), (f"sum for {who}", f"{sum_} = {after}")]
        return Scene(text, asks)
    return Scene(text, [("the count", str(total)), ("the sum", f"{calc} = {total}"), ("result", str(total))])


def relations(rng: Random) -> Scene:
    """Restate comparisons, name their sides, say yes or no, or that nothing is said."""
    a, b, c, d = rng.sample(NAMES, 4)
    one, two = (
        (up, down) if rng.random() < 0.5 else (down, up) for up, down, _ in rng.sample(COMPARISONS, 2)
    )
    facts = [(a, b, *one), (c, d, *two)]
    text = " ".join(f"{p} is {up} than {q}." for p, q, up, down in rng.sample(facts, 2))
    asks = []
    for p, q, up, down in facts:
        asks += [
            (f"about {q}", f"{q} is {down} than {p}."),
            (f"who is {up}?", p),
            (f"who is {down}?", q),
            (f"compare {p} and {q}", f"{p} {up}, {q} {down}"),
            (f"{p} {up} than {q}?", "yes"),
            (f"{q} {down} than {p}?", "yes"),
            (f"{q} {up} than {p}?", "no"),
            (f"{p} {down} than {q}?", "no"),
        ]
    for _ in range(4):
        p, q = rng.sample((a, b, c, d), 2)
        word = rng.choice(one + two)
        told = ({p, q} == {a, b} and word in one) or ({p, q} == {c, d} and word in two)
        if not told:
            asks.append((f"{p} {word} than {q}?", "not said"))
    return Scene(text, asks)


def biography(rng: Random) -> dict[str, str]:
    habit = rng.random() < 0.5
    return {
        "first": rng.choice(NAMES),
        "last": rng.choice(SURNAMES),
        "job": rng.choice(JOBS),
        "town": rng.choice(TOWNS),
        "day": f"{rng.randint(1940, 2005)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        "plays": rng.choice(CATEGORIES["instrument"]) if habit else "",
        "pet": "" if habit else rng.choice(CATEGORIES["animal"] + CATEGORIES["bird"]),
    }


def long_date(day: str) -> str:
    year, month, number = day.split("-")
    return f"{int(number)} {MONTHS[int(month) - 1]} {year}"


def facts(rng: Random, who: dict[str, str], *, joiner: str, sign: str) -> str:
    names = {
        "job": ("job", "work", "trade"),
        "town": ("town", "home", "city"),
        "day": ("born", "birthday", "date"),
    }
    parts = [f"{rng.choice(names[key])}{sign}{who[key]}" for key in ("job", "town", "day")]
    parts += [f"{key}{sign}{who[key]}" for key in ("plays", "pet") if who[key]]
    rng.shuffle(parts)
    return joiner.join([f"{rng.choice(('name', 'who', 'person'))}{sign}{who['first']} {who['last']}", *parts])


def records(rng: Random) -> Scene:
    who = biography(rng)
    joiner, sign = rng.choice(
        (("; ", ": "), (", ", "="), ("\n", ": "), (" | ", " "), (". ", ": "), ("\n", " = "))
    )
    full = f"{who['first']} {who['last']}"
    job = f"{article(who['job'])} {who['job']}"
    extra = (
        f"{full} plays the {who['plays']}."
        if who["plays"]
        else f"{full} has {article(who['pet'])} {who['pet']}."
    )
    asks = [
        ("surname", who["last"]),
        ("swap the names", f"{who['last']} {who['first']}"),
        ("long date", long_date(who["day"])),
        ("year", who["day"][:4]),
        ("month", long_date(who["day"]).split()[1]),
        ("trade and place", f"{job} of {who['town']}"),
        ("hobby or pet", extra),
    ]
    if rng.random() < 0.3:
        return Scene(
            profile(rng, who, dated=True),
            [
                *asks,
                ("as a list", f"{full}\n{who['job']}\n{who['town']}\n{who['day'][:4]}"),
                ("trade", who["job"]),
            ],
        )
    text = facts(rng, who, joiner=joiner, sign=sign)
    asks.append(("labels", ", ".join(part.split(sign)[0] for part in text.split(joiner))))
    asks.append(
        ("birthday", f"{who['first']} has a birthday on {' '.join(long_date(who['day']).split()[:2])}.")
    )
    asks.append(("profile", profile(rng, who)))
    return Scene(text, asks)


def profile(rng: Random, who: dict[str, str], *, dated: bool = False) -> str:
    """A few short sentences about a person."""
    full = f"{who['first']} {who['last']}"
    job = f"{article(who['job'])} {who['job']}"
    parts = [
        rng.choice(
            (
                f"The {who['job']} {full} has a house in {who['town']}.",
                f"{full} of {who['town']} is {job}.",
                f"In {who['town']} there is {job} called {full}.",
            )
        ),
        rng.choice(
            (
                f"The year of birth is {who['day'][:4]}.",
                f"The birthday is {long_date(who['day'])}.",
                f"{who['first']} came into the world in {long_date(who['day']).split()[1]} {who['day'][:4]}.",
            )
        ),
    ]
    if dated:
        parts[1] = f"The birthday is {who['day']}."
    if who["plays"]:
        parts.append(f"{who['first']} practises the {who['plays']} every day.")
    else:
        parts.append(f"{who['first']} looks after {article(who['pet'])} {who['pet']}.")
    return " ".join(parts)


def profile_prose(rng: Random) -> str:
    who = biography(rng)
    return f"{facts(rng, who, joiner='; ', sign=': ')}\n{mark(profile(rng, who))}"


def day_prose(rng: Random) -> str:
    """A small diary: who met whom, what changed hands, what was thought of it, and a look back."""
    a, b = rng.sample(NAMES, 2)
    thing, town = rng.choice(THINGS), rng.choice(TOWNS)
    first, second = draw_pair(rng)
    x, y = rng.randint(2, 20), rng.randint(2, 20)
    many = plural(rng.choice(COUNTED))
    verdict = "liked" if first.good else "did not like"
    parts = [
        f"In {rng.choice(MONTHS)} {a} met {b} in {town}.",
        rng.choice(
            (
                f"{move(rng, a, thing, b)} {mark(f'So {b} carried the {thing} home, and {a} went home without it.')}",
                f"{a} bought {x} {many} and then {y} more, {mark(f'{x + y} {many} in all.')}",
                f"{joined(rng, first, second)} {mark(f'{a} {verdict} the {first.noun}.')}",
            )
        ),
        mark(
            rng.choice(
                (
                    f"{b} told {a} about {town}.",
                    f"After that {a} and {b} left {town}.",
                    f"{a} wrote a letter to {b}.",
                )
            )
        ),
    ]
    return " ".join(parts)


def review_prose(rng: Random) -> str:
    """A longer review in running text, each judgement followed by what it led to."""
    lines = []
    for good in rng.sample([True, False, True, False], rng.randint(2, 3)):
        remark = draw_remark(rng, good=good)
        them = "them" if remark.many else "it"
        after = rng.choice(
            (
                f"I loved {them}.",
                f"More of {them}, please.",
                f"I would praise the {remark.noun} to my friends.",
            )
            if good
            else (
                f"I hated {them}.",
                f"No more of {them}, please.",
                f"I would warn my friends of the {remark.noun}.",
            )
        )
        lines.append(f"{sentence(remark.clause())}. {mark(after)}")
    return " ".join(lines)


def tongue(rng: Random) -> str:
    """Synonym lists: words of one polarity together."""
    good = rng.random() < 0.5
    kind = rng.choice(KINDS)
    own, general = (kind.good, GOOD) if good else (kind.bad, BAD)
    words = rng.sample(own + general, 4)
    return mark(f"{'Praise' if good else 'Blame'}: {', '.join(words)}.")
