"""Folders as the four verbs leave them, with numbers drawn by seed: small ones, and ones that strain a page."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TASKS = (
    "review_verdict",
    "praised_thing",
    "blamed_thing",
    "former_owner",
    "current_holder",
    "story_sum",
    "record_to_text",
    "register_entry",
)
METHODS = ("lora", "lora-matched", "single", "moelora", "hydralora", "alora", "alora-task")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOSTILE = "<script>alert(1)</script> & $x_1$ \\input{/etc/passwd} \u202e=cmd"
"""A task name that would harm a page, a formula, LaTeX or a spreadsheet."""


def write(folder: Path, **files: object) -> Path:
    """`config_yaml={…}` becomes config.yaml, `x_json={…}` x.json, `x_jsonl=[…]` x.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        stem, _, kind = name.rpartition("_")
        text = (
            yaml.safe_dump(value, allow_unicode=True)
            if kind == "yaml"
            else "".join(json.dumps(row) + "\n" for row in value)  # type: ignore[attr-defined]
            if kind == "jsonl"
            else json.dumps(value)
        )
        (folder / f"{stem}.{kind}").write_text(text, encoding="utf-8")
    return folder


def environment(*words: str, seed: int = 0) -> dict[str, Any]:
    return {
        "manylora": "0.1.0",
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "packages": {"torch": "2.13.0+cpu", "peft": "0.21.2"},
        "seed": seed,
        "threads": 2,
        "cuda": None,
        "command": ["/home/me/project/.venv/bin/manylora", *words],
    }


def scores(tasks: Sequence[str], draw: random.Random, *, n: int = 200, shift: float = 0.0) -> dict[str, Any]:
    rows = []
    for task in tasks:
        value = min(100.0, max(0.0, draw.uniform(30, 95) + shift))
        error = math.sqrt(value * (100 - value) / n)
        estimate = {"mean": value, "standard_error": error, "n": n}
        rows.append(
            {"task": task, "metric": "rouge1", "score": value, "standard_error": error, "n": n,
             "metrics": {"rouge1": estimate, "exact_match": {**estimate, "mean": value * 0.8}}}
        )  # fmt: skip
    return {"mean": 0.0, "standard_error": 0.0, "n": n * len(rows), "tasks": rows}


