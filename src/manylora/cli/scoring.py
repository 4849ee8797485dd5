"""Score a model on test rows and write down what it answered: what `train` and `evaluate` have in common."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from manylora.cli.console import CountProgress
from manylora.cli.cuts import cut_lines, cut_questions
from manylora.cli.tables import print_scores
from manylora.data import EMBEDDED, TaskData, encode_prompt
from manylora.errors import RoutingError
from manylora.evaluation import (
    CONSTANT,
    Scores,
    chance_notes,
    check_classes,
    constant_scores,
    generate_answers,
    score_all,
    wordless,
    write_scores,
)
from manylora.training import Prepared, RunFolder, load_config, token_rows
from manylora.training.settings import Words

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_ANSWER_TOKENS = 64
"""Longest answer where neither the run nor the user says otherwise."""


def check_test(prepared: Prepared) -> None:
    """Refuse, before anything is trained, test rows that could not be scored afterwards.

    Raises:
        RoutingError, DataError: a task has no expert, a prompt cannot be rendered, labels do not fit.
    """
    test, config = prepared.splits.test, prepared.config
    if prepared.labels is not None:
        check_classes(prepared)
        for line in cut_questions(test, prepared.tokenizer, config.max_length):
            print(line)
        return
    if config.router == "task" and config.num_experts != 1:
        _check_experts(test, prepared.task_names)
    tokenizer, cut = prepared.tokenizer, Counter[str]()
    rows_known = token_rows(load_config(config.model))
    for task, rows in test.items():
        for example in rows:
            cut[task] += encode_prompt(
                example, tokenizer, max_length=config.max_length, vocabulary=rows_known
            )[1]
    if test:
        nothing = {task: [""] * len(rows) for task, rows in test.items()}
        score_all(test, nothing, tokenizer=tokenizer, rouge=config.rouge)
    for line in (*cut_lines(cut, test, config.max_length), *wordless(test, rouge=config.rouge)):
        print(line)


def _check_experts(test: TaskData, known: Collection[str]) -> None:
    if unknown := sorted(set(test) - set(known)):
        raise RoutingError(
            f"The adapter has no expert for the tasks {', '.join(unknown)}; it knows {', '.join(known)}."
        )


def score_run(prepared: Prepared, folder: RunFolder, model: PeftModel) -> None:
    """Score a finished training on its test rows, print the table, write predictions.jsonl and scores.json."""
    test = prepared.splits.test
    if prepared.labels is not None:
        from manylora.cli.classifying import score_run_of_classes

        score_run_of_classes(prepared, folder, model)
        return
    if not test:
        print("no test rows (give them with --test); the adapter is in " + str(folder.path / "adapter"))
        return
    by_task = model.active_peft_config.router == "task" and model.active_peft_config.num_experts > 1
    experts = {name: index for index, name in enumerate(prepared.task_names)}
    scores = score(
        model,
        prepared.tokenizer,
        test,
        answer_tokens=prepared.answer_tokens,
        batch_size=prepared.config.eval_batch_size,
        max_length=prepared.config.max_length,
        experts=experts if by_task else None,
        rouge=prepared.config.rouge,
    )
    source = prepared.config.test or prepared.config.data
    config = prepared.config
    baselines = suite_baselines(source, list(test), limit=config.limit, rouge=config.rouge)
    beside = baselines or {CONSTANT: constant_scores(test, prepared.splits.train, rouge=config.rouge)}
    notes = chance_notes(scores, beside, router=config.router)
    write_scores(folder.path, scores, baselines, notes)
    print_scores(scores, baselines, notes)


def score(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: TaskData,
    *,
    answer_tokens: Mapping[str, int],
    batch_size: int,
    max_length: int | None,
    experts: Mapping[str, int] | None,
    rouge: Words = "all",
) -> Scores:
    """Generate an answer to every row, greedily, and score it.

    Args:
        model: base with or without adapter.
        tokenizer: the base's.
        test: rows per task.
        answer_tokens: longest answer per task in tokens; a task that is not in it gets the largest of them.
        batch_size: rows per batch; the answers do not depend on it.
        max_length: tokens a prompt may have; None: as many as the model's context leaves. It is said what is cut.
        experts: task name to expert under the task router, else `None`.
        rouge: what ROUGE-1 counts as words.

    Raises:
        RoutingError: a test task has no expert.
    """
    if experts is not None:
        _check_experts(test, experts)
    longest = max(answer_tokens.values(), default=DEFAULT_ANSWER_TOKENS)
    examples = [example for rows in test.values() for example in rows]
    tasks = [task for task, rows in test.items() for _ in rows]
    progress = CountProgress("answers", len(examples))

    def tell_cut(places: Sequence[int]) -> None:
        for line in cut_lines(Counter(tasks[place] for place in places), test, max_length):
            print(line, file=sys.stderr, flush=True)

    answers = iter(
        generate_answers(
            model,
            tokenizer,
            examples,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=[answer_tokens.get(task, longest) for task in tasks],
            expert_ids=None if experts is None else [experts[task] for task in tasks],
            on_progress=lambda done, _: progress(done),
            on_cut=tell_cut,
        )
    )
    by_task = {task: list(islice(answers, len(rows))) for task, rows in test.items()}
    return score_all(test, by_task, tokenizer=tokenizer, rouge=rouge)


def suite_baselines(
    source: str, tasks: list[str], *, limit: int | None, rouge: Words = "all"
) -> dict[str, dict[str, float]]:
    """What a constant answer and a keyword rule reach on the embedded suite: column → task → score.

    Empty where `source` is another one, or not all of it was scored.
    """
    if source != EMBEDDED or limit is not None:
        return {}
    from manylora.data.suite import load_suite
    from manylora.data.suite.baselines import keyword_baseline, majority_baseline

    train, test = load_suite("train", tasks=tasks), load_suite("test", tasks=tasks)
    return {
        name: score_all(
            test, {task: learn(train[task]).predict(rows) for task, rows in test.items()}, rouge=rouge
        ).by_task()
        for name, learn in {"majority": majority_baseline, "keyword": keyword_baseline}.items()
    }
