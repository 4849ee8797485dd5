"""Two tasks over the same records of people: tell them in a sentence, or print them as a catalogue entry."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from manylora.data.suite.lexicon import CATEGORIES, FEMALE, JOBS, MALE, MONTHS, SURNAMES, TOWNS, article
from manylora.data.suite.rows import SuiteRow, SuiteTask, fill

TELL_TEMPLATES = (
    "Write one sentence that tells these facts.",
    "Turn this record into a sentence.",
    "Describe the person below in plain words.",
    "Put the following data into one full sentence: {text}",
)
ENTRY_TEMPLATES = (
    "Print this record as a catalogue entry.",
    "Reformat the record for the members' register.",
    "Bring the data below into the style of our card index.",
    "Make a register line of the following data: {text}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """One invented person."""

    first: str
    last: str
    job: str
    town: str
    born: tuple[int, int, int]
    """Year, month, day."""
    extra: tuple[str, str]
    """("plays", instrument) or ("pet", animal)."""

    def record(self, rng: Random) -> str:
        """ "name: ...; job: ...", the name first and the other fields in random order."""
        fields = [
            ("job", self.job),
            ("town", self.town),
            ("born", "{}-{:02}-{:02}".format(*self.born)),
            self.extra,
        ]
        rng.shuffle(fields)
        return "; ".join(
            f"{name}: {value}" for name, value in [("name", f"{self.first} {self.last}"), *fields]
        )

    def tell(self, rng: Random) -> str:
        """A sentence with every fact, in one of three styles (so the wording is not determined by the record)."""
        name, year = f"{self.first} {self.last}", self.born[0]
        job = f"{article(self.job)} {self.job}"
        habit, value = self.extra
        does = f"plays the {value}" if habit == "plays" else f"keeps {article(value)} {value}"
        style = rng.randrange(3)
        if style == 0:
            return f"{name} is {job} from {self.town} who was born in {year} and {does}."
        if style == 1:
            return f"{name}, born in {year}, works as {job} in {self.town} and {does}."
        return f"{name} lives in {self.town}, is {job}, {does} and was born in {year}."

    def entry(self) -> str:
        """ "Okafor, Mara (baker), Dover, 5 March 1987"."""
        year, month, day = self.born
        return f"{self.last}, {self.first[0]}. ({self.job}), {self.town}, {day} {MONTHS[month - 1]} {year}"


def draw_person(rng: Random) -> Person:
    """A random person of the lists."""
    if rng.random() < 0.5:
        extra = ("plays", rng.choice(CATEGORIES["instrument"]))
    else:
        extra = ("pet", rng.choice(CATEGORIES["animal"] + CATEGORIES["bird"]))
    return Person(
        first=rng.choice(FEMALE + MALE),
        last=rng.choice(SURNAMES),
        job=rng.choice(JOBS),
        town=rng.choice(TOWNS),
        born=(rng.randint(1940, 2005), rng.randint(1, 12), rng.randint(1, 28)),
        extra=extra,
    )


def draw_tell(rng: Random, index: int) -> SuiteRow:
    """A sentence about the record."""
    person = draw_person(rng)
    instruction, given = fill(rng.choice(TELL_TEMPLATES), text=person.record(rng))
    return SuiteRow(
        instruction=instruction,
        input=given,
        output=person.tell(rng),
        key=("person", person.first, person.last),
    )


def draw_entry(rng: Random, index: int) -> SuiteRow:
    """The record as one line of a register: surname first, the date written out, the extra field dropped."""
    person = draw_person(rng)
    instruction, given = fill(rng.choice(ENTRY_TEMPLATES), text=person.record(rng))
    return SuiteRow(
        instruction=instruction, input=given, output=person.entry(), key=("person", person.first, person.last)
    )


TASKS = (
    SuiteTask(
        name="record_to_text",
        kind="structure-to-text",
        summary="A record of a person told in one sentence; the wording is one of three",
        skills=("reading fields", "articles and agreement"),
        draw=draw_tell,
        shares_with=("register_entry",),
        conflicts_with=("register_entry",),
        templates=TELL_TEMPLATES,
    ),
    SuiteTask(
        name="register_entry",
        kind="formatting",
        summary="The same kind of record as a register line: surname, initial, date written out, one field dropped",
        skills=("reading fields", "names of months", "initials"),
        draw=draw_entry,
        shares_with=("record_to_text",),
        conflicts_with=("record_to_text",),
        templates=ENTRY_TEMPLATES,
    ),
)
