"""What guests write: things one can praise or blame, with words of praise and blame that fit them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from manylora.data.suite.lexicon import word_list


@dataclass(frozen=True, kw_only=True, slots=True)
class Aspects:
    """Nouns of one kind with the adjectives that sound natural of them."""

    singular: tuple[str, ...]
    plural: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]

    @property
    def nouns(self) -> tuple[str, ...]:
        """All nouns, singular first."""
        return self.singular + self.plural


GOOD = word_list("""
excellent superb wonderful lovely brilliant splendid delightful perfect great impressive outstanding fantastic
marvellous pleasant terrific remarkable charming first-rate
""")
BAD = word_list("""
awful terrible dreadful horrible poor disappointing dismal lousy mediocre hopeless miserable shabby atrocious
unpleasant dire appalling shoddy second-rate
""")

FOOD = Aspects(
    singular=word_list("""
    soup bread coffee breakfast dinner dessert salad cake pizza pasta rice fish chicken cheese tea sauce stew curry
    omelette pudding sandwich porridge steak lunch pie
    """),
    plural=word_list("fries pancakes noodles dumplings vegetables mushrooms drinks starters"),
    good=word_list("delicious tasty fresh juicy crisp fragrant flavourful tender creamy mouth-watering"),
    bad=word_list("bland stale soggy burnt greasy tasteless mouldy rancid sour undercooked"),
)
STAFF = Aspects(
    singular=word_list(
        "waiter waitress receptionist manager driver guide host chef porter cleaner owner barman doorman"
    ),
    plural=word_list("cooks waiters guards helpers"),
    good=word_list("friendly polite helpful attentive cheerful kind patient courteous welcoming thoughtful"),
    bad=word_list("rude careless grumpy unhelpful impatient clumsy arrogant hostile lazy dishonest"),
)
PLACE = Aspects(
    singular=word_list("""
    room bed bathroom garden terrace pool lobby view balcony kitchen lounge sofa carpet shower beach cabin cottage
    dining_room bar gym sauna tent ferry bus train hall
    """),
    plural=word_list("towels pillows beds chairs curtains windows blankets tables"),
    good=word_list("clean cosy comfortable spotless elegant bright beautiful spacious stylish gorgeous"),
    bad=word_list("dirty noisy cramped smelly gloomy filthy damp ugly draughty dusty"),
)
SHOW = Aspects(
    singular=word_list("""
    plot acting music ending script dialogue film play concert book story novel opera museum tour lecture exhibition
    soundtrack singing dancing
    """),
    plural=word_list("songs jokes costumes actors pictures"),
    good=word_list("gripping funny clever moving thrilling original touching inspired witty memorable"),
    bad=word_list("boring dull tedious confusing predictable silly pointless shallow clumsy forgettable"),
)
KINDS = (FOOD, STAFF, PLACE, SHOW)


@dataclass(frozen=True, kw_only=True, slots=True)
class Remark:
    """One thing and one judgement of it."""

    noun: str
    adjective: str
    good: bool
    many: bool

    def clause(self) -> str:
        """ "the soup was bland", with the verb in the right number."""
        return f"the {self.noun} {'were' if self.many else 'was'} {self.adjective}"

    def phrase(self) -> str:
        """ "the bland soup"."""
        return f"the {self.adjective} {self.noun}"


def draw_remark(rng: Random, *, good: bool, kind: Aspects | None = None) -> Remark:
    """A random remark of the wanted polarity; a third of the adjectives are of the general kind."""
    kind = kind or rng.choice(KINDS)
    noun = rng.choice(kind.nouns)
    own, general = (kind.good, GOOD) if good else (kind.bad, BAD)
    adjective = rng.choice(general if rng.random() < 0.35 else own)
    return Remark(noun=noun, adjective=adjective, good=good, many=noun in kind.plural)


def draw_pair(rng: Random) -> tuple[Remark, Remark]:
    """A good and a bad remark about two different things, mostly of one kind."""
    kind = rng.choice(KINDS)
    good = draw_remark(rng, good=True, kind=kind)
    while True:
        bad = draw_remark(rng, good=False, kind=kind if rng.random() < 0.6 else None)
        if bad.noun != good.noun:
            return good, bad
