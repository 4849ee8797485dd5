"""Expert ids: how they reach the layers in calls, checkpoints, generation, threads; what is refused."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from manylora.adapters import ManyLoraConfig
from manylora.errors import RoutingError

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VOCAB = 61
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


def base(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, eos_token_id=2)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def adapted(family: str = "llama", **settings) -> PeftModel:
    settings = {"r": 2, "lora_dropout": 0.0, "router": "task", "target_modules": "all-linear", **settings}
    model = get_peft_model(base(family), ManyLoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "manylora_experts" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(rows: int = 3, length: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("share", ["A", "B", "none"])
def test_each_row_uses_its_own_expert(share: str) -> None:
    model = adapted(share=share)
    ids = [2, 0, 1]
    together = model(input_ids=tokens(), expert_ids=torch.tensor(ids)).logits
    for row, expert in enumerate(ids):
        alone = model(input_ids=tokens()[row : row + 1], expert_ids=torch.tensor([expert])).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, model(input_ids=tokens(), expert_ids=torch.tensor([0, 0, 0])).logits)


def test_route_reaches_calls_without_the_keyword_and_gives_way_to_it() -> None:
    model = adapted()
    ids, others = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 1])
    want = model(input_ids=tokens(), expert_ids=ids).logits
    with model.route(ids):
        assert torch.equal(model(input_ids=tokens()).logits, want)
        with model.route(others):
            inner = model(input_ids=tokens()).logits
        assert torch.equal(model(input_ids=tokens()).logits, want)
        assert torch.equal(model(input_ids=tokens(), expert_ids=others).logits, inner)
    with model.route(1):
        torch.testing.assert_close(model(input_ids=tokens()).logits, inner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        (None, "needs expert_ids"),
        (torch.tensor([0, 1, 3]), "contain 3.*0 to 2"),
        (torch.tensor([0, -1, 2]), "contain -1"),
        (torch.tensor([0.0, 1.0, 2.0]), "dtype torch.float32"),
        (torch.tensor([True, False, True]), "dtype torch.bool"),
        (torch.tensor([0, 1]), "2 expert_ids for 3 rows"),
        (torch.tensor([0]), "1 expert_ids for 3 rows"),
        (torch.tensor([[0, 1, 2]]), r"shape \(1, 3\)"),
        (torch.tensor(1), r"shape \(\)"),
        (["a", "b", "c"], "no integers"),
        (3, "contain 3"),
        (True, "torch.bool"),
    ],
)
def test_ids_that_cannot_be_used(ids: object, shown: str) -> None:
    model = adapted()
    with pytest.raises(RoutingError, match=shown):
        model(input_ids=tokens(), expert_ids=ids)
    with pytest.raises(RoutingError, match=shown):
        model.generate(input_ids=tokens(), expert_ids=ids, **GREEDY)
    # the failed calls left nothing behind
    assert model(input_ids=tokens(), expert_ids=torch.tensor([0, 1, 2])).logits.shape == (3, 8, VOCAB)
    with pytest.raises(RoutingError, match="needs expert_ids"):
        model(input_ids=tokens())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_ids_of_any_integer_type_are_taken(dtype: torch.dtype) -> None:
    model, ids = adapted(), torch.tensor([0, 1, 2])
    want = model(input_ids=tokens(), expert_ids=ids).logits
    assert torch.equal(model(input_ids=tokens(), expert_ids=ids.to(dtype)).logits, want)


def test_ids_of_one_expert_are_checked_too() -> None:
    model = adapted(num_experts=1)
    want = model(input_ids=tokens()).logits
    assert torch.equal(model(input_ids=tokens(), expert_ids=torch.zeros(3, dtype=torch.long)).logits, want)
    with pytest.raises(RoutingError, match="contain 1"):
        model(input_ids=tokens(), expert_ids=torch.ones(3, dtype=torch.long))


def test_default_expert_is_used_without_ids() -> None:
    model = adapted(default_expert=1)
    want = model(input_ids=tokens(), expert_ids=torch.tensor([1, 1, 1])).logits
    torch.testing.assert_close(model(input_ids=tokens()).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["token", "uniform"])
def test_other_routers_accept_ids_and_do_not_use_them(router: str) -> None:
    model = adapted(router=router)
    want = model(input_ids=tokens()).logits
    ids = torch.tensor([2, 0, 1])
    assert torch.equal(model(input_ids=tokens(), expert_ids=ids).logits, want)
    plain = model.generate(input_ids=tokens(), **GREEDY)
    assert torch.equal(model.generate(input_ids=tokens(), expert_ids=ids, **GREEDY), plain)


def test_an_interrupted_call_leaves_no_ids_for_the_next() -> None:
    model = adapted()
    broken = model.get_submodule("base_model.model.model.layers.1.mlp")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = broken.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=tokens(), expert_ids=torch.tensor([0, 1, 2]))
    handle.remove()
    with pytest.raises(RoutingError, match="needs expert_ids"):
        model(input_ids=tokens())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("router", ["task", "token"])
def test_checkpointing_gives_the_same_gradients(family: str, reentrant: bool, router: str) -> None:
    model = adapted(family, router=router, share="B")
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    ids = torch.tensor([2, 0, 1])
    model(input_ids=tokens(), labels=tokens(), expert_ids=ids).loss.backward()
    want = gradients(model)
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=tokens(), labels=tokens(), expert_ids=ids, use_cache=False).loss.backward()
    assert_same(gradients(model), want)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_two_forwards_before_one_backward(checkpointing: bool | None) -> None:
    model = adapted().train()
    first, second = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0])
    model(input_ids=tokens(seed=1), labels=tokens(seed=1), expert_ids=first).loss.backward()
    model(input_ids=tokens(seed=2), labels=tokens(seed=2), expert_ids=second).loss.backward()
    want = gradients(model)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": checkpointing})
    one = model(input_ids=tokens(seed=1), labels=tokens(seed=1), expert_ids=first, use_cache=False).loss
    with model.route(second):
        two = model(input_ids=tokens(seed=2), labels=tokens(seed=2), use_cache=False).loss
    (one + two).backward()
    assert_same(gradients(model), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_thread(reentrant: bool) -> None:
    """As on CUDA, where autograd runs the checkpoint's second forward in a thread of its own."""
    model = adapted().train()
    ids = torch.tensor([2, 0, 1])
    model(input_ids=tokens(), labels=tokens(), expert_ids=ids).loss.backward()
    want = gradients(model)
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(input_ids=tokens(), labels=tokens(), expert_ids=ids, use_cache=False).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same(gradients(model), want)


