"""What answering without skill reaches on the suite: the majority answer and the best keyword rule.

Both learn from training rows alone. The keyword baseline is allowed to be clever: it takes, among all rules of the
kinds below, the one that is right most often on the training rows.

* word rule: "if the prompt contains word w, answer a, else answer b", for every word and answers of the task;
* naive Bayes over the words of the prompt, where the answers form a small closed set;
* place rules: the option at a given place of the list; the option that the text mentions first, last or most often;
  the text's n-th capitalised word, number or other word from the left or the right, where no options are listed.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manylora.data.examples import Example

Rule = Callable[[Example], str]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A rule that was learnt on training rows, with a name that says what it does."""

    name: str
    rule: Rule

    def predict(self, rows: Sequence[Example]) -> list[str]:
        """One answer per row."""
        return [self.rule(row) for row in rows]


def _prompt(row: Example) -> str:
    return f"{row.instruction}\n{row.input}"


def _listed(row: Example) -> list[str]:
    _, found, tail = row.instruction.partition("OPTIONS:\n")
    return [line[2:] for line in tail.splitlines() if line.startswith("- ")] if found else []


def _text(row: Example) -> str:
    return f"{row.instruction.partition('OPTIONS:')[0]}\n{row.input}"


def _accuracy(rule: Rule, rows: Sequence[Example]) -> float:
    return sum(rule(row) == row.output for row in rows) / len(rows)


def majority_baseline(train: Sequence[Example]) -> Baseline:
    """The most frequent answer of the training rows (the first seen, of equals)."""
    answer, _ = Counter(row.output for row in train).most_common(1)[0]
    return Baseline(name=f"always {answer!r}", rule=lambda row: answer)


def _word_rule(train: Sequence[Example], answers: Sequence[str]) -> Baseline:
    """Best "word present: a, absent: b" over all words seen at least five times."""
    words = [frozenset(_WORD.findall(_prompt(row).lower())) for row in train]
    counts = Counter(word for row in words for word in row)
    best, chosen = -1, ("", answers[0], answers[0])
    for word in sorted(word for word, count in counts.items() if count >= 5):
        inside = Counter(row.output for row, has in zip(train, words, strict=True) if word in has)
        outside = Counter(row.output for row, has in zip(train, words, strict=True) if word not in has)
        if not outside:
            continue
        (yes, right_in), (no, right_out) = inside.most_common(1)[0], outside.most_common(1)[0]
        if right_in + right_out > best:
            best, chosen = right_in + right_out, (word, yes, no)
    word, yes, no = chosen
    return Baseline(
        name=f"{yes!r} if {word!r} occurs, else {no!r}",
        rule=lambda row: yes if word in _WORD.findall(_prompt(row).lower()) else no,
    )


def _naive_bayes(train: Sequence[Example], answers: Sequence[str]) -> Baseline:
    """Multinomial naive Bayes with add-one smoothing."""
    counts: dict[str, Counter[str]] = {answer: Counter() for answer in answers}
    for row in train:
        counts[row.output].update(_WORD.findall(_prompt(row).lower()))
    vocabulary = {word for counter in counts.values() for word in counter}
    sizes = {answer: sum(counter.values()) + len(vocabulary) for answer, counter in counts.items()}
    prior = Counter(row.output for row in train)

    def rule(row: Example) -> str:
        words = [word for word in _WORD.findall(_prompt(row).lower()) if word in vocabulary]

        def score(answer: str) -> float:
            total = math.log(prior[answer])
            return total + sum(math.log((counts[answer][word] + 1) / sizes[answer]) for word in words)

        return max(answers, key=score)

    return Baseline(name="naive Bayes over words", rule=rule)


def _mention(options: list[str], text: str, how: str) -> str:
    """The option that `text` mentions first, last or most often; the first option if it mentions none."""
    lowered = text.lower()
    places: dict[str, list[int]] = defaultdict(list)
    for option in options:
        places[option] = [m.start() for m in re.finditer(rf"\b{re.escape(option.lower())}\b", lowered)]
    named = [option for option in options if places[option]]
    if not named:
        return options[0]
    if how == "first":
        return min(named, key=lambda option: places[option][0])
    if how == "last":
        return max(named, key=lambda option: places[option][-1])
    return max(named, key=lambda option: len(places[option]))


def _option_rules(train: Sequence[Example]) -> list[Baseline]:
    size = min(len(_listed(row)) for row in train)
    rules = [
        Baseline(name=f"option {place + 1}", rule=lambda row, place=place: _listed(row)[place])  # type: ignore[misc]
        for place in range(size)
    ]
    rules += [
        Baseline(
            name=f"option mentioned {how}",
            rule=lambda row, how=how: _mention(_listed(row), _text(row), how),  # type: ignore[misc]
        )
        for how in ("first", "last", "most often")
    ]
    return rules


_PATTERNS = {
    "capitalised word": re.compile(r"\b[A-Z]\w+"),
    "number": re.compile(r"\b\d+\b"),
    "word": re.compile(r"\w+"),
}


def _nth(pattern: re.Pattern[str], text: str, place: int) -> str:
    found = pattern.findall(text)
    return found[place] if -len(found) <= place < len(found) else ""


def _place_rules() -> list[Baseline]:
    return [
        Baseline(
            name=f"{kind} number {place + 1 if place >= 0 else place} of the text",
            rule=lambda row, pattern=pattern, place=place: _nth(  # type: ignore[misc]
                pattern, row.input or row.instruction, place
            ),
        )
        for kind, pattern in _PATTERNS.items()
        for place in (0, 1, 2, 3, 4, 5, -1, -2, -3, -4, -5, -6)
    ]


def keyword_baseline(train: Sequence[Example]) -> Baseline:
    """The rule of the module's kinds that is right most often on `train`; ties go to the simpler kind."""
    answers = sorted({row.output for row in train})
    rules: list[Baseline] = []
    if all(_listed(row) for row in train):
        rules += _option_rules(train)
    else:
        rules += _place_rules()
    rules.append(_word_rule(train, answers))
    best = max(rules, key=lambda baseline: _accuracy(baseline.rule, train))
    if len(answers) > 10:
        return best
    # Naive Bayes fits its own training rows far too well to be compared on them: it is judged on the unseen half.
    half = len(train) // 2
    bayes = _naive_bayes(train[:half], answers)
    if _accuracy(bayes.rule, train[half:]) > _accuracy(best.rule, train[half:]):
        return _naive_bayes(train, answers)
    return best
