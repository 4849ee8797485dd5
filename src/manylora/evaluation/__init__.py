"""The evaluation room: answers from a model, and what they are worth.

Generation is greedy and independent of the batch size; answer rules are those of LLM-Adapters, and
every score comes with its n and standard error. Importing the room loads neither torch nor transformers: the
functions that generate import them.
"""

from manylora.evaluation.chance import CONSTANT, chance_notes, constant_scores
from manylora.evaluation.collapse import Loss, collapse_router, loss_table, paired_loss
from manylora.evaluation.generation import (
    generate_answers,
    stop_token_ids,
    stream_answer,
)
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
from manylora.evaluation.score import score_all, score_task, wordless
from manylora.evaluation.scores import (
    Baselines,
    ClientScores,
    Estimate,
    Gain,
    Gains,
    SavedScores,
    ScoredExample,
    Scores,
    TaskScore,
    gains_line,
    gains_of,
    read_client_scores,
    read_scores,
    scores_table,
    write_scores,
)
from manylora.evaluation.statistics import delta_m, standard_error

__all__ = [
    "CONSTANT",
    "METRICS",
    "RULES",
    "TASK_RULES",
    "AnswerRule",
    "Baselines",
    "ClientScores",
    "Estimate",
    "Gain",
    "Gains",
    "Loss",
    "Metric",
    "SavedScores",
    "ScoredExample",
    "Scores",
    "TaskScore",
    "chance_notes",
    "chosen_option",
    "collapse_router",
    "constant_scores",
    "delta_m",
    "exact_match",
    "gains_line",
    "gains_of",
    "generate_answers",
    "loss_table",
    "normalise",
    "option_accuracy",
    "paired_loss",
    "read_client_scores",
    "read_scores",
    "rouge1",
    "rules_for",
    "score_all",
    "score_task",
    "scores_table",
    "standard_error",
    "stop_token_ids",
    "stream_answer",
    "wordless",
    "write_scores",
]