def test_dropout_mask_is_the_same_in_the_rerun() -> None:
    model = adapted(lora_dropout=0.5).train()
    ids = torch.tensor([2, 0, 1])
    losses = []
    for checkpointed in (False, True):
        if checkpointed:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        loss = model(input_ids=tokens(), labels=tokens(), expert_ids=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss.detach(), gradients(model)))
    assert torch.equal(losses[0][0], losses[1][0])
    assert_same(losses[1][1], losses[0][1])


def test_a_rerun_that_lost_its_ids_is_an_error_and_not_the_default_expert() -> None:
    model = adapted(default_expert=0).train()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp")
    forward = layer.forward
    layer.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    model.enable_input_require_grads()
    for around in (nullcontext(), model.route(1)):
        loss = model(input_ids=tokens(), labels=tokens(), expert_ids=torch.tensor([2, 0, 1])).loss
        with around, pytest.raises(RoutingError, match="run again during backward"):
            loss.backward()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_generation_with_ids_equals_generation_row_by_row(task_type: str | None) -> None:
    model = adapted(task_type=task_type)
    prompts, ids = tokens(6), torch.tensor([0, 1, 2, 2, 1, 0])
    together = model.generate(input_ids=prompts, expert_ids=ids, **GREEDY)
    rows = [
        model.generate(input_ids=prompts[i : i + 1], expert_ids=ids[i : i + 1], **GREEDY)[0] for i in range(6)
    ]
    assert torch.equal(together, torch.stack(rows))
    with model.route(ids):
        assert torch.equal(model.generate(input_ids=prompts, **GREEDY), together)
    assert not torch.equal(
        model.generate(input_ids=prompts, expert_ids=1 - ids.clamp(max=1), **GREEDY), together
    )


