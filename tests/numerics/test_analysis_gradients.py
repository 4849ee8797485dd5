"""Gradient norms and conflict against autograd written out, and gates against the router's softmax."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

from manylora.analysis import LabelReader, Reader, measure_gates, measure_gradients
from manylora.analysis.routers import ALL, differences, overall
from manylora.data import Encoded
from manylora.errors import ConfigError, RoutingError
from manylora.training import LabelSets
from tiny_models import adapted, bert, llama

TASKS = ("a", "b", "c")


def task_rows(count: int = 4, seed: int = 0) -> dict[str, list[Encoded]]:
    """Random rows of unequal lengths, whose last tokens are the answer."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Encoded]] = {}
    for task in TASKS:
        rows[task] = []
        for _ in range(count):
            length = int(torch.randint(5, 10, (), generator=generator))
            ids = torch.randint(3, 61, (length,), generator=generator).tolist()
            prompt = int(torch.randint(1, 4, (), generator=generator))
            labels = [-100] * prompt + ids[prompt:]
            rows[task].append(Encoded(input_ids=ids, labels=labels, prompt_length=prompt, truncated=False))
    return rows


def by_hand(model: PeftModel, rows: list[Encoded], suffix: str, **routing: Any) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over answer tokens, row by row without batches or padding."""
    model.eval().zero_grad()
    named = {name: p for name, p in model.named_parameters() if name.endswith(suffix)}
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids]), **routing).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    grads = torch.autograd.grad(total / count, list(named.values()))
    strip = f".manylora_experts.default{suffix}" if "experts" in next(iter(named)) else suffix
    return {
        name.removeprefix("base_model.model.").removesuffix(strip): grad.double().flatten()
        for name, grad in zip(named, grads, strict=True)
    }


@pytest.mark.parametrize(("share", "suffix"), [("A", ".lora_A"), ("B", ".lora_B")])
@pytest.mark.parametrize("router", ["token", "task"])
def test_gradients_on_the_shared_matrix_are_autograds(share: str, suffix: str, router: str) -> None:
    model = adapted(share=share, num_experts=3, router=router, lora_dropout=0.3).double()
    rows = task_rows()
    experts = {task: n for n, task in enumerate(TASKS)} if router == "task" else None
    reader = Reader(pad_token_id=0, experts=experts, batch_size=3)
    found = measure_gradients(model, rows, reader, source="run")
    assert found.shared == share
    want = {
        task: by_hand(model, rows[task], suffix, **({"expert_ids": torch.tensor([n])} if experts else {}))
        for n, task in enumerate(TASKS)
    }
    assert {(n.task, n.name) for n in found.norms} == {(t, m) for t in TASKS for m in want["a"]}
    for norm in found.norms:
        assert norm.norm == pytest.approx(float(want[norm.task][norm.name].norm()), rel=1e-6)
    assert len(found.conflict) == 3 * len(want["a"])
    for pair in found.conflict:
        one, other = want[pair.left][pair.name], want[pair.right][pair.name]
        assert pair.cosine == pytest.approx(float(F.cosine_similarity(one, other, dim=0)), abs=1e-6)
    whole = {task: torch.cat(list(parts.values())) for task, parts in want.items()}
    got = {(c.left, c.right): c.cosine for c in found.overall_conflict}
    for left, right in itertools.combinations(TASKS, 2):
        cosine = float(F.cosine_similarity(whole[left], whole[right], dim=0))
        assert got[left, right] == pytest.approx(cosine, abs=1e-6)
    half = [by_hand(model, part, suffix, **({"expert_ids": torch.tensor([1])} if experts else {}))
            for part in (rows["b"][::2], rows["b"][1::2])]  # fmt: skip
    flat = [torch.cat(list(parts.values())) for parts in half]
    (within,) = [c.cosine for c in found.overall_within if c.left == "b"]
    assert within == pytest.approx(float(F.cosine_similarity(*flat, dim=0)), abs=1e-6)


@pytest.mark.parametrize("router", ["token", "task"])
def test_a_classifiers_gradients_are_those_of_the_mean_loss_among_the_tasks_own_labels(router: str) -> None:
    labels = LabelSets(tasks={"a": ["x", "y"], "b": ["u", "v", "w"]}, majority={"a": "x", "b": "u"})
    base = bert()
    base.classifier = torch.nn.Linear(32, labels.count)
    model = adapted(base, router=router, target_modules=["query", "value"], task_type="SEQ_CLS").double()
    given = {task: rows for task, rows in task_rows().items() if task in labels.tasks}
    rows = {
        task: [
            Encoded(
                input_ids=row.input_ids, labels=[labels.first(task) + n % 2], prompt_length=1, truncated=False
            )
            for n, row in enumerate(found)
        ]
        for task, found in given.items()
    }
    experts = {"a": 0, "b": 1} if router == "task" else None
    reader = LabelReader(pad_token_id=0, experts=experts, batch_size=3, labels=labels)
    found = measure_gradients(model, rows, reader, source="run")

    named = {n: p for n, p in model.named_parameters() if n.endswith("manylora_experts.default.lora_B")}
    for number, (task, own) in enumerate(rows.items()):
        routing = {"expert_ids": torch.tensor([number])} if experts else {}
        first, total = labels.first(task), torch.zeros(())
        for row in own:
            logits = model(input_ids=torch.tensor([row.input_ids]), **routing).logits
            logits = logits[:, first : first + len(labels.tasks[task])]
            total = total + F.cross_entropy(logits, torch.tensor([row.labels[0] - first]))
        wanted = torch.autograd.grad(total / len(own), list(named.values()))
        norms = {norm.name: norm.norm for norm in found.norms if norm.task == task}
        assert len(norms) == len(named) == 4
        for name, gradient in zip(named, wanted, strict=True):
            short = name.removeprefix("base_model.model.").removesuffix(".manylora_experts.default.lora_B")
            assert norms[short] == pytest.approx(float(gradient.norm()), rel=1e-6)

    gates = measure_gates(model, rows, reader, source="run")
    assert {gate.task for gate in gates} == ({"a", "b", ALL} if router == "token" else set())


def test_the_batch_size_changes_nothing_and_the_model_is_left_as_it_was() -> None:
    model = adapted(share="B", num_experts=2).train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    rows = task_rows()
    found = [
        measure_gradients(model, rows, Reader(pad_token_id=0, batch_size=size), source="run")
        for size in (1, 4)
    ]
    for one, other in zip(found[0].norms, found[1].norms, strict=True):
        assert one.norm == pytest.approx(other.norm, rel=1e-4)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


def test_a_lora_shares_both_matrices_and_ours_with_one_expert_gives_the_same() -> None:
    ours = adapted(num_experts=1, router=None)
    plain = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=16, target_modules="all-linear")).eval()
    weights = {name: p for name, p in ours.named_parameters() if "manylora_experts" in name}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                key = name.replace(".default.weight", "").replace(".lora_", ".manylora_experts.default.lora_")
                parameter.copy_(weights[key])
    rows, reader = task_rows(), Reader(pad_token_id=0)
    one, other = (measure_gradients(model, rows, reader, source="x") for model in (ours, plain))
    assert one.shared == other.shared == "A and B"
    assert {n.matrix for n in one.norms} == {"A", "B"}

    def values(found: Any) -> dict[Any, float]:
        return {(c.left, c.right, c.matrix, c.name): c.cosine for c in found.conflict}

    assert values(one).keys() == values(other).keys()
    for key, cosine in values(one).items():
        assert values(other)[key] == pytest.approx(cosine, abs=1e-4)


def test_opposite_tasks_conflict_and_like_ones_do_not() -> None:
    """One token to predict: wanting 7 and wanting 7 again agree; the gradients of 7 and 9 differ in sign there."""
    model = adapted(share="B", num_experts=1, router=None)

    def wants(token: int) -> list[Encoded]:
        row = Encoded(input_ids=[5, 6, token], labels=[-100, -100, token], prompt_length=2, truncated=False)
        return [row, row]

    rows = {"seven": wants(7), "again": wants(7), "nine": wants(9)}
    found = measure_gradients(model, rows, Reader(pad_token_id=0), source="run")
    got = {(c.matrix, c.left, c.right): c.cosine for c in found.overall_conflict}
    for matrix in ("A", "B"):
        assert got[matrix, "seven", "again"] == pytest.approx(1)
        assert got[matrix, "seven", "nine"] < 0.9
    assert [c.cosine for c in found.overall_within] == pytest.approx([1] * 6)


def test_without_a_shared_matrix_there_is_nothing_to_conflict_on() -> None:
    with pytest.raises(ConfigError, match="share no matrix"):
        measure_gradients(
            adapted(share="none", num_experts=2), task_rows(), Reader(pad_token_id=0), source="x"
        )


def test_a_task_without_an_expert_is_refused() -> None:
    reader = Reader(pad_token_id=0, experts={"a": 0, "b": 1})
    with pytest.raises(RoutingError, match="no expert for the task 'c'"):
        measure_gradients(adapted(num_experts=2, router="task"), task_rows(), reader, source="x")


def test_gates_are_the_routers_softmax_averaged_over_real_tokens() -> None:
    model = adapted(share="B", num_experts=3, target_modules=["q_proj"])
    rows = task_rows()
    inputs: dict[str, torch.Tensor] = {}
    found = measure_gates(model, rows, Reader(pad_token_id=0, batch_size=3), source="run")
    bank = model.base_model.model.model.layers[1].self_attn.q_proj.bank("default")
    for task in TASKS:
        seen = []
        handle = bank.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        for row in rows[task]:
            model(input_ids=torch.tensor([row.input_ids]))
        handle.remove()
        inputs[task] = torch.cat(seen)
    got = {gate.task: gate for gate in found if gate.name == "model.layers.1.self_attn.q_proj"}
    means = []
    for task in TASKS:
        weights = F.softmax(inputs[task] @ bank.lora_router.T, -1).double()
        entropy = -(weights * weights.log()).sum(-1).mean().item()
        assert got[task].weights == pytest.approx(weights.mean(0).tolist(), rel=1e-4)
        assert got[task].entropy == pytest.approx(entropy, rel=1e-4)
        assert (got[task].layer, got[task].module) == (1, "q_proj")
        means.append(weights.mean(0))
    assert got[ALL].weights == pytest.approx(torch.stack(means).mean(0).tolist(), rel=1e-4)
    assert sum(got[ALL].weights) == pytest.approx(1)
    apart = [(w - torch.stack(means).mean(0)).abs().sum().item() / 2 for w in means]
    alone = differences([gate for gate in found if gate.name == got[ALL].name])
    assert [alone["run", task] for task in (*TASKS, ALL)] == pytest.approx([*apart, 0], rel=1e-3, abs=1e-9)


def test_a_router_that_sends_everything_to_one_expert_has_collapsed() -> None:
    model = adapted(share="B", num_experts=3, target_modules=["q_proj"])
    assert not any(
        gate.collapsed for gate in measure_gates(model, task_rows(), Reader(pad_token_id=0), source="x")
    )
    row = Encoded(input_ids=[5] * 6, labels=[5] * 6, prompt_length=1, truncated=False)
    layer = model.base_model.model.model.layers[0]
    with torch.no_grad():  # in the first layer every token of such a row is the same vector
        x = layer.input_layernorm(model.get_input_embeddings().weight[5])
        router = layer.self_attn.q_proj.bank("default").lora_router.zero_()
        router[1] = 100 * x / x.square().sum()
    found = measure_gates(model, {"fives": [row]}, Reader(pad_token_id=0), source="x")
    collapsed = {gate.name for gate in found if gate.collapsed}
    assert collapsed == {"model.layers.0.self_attn.q_proj"}
    (first,) = [gate for gate in found if gate.task == ALL and gate.layer == 0]
    assert first.weights == pytest.approx([0, 1, 0])
    assert first.entropy == pytest.approx(0, abs=1e-6)
    (whole,) = [gate for gate in overall(found) if gate.task == "fives"]
    other = next(gate for gate in found if gate.layer == 1)
    assert whole.weights == pytest.approx(
        [w / 2 + o / 2 for w, o in zip(first.weights, other.weights, strict=True)]
    )


def test_only_a_token_router_has_gates() -> None:
    for settings in ({"num_experts": 1, "router": None}, {"num_experts": 2, "router": "uniform"}):
        model = adapted(share="B", **settings)
        assert measure_gates(model, task_rows(), Reader(pad_token_id=0), source="x") == []


def test_a_uniform_router_matrix_has_the_largest_entropy() -> None:
    model = adapted(share="B", num_experts=3, target_modules=["q_proj"])
    with torch.no_grad():
        for layer in model.base_model.model.model.layers:
            layer.self_attn.q_proj.bank("default").lora_router.zero_()
    for gate in measure_gates(model, task_rows(), Reader(pad_token_id=0), source="run"):
        assert gate.weights == pytest.approx([1 / 3] * 3)
        assert gate.entropy == pytest.approx(math.log(3))
