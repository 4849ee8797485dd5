"""The evaluation room: answers from a model, and what they are worth (`kinds` says which models answer how).

Generation is greedy and independent of the batch size; answer rules are those of LLM-Adapters, and
every score comes with its n and standard error. Importing the room loads neither torch nor transformers: the
functions that generate import them.
"""

from manylora.evaluation.chance import CONSTANT, chance_notes, constant_scores
from manylora.evaluation.classes import majority_scores, read_labels, score_labels
from manylora.evaluation.collapse import Loss, collapse_router, paired_loss
from manylora.evaluation.generation import (
    generate_answers,
    stop_token_ids,
    stream_answer,
)
from manylora.evaluation.kinds import DEFAULT_ANSWER_TOKENS, Baselines, Choosing, TaskKind, Writing, kind_of
from manylora.evaluation.metrics import (
    METRICS,
    Metric,
    chosen_option,
    exact_match,
    normalise,
    option_accuracy,
    rouge1,
)
from manylora.evaluation.rules import RULES, TASK_RULES, AnswerRule, rules_for
from manylora.evaluation.score import (
    ClientScores,
    Estimate,
    SavedScores,
    ScoredExample,
    Scores,
    TaskScore,
    read_client_scores,
    read_scores,
    score_all,
    score_task,
    wordless,
    write_scores,
)
from manylora.evaluation.statistics import delta_m, standard_error
from manylora.evaluation.table import loss_table, scores_table

__all__ = [
    "CONSTANT",
    "DEFAULT_ANSWER_TOKENS",
    "METRICS",
    "RULES",
    "TASK_RULES",
    "AnswerRule",
    "Baselines",
    "Choosing",
    "ClientScores",
    "Estimate",
    "Loss",
    "Metric",
    "SavedScores",
    "ScoredExample",
    "Scores",
    "TaskKind",
    "TaskScore",
    "Writing",
    "chance_notes",
    "chosen_option",
    "collapse_router",
    "constant_scores",
    "delta_m",
    "exact_match",
    "generate_answers",
    "kind_of",
    "loss_table",
    "majority_scores",
    "normalise",
    "option_accuracy",
    "paired_loss",
    "read_client_scores",
    "read_labels",
    "read_scores",
    "rouge1",
    "rules_for",
    "score_all",
    "score_labels",
    "score_task",
    "scores_table",
    "standard_error",
    "stop_token_ids",
    "stream_answer",
    "wordless",
    "write_scores",
]
