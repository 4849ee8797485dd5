"""A client's personal model: saved as a plain LoRA folder, which PEFT reads without manylora, and scored.

HOME/NAME/adapter             the model, with how its rows asked
HOME/NAME/tasks.json          how long its answers may be
HOME/NAME/predictions.jsonl   what it answered to its test rows
HOME/NAME/complete.json       the checksums of all these
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from manylora.data import Example, PromptRecord, Template, apply_template, encode_prompt
from manylora.evaluation import generate_answers, score_all
from manylora.federated.faults import ClientError, Fault
from manylora.federated.kept import not_finite
from manylora.federated.parts import State
from manylora.files import COMPLETE, NOTES, folder_sums, json_text, remove, write_json, write_text

if TYPE_CHECKING:
    from manylora.evaluation import Scores
    from manylora.federated.workbench import Workbench


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """A client's own rows by task; every training row has an answer."""

    train: Mapping[str, list[Example]]
    test: Mapping[str, list[Example]] = field(default_factory=dict)

    def with_template(self, template: Template) -> ClientData:
        """The same, instruction rows in the form that `template` asks for."""
        train, test = (
            {task: [apply_template(row, template) for row in rows] for task, rows in part.items()}
            for part in (self.train, self.test)
        )
        return ClientData(train=train, test=test)


def score_personal(
    bench: Workbench, data: ClientData, folder: Path, *, number: int, stacks: Sequence[State] = ()
) -> Scores | None:
    """Save the adapter that is on and what goes with it, and score it on the client's test rows.

    Args:
        bench: with the client's adapter on.
        data: the client's rows, the run's template applied to them.
        folder: the client's own.
        number: of the round, for the note on what was written.
        stacks: what was folded into the base.

    Returns:
        The scores; None where there are no test rows.
    """
    config = bench.config
    limits = {
        task.name: task.answer_limit(fixed=config.max_new_tokens, context=bench.context)
        for task in bench.encode(data.train)
    }
    prompts = PromptRecord.of(
        data.train,
        bench.tokenizer,
        date=config.date,
        max_length=config.max_length,
        instructions=bench.template,
    )
    prompts = prompts.with_mark(bench.fingerprint)
    remove(folder / COMPLETE)  # it speaks of what is about to be replaced
    save_personal(bench, folder / "adapter", stacks=stacks, prompts=prompts)
    write_json(
        folder / "tasks.json",
        {
            "max_length": config.max_length,
            "tasks": {task: {"answer_tokens": limit} for task, limit in limits.items()},
        },
    )
    scores = _scores(bench, data, folder, limits) if data.test else None
    names = [path.relative_to(folder).as_posix() for path in folder.glob("adapter/*")]
    sums = folder_sums(folder, [*names, "tasks.json", "predictions.jsonl"])
    write_json(folder / COMPLETE, {"round": number, NOTES: sums})
    return scores


def _scores(bench: Workbench, data: ClientData, folder: Path, limits: Mapping[str, int]) -> Scores:
    config = bench.config
    answers = {
        task: generate_answers(
            bench.model,
            bench.tokenizer,
            rows,
            batch_size=config.eval_batch_size,
            max_length=config.max_length,
            max_new_tokens=limits.get(task, max(limits.values())),
        )
        for task, rows in data.test.items()
    }
    scores = score_all(data.test, answers, tokenizer=bench.tokenizer, rouge=config.rouge)
    lines = (json_text(row) + "\n" for row in scores.prediction_rows())
    write_text(folder / "predictions.jsonl", "".join(lines))
    return scores


def save_personal(
    bench: Workbench, folder: Path, *, stacks: Sequence[State] = (), prompts: PromptRecord | None = None
) -> None:
    """Write the adapter that is on, exactly, as one LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    A factored adapter becomes (M A, B0 + B2 B1) of the intermediate rank. FLoRA's base has changed, so its stacks
    go before the client's own factors, and the rank is the sum of theirs. Appears under its name only when whole.

    Args:
        bench: with the client's adapter on.
        folder: replaced if it is there.
        stacks: what was folded into the base.
        prompts: how the client's rows asked, and the base's mark, to go along.

    Raises:
        ClientError: a weight is not finite.
    """
    s = bench.config.scaling
    weights, rank = {}, 0
    for name, (a_RD, b_OR) in bench.plain_factors().items():
        A = torch.cat([*(stack[f"{name}.A"] for stack in stacks), a_RD], dim=0)
        B = torch.cat([*(stack[f"{name}.B"] / s for stack in stacks), b_OR], dim=1)
        rank = A.shape[0]
        weights[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=s * rank,
        target_modules=sorted(bench.layers),
        fan_in_fan_out=any(layer.stored_transposed for layer in bench.layers.values()),
        base_model_name_or_path=bench.config.model,
        inference_mode=True,
    )
    if broken := not_finite(weights):  # a product of finite factors can overflow
        raise ClientError(
            Fault.NOT_FINITE,
            f"the personal model holds NaN or infinity, first in {broken}; lower the learning rate, or go back to a "
            "round before with --resume RUN --from-round.",
        )
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    save_file(weights, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(partial))
    if prompts is not None:
        prompts.write(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def cut_prompts(bench: Workbench, rows: ClientData) -> str:
    """A sentence on a client's prompts that are too long and lose their beginnings; "" where all are whole.

    Raises:
        DataError: a row cannot be encoded.
    """
    length, rows = bench.config.max_length, rows.with_template(bench.template)
    train = {task.name: sum(row.truncated for row in task.rows) for task in bench.encode(rows.train)}
    test = {
        task: sum(
            encode_prompt(row, bench.tokenizer, max_length=length, vocabulary=bench.vocabulary)[1]
            for row in found
        )
        for task, found in rows.test.items()
    }
    shares = [
        f"{100 * cut / len(found[task]):.1f} % of {task}'s {what} prompts"
        for what, cuts, found in (("training", train, rows.train), ("test", test, rows.test))
        for task, cut in cuts.items()
        if cut
    ]
    return f"longer than {length} tokens and cut to their ends: {', '.join(shares)}" if shares else ""