def test_left_padded_generation() -> None:
    model = adapted()
    prompts, ids = tokens(2, 6), torch.tensor([2, 1])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompts], dim=1)
    mask = (padded != 0).long()
    got = model.generate(input_ids=padded, attention_mask=mask, expert_ids=ids, **GREEDY)[:, 3:]
    assert torch.equal(got, model.generate(input_ids=prompts, expert_ids=ids, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
    ],
)
def test_beams_follow_their_prompt(settings: dict) -> None:
    model = adapted()
    prompts, ids = tokens(3), torch.tensor([2, 0, 1])
    settings = {**GREEDY, **settings}
    together = model.generate(input_ids=prompts, expert_ids=ids, **settings)
    rows = [
        model.generate(input_ids=prompts[i : i + 1], expert_ids=ids[i : i + 1], **settings) for i in range(3)
    ]
    assert torch.equal(together, torch.cat(rows))


def test_sampled_return_sequences() -> None:
    model = adapted()
    settings = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 3}  # sure outcome
    got = model.generate(input_ids=tokens(), expert_ids=torch.tensor([2, 0, 1]), **settings)
    want = model.generate(input_ids=tokens(), expert_ids=torch.tensor([2, 0, 1]), **GREEDY)
    assert torch.equal(got, want.repeat_interleave(3, dim=0))


def test_threads_do_not_see_each_others_ids() -> None:
    model = adapted()
    choices = [torch.tensor([i % 3, (i + 1) % 3, i % 2]) for i in range(4)]
    with torch.no_grad():
        want = [model(input_ids=tokens(), expert_ids=ids).logits for ids in choices]
    failures: list[int] = []
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(15):
                got = model(input_ids=tokens(), expert_ids=choices[i]).logits
                with model.route(choices[i]):
                    routed = model(input_ids=tokens()).logits
                if not (torch.equal(got, want[i]) and torch.equal(routed, want[i])):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with model.route(0):
        worker_error: list[Exception] = []

        def unrouted() -> None:
            try:
                model(input_ids=tokens())
            except RoutingError as error:
                worker_error.append(error)

        thread = threading.Thread(target=unrouted)
        thread.start()
        thread.join()
    assert len(worker_error) == 1  # route holds in its own thread only


def test_a_copy_has_its_own_routing() -> None:
    model = adapted()
    other = copy.deepcopy(model)
    ids = torch.tensor([2, 0, 1])
    with model.route(ids):
        model(input_ids=tokens())
        with pytest.raises(RoutingError, match="needs expert_ids"):
            other(input_ids=tokens())
    assert torch.equal(
        other.generate(input_ids=tokens(), expert_ids=ids, **GREEDY),
        model.generate(input_ids=tokens(), expert_ids=ids, **GREEDY),
    )


def test_ids_work_on_a_model_adapted_in_place() -> None:
    reference = adapted()
    config = ManyLoraConfig(r=2, lora_dropout=0.0, router="task", target_modules="all-linear")
    model = inject_adapter_in_model(config, base()).eval()  # as transformers' add_adapter and load_adapter do
    values = {n.removeprefix("base_model.model."): v for n, v in reference.state_dict().items()}
    model.load_state_dict(values)
    ids = torch.tensor([2, 0, 1])
    want = reference(input_ids=tokens(), expert_ids=ids).logits
    assert torch.equal(model(input_ids=tokens(), expert_ids=ids).logits, want)
    assert torch.equal(
        model.generate(input_ids=tokens(), expert_ids=ids, **GREEDY),
        reference.generate(input_ids=tokens(), expert_ids=ids, **GREEDY),
    )


def test_a_run_on_shapes_alone() -> None:
    config = ManyLoraConfig(r=2, router="task", target_modules="all-linear")
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(base().config), config, low_cpu_mem_usage=True)
        logits = model(
            input_ids=torch.zeros(3, 8, dtype=torch.long), expert_ids=torch.zeros(3, dtype=torch.long)
        ).logits
    assert logits.is_meta
    assert logits.shape == (3, 8, VOCAB)
    real = adapted()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(torch.tensor([2, 0, 1]))
        assert real(input_ids=mode.from_tensor(tokens()), expert_ids=ids).logits.shape == (3, 8, VOCAB)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_trainer_passes_ids(checkpointing: bool, tmp_path) -> None:
    model = adapted(share="none", task_type="CAUSAL_LM")
    rows = [{"input_ids": t, "labels": t, "expert_ids": torch.tensor(0)} for t in tokens(4)]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        activation_checkpointing=checkpointing,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.0,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            changed = (parameter != before[name]).view(3, 2, -1).flatten(1).any(1)
            assert changed.tolist() == [True, False, False], name  # only the expert that was routed to