def train_folder(
    folder: Path, tasks: Sequence[str] = TASKS, *, steps: int = 1500, state: str = "finished", seed: int = 0
) -> Path:
    draw = random.Random(seed)
    metrics: list[dict[str, Any]] = []
    pace = {task: draw.uniform(2, 9) for task in tasks}
    for step in range(10, steps + 1, 10):
        fall = math.exp(-3 * step / steps)
        metrics.append({"step": step, "loss": 0.3 + 6 * fall + draw.gauss(0, 0.05), "grad_norm": 1.0})
        if step % max(10, steps // 5) == 0:
            losses = {
                f"eval_loss/{task}": 0.2 + pace[task] / 4 * fall + draw.uniform(0, 0.3) for task in tasks
            }
            mean = sum(losses.values()) / len(losses)
            metrics.append({"step": step, "eval_loss": mean, "eval_mean_task_loss": mean, **losses})
    found = scores(tasks, draw)
    answers = [
        {"task": task, "index": index, "prompt": f"Which of the things does {task} praise?\n" * 3, "prediction": "cup",
         "reference": "cup" if index % 2 else "lamp", "exact_match": 100.0 * (index % 2), "rouge1": 50.0}
        for task in tasks for index in range(4)
    ]  # fmt: skip
    write(
        folder,
        config_yaml={"model": "embedded", "data": "embedded", "method": "alora", "share": "B", "num_experts": 3,
                     "router": "token", "r": 8, "seed": seed, "limit": None, "target_modules": ["q_proj", "v_proj"]},
        environment_json=environment("train", "--out", str(folder), seed=seed),
        state_json={"state": state, "time": "2026-01-02T03:04:05+0000",
                    **({"error": "the disk is full."} if state == "failed" else {})},
        metrics_jsonl=metrics,
    )  # fmt: skip
    if state == "finished":
        baselines = {name: {task: draw.uniform(0, 45) for task in tasks} for name in ("majority", "keyword")}
        write(folder, scores_json={**found, "baselines": baselines}, predictions_jsonl=answers)
    return folder


def federate_folder(folder: Path, clients: int = 8, *, rounds: int = 5, seed: int = 0) -> Path:
    draw = random.Random(seed)
    names = list(TASKS) if clients == len(TASKS) else [f"client-{index:02d}" for index in range(clients)]
    pace = {name: draw.uniform(0.8, 2.0) for name in names}
    config = {
        "model": "embedded",
        "strategy": "fed-alora",
        "rounds": rounds,
        "seed": seed,
        "engine": "local",
        "r": 8,
    }
    for inside, speed in (("", 1.0), ("reference", 1.3)):
        metrics = []
        for step in range(1, rounds + 1):
            away = set(draw.sample(names, len(names) // 10)) if not inside else set()
            losses = {n: pace[n] * math.exp(-speed * step / rounds) for n in names if n not in away}
            sent = {} if inside else {n: 317_000 + draw.randrange(900) for n in names}
            metrics.append(
                {"step": step, "loss": sum(losses.values()) / len(losses), "asked": len(names), "losses": losses,
                 "update_norm": None if inside else 4.0 / step, "norms": dict.fromkeys(losses, 1.0),
                 "shares": {} if inside else {n: (k + 1) / (len(losses) * (len(losses) + 1) / 2)
                                              for k, n in enumerate(losses)},
                 "up": {n: size for n, size in sent.items() if n in losses}, "down": sent,
                 "refused": dict.fromkeys(sorted(away), "no answer within 20 s")}
            )  # fmt: skip
        write(folder / inside, metrics_jsonl=metrics)
    own = {n: scores([n] if clients == len(TASKS) else list(TASKS[:2]), draw) for n in names}
    alone = {n: scores([t["task"] for t in own[n]["tasks"]], draw, shift=-4) for n in names}
    return write(
        folder,
        config_yaml=config,
        environment_json=environment("federate", "--clients", str(clients), seed=seed),
        state_json={"state": "finished", "time": "2026-01-02T03:04:05+0000", "seconds": 288.2},
        scores_json={"clients": own, "reference": alone},
    )


def analyze_folder(
    folder: Path, *, layers: int = 32, modules: Sequence[str] = MODULES, tasks: Sequence[str] = TASKS, experts: int = 3,
    seed: int = 0,
) -> Path:  # fmt: skip
    draw = random.Random(seed)
    similarity, change, gates, norms, conflict = [], [], [], [], []
    kinds = ((False, True), (True, False), (False, False))
    for layer in range(layers):
        for module in modules:
            for same_task, same_init in kinds:
                for matrix in ("A", "B"):
                    level = (0.95 if same_init else 0.12) if matrix == "A" else 0.45 + 0.15 * same_task
                    value = min(1.0, max(0.0, level - 0.1 * layer / layers + draw.gauss(0, 0.03)))
                    similarity.append(
                        {"matrix": matrix, "layer": layer, "module": module, "left": "one", "right": "two",
                         "same_task": same_task, "same_init": same_init, "mean_cosine": value,
                         "mean_squared": value**2, "baseline_cosine": 0.1, "baseline_squared": 0.015}
                    )  # fmt: skip
            for matrix, size in (("A", 0.05), ("B", 0.6)):
                for step in (100, 200, 300):
                    grown = size * step / 300 + draw.uniform(0, 0.02)
                    change.append(
                        {"source": "one", "matrix": matrix, "layer": layer, "module": module,
                         "from_step": 0 if matrix == "A" else 10, "to_step": step, "similarity": 1 - grown / 2,
                         "magnitude": grown / 3, "direction": grown}
                    )  # fmt: skip
            norms += [
                {"task": task, "layer": layer, "module": module, "norm": draw.uniform(0.5, 1.5)}
                for task in tasks
            ]
        for task in tasks:
            raw = [draw.gammavariate(1.2, 1) for _ in range(experts)]
            weights = [value / sum(raw) for value in raw]
            entropy = -sum(weight * math.log(weight) for weight in weights)
            gates.append({"task": task, "layer": layer, "module": "q_proj", "weights": weights, "entropy": entropy,
                          "collapsed": max(weights) > 0.97})  # fmt: skip
        for place, left in enumerate(tasks):
            conflict += [{"left": left, "right": right, "layer": layer, "module": "q_proj",
                          "cosine": draw.uniform(-0.4, 0.6)} for right in tasks[place + 1 :]]  # fmt: skip
    sources = [{"name": n, "path": f"runs/{n}", "format": "lora", "tasks": list(tasks[:2]), "seed": s}
               for n, s in (("one", 0), ("two", 1))]  # fmt: skip
    analysis = {"kind": "analyze", "sources": sources, "similarity": similarity, "change": change, "gates": gates,
                "gradients": {"shared": "B", "norms": norms, "conflict": conflict}}  # fmt: skip
    return write(
        folder, analysis_json=analysis, environment_json=environment("analyze", "runs/one", "runs/two")
    )


def compare_folder(
    folder: Path, *, methods: Sequence[str] = METHODS, tasks: Sequence[str] = TASKS, seeds: int = 5, seed: int = 0,
    more: Mapping[str, object] | None = None,
) -> Path:  # fmt: skip
    draw = random.Random(seed)
    cells, table, delta, claims = [], [], [], []
    level = {task: draw.uniform(40, 85) for task in tasks}
    for rank, method in enumerate(methods):
        found = [{t: min(100.0, level[t] + rank + draw.gauss(0, 3)) for t in tasks} for _ in range(seeds)]
        cells += [{"method": method, "seed": index, "learning_rate": 0.005, "scores": own, "seconds": 50 + 3 * rank,
                   "parameters": 120_000 * (rank + 2), "peak_bytes": 600_000_000 + 9_000_000 * rank}
                  for index, own in enumerate(found)]  # fmt: skip
        for task in (*tasks, "mean"):
            values = [sum(own.values()) / len(own) if task == "mean" else own[task] for own in found]
            mean = sum(values) / len(values)
            half = 2.78 * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, seeds - 1) / seeds)
            table.append(
                {
                    "method": method,
                    "task": task,
                    "mean": mean,
                    "low": mean - half,
                    "high": mean + half,
                    "n": seeds,
                }
            )
        middle = 6.0 - 2 * rank
        delta.append({"method": method, "mean": middle, "low": middle - 2, "high": middle + 2, "n": seeds})
        if method != "alora":
            middle = 5 - rank - 1.0
            verdict = "supported" if middle > 2 else "not supported" if middle < -1 else "undecided"
            claims.append(
                {"text": f"ALoRA (several A's, one shared B) reaches a higher mean score than {method} at the same "
                 "number of epochs and with the learning rate chosen on validation", "difference": middle,
                 "low": middle - 2, "high": middle + 2, "p": 0.01234, "p_holm": 0.0617,
                 "bootstrap": [middle - 1.8, middle + 1.9],
                 "detectable": 2.4, "n": seeds, "verdict": verdict}
            )  # fmt: skip
    study = {"kind": "compare", "name": "what-to-share", "question": "Should several LoRAs share A, B or nothing?",
             "reference": "alora", "tasks": list(tasks), "cells": cells, "table": table, "delta_m": delta,
             "claims": claims, **(more or {})}  # fmt: skip
    return write(
        folder, study_json=study, environment_json=environment("compare", "studies/what-to-share.yaml")
    )
