"""Labels of tasks, what a classifier reads, and the loss that chooses among a row's own task's labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForMaskedLM, LlamaForSequenceClassification

from manylora.data import Example, Message, load_splits, options_of, without_options
from manylora.errors import ConfigError, DataError, ModelError
from manylora.training import Choosing, LabelSets, TrainConfig, base_location, load_classifier
from manylora.training.batches import Collator
from manylora.training.heads import LABEL
from manylora.training.labels import MAX_LABELS, encode_labelled, question_of
from manylora.training.losses import LabelLoss, among
from tiny_models import bert, llama


def rows(*labels: str) -> list[Example]:
    return [Example(task="t", instruction=f"row {n}", output=label) for n, label in enumerate(labels)]


LABELS = LabelSets.of({"colour": rows("red", "blue", " red "), "yes or no": rows("yes", "no", "no", "maybe")})


def test_labels_are_the_distinct_answers_of_each_task_laid_end_to_end() -> None:
    assert dict(LABELS.tasks) == {"colour": ["blue", "red"], "yes or no": ["maybe", "no", "yes"]}
    assert LABELS.majority == {"colour": "red", "yes or no": "no"}
    assert (LABELS.count, LABELS.first("colour"), LABELS.first("yes or no")) == (5, 0, 2)
    assert LABELS.allowed().tolist() == [[True] * 2 + [False] * 3, [False] * 2 + [True] * 3]


def test_tasks_that_are_none_of_choosing_are_refused_by_name() -> None:
    LabelSets.of({"many": rows(*map(str, range(MAX_LABELS)))})
    with pytest.raises(DataError, match=r"'free' has 51 distinct answers.*--tasks"):
        LabelSets.of({"free": rows(*map(str, range(MAX_LABELS + 1)))})
    with pytest.raises(DataError, match="have one label, 'yes'"):
        LabelSets.of({"same": rows("yes", "yes ")})
    with pytest.raises(DataError, match=r"test tasks other have no labels.*colour, yes or no"):
        LABELS.check({"colour": [], "other": []}, what="test")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Is it?\n\nOPTIONS:\n- yes\n- no", "Is it?"),
        ("Is it?\nOPTIONS:\n- yes\n- no\n\nThink first.", "Is it?\n\nThink first."),
        ("a\nOPTIONS:\n- x\nb\nOPTIONS:\n- y\n", "a\nOPTIONS:\n- x\nb"),
        ("OPTIONS: none\n", "OPTIONS: none"),
        ("no list", "no list"),
    ],
)
def test_the_list_of_options_goes_and_all_else_stays(text: str, left: str) -> None:
    assert without_options(text) == left
    assert options_of(left) == (["x"] if "- x" in left else [])


def test_a_classifier_reads_the_question_without_template() -> None:
    assert (
        question_of(Example(task="t", instruction="Do.\nOPTIONS:\n- a\n- b", input="This.")) == "Do.\n\nThis."
    )
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content="Ho"))
    assert question_of(Example(task="t", form="chat", messages=turns)) == "Hi\n\nHo"


def test_encoded_rows_carry_the_heads_output_and_lose_their_end(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    data = {"yes or no": rows("no", "yes")}
    [task] = encode_labelled(data, tokenizer, LABELS, max_length=3)
    whole = tokenizer("row 0").input_ids
    assert [row.labels for row in task.rows] == [[3], [4]]
    assert task.rows[0].input_ids == whole[:3]
    assert task.truncated == 1.0
    kind = Choosing(tokenizer=tokenizer, labels=LABELS, max_length=99, context=4)
    [task] = kind.encode(data, vocabulary=None)
    assert len(task.rows[0].input_ids) == 4
    with pytest.raises(DataError, match="given tasks x"):
        encode_labelled({"x": rows("a")}, tokenizer, LABELS, max_length=9)


def test_loss_and_gradient_see_only_the_rows_own_labels() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    task, right = torch.tensor([0, 1, 1]), torch.tensor([1, 2, 4])
    losses = F.cross_entropy(among(logits, task, LABELS.allowed()), right, reduction="none")
    want = torch.stack(
        [
            F.cross_entropy(logits[0, :2].double(), torch.tensor(1)),
            F.cross_entropy(logits[1, 2:].double(), torch.tensor(0)),
            F.cross_entropy(logits[2, 2:].double(), torch.tensor(2)),
        ]
    )
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-7)
    losses.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[~LABELS.allowed()[task]].any()
    assert logits.grad[LABELS.allowed()[task]].all()


def test_a_batch_has_one_label_a_row() -> None:
    coded = [
        {"input_ids": [5, 6], "labels": [3], "task": 1},
        {"input_ids": [7], "labels": [0], "task": 0},
    ]
    batch = Collator(pad_token_id=9)(coded)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    losses, which = LabelLoss(LABELS)(logits, batch["labels"], batch["task"])
    own = among(logits, torch.tensor([1, 0]), LABELS.allowed())
    want = F.cross_entropy(own, torch.tensor([3, 0]), reduction="none")
    assert torch.equal(losses, want)
    assert which.tolist() == [0, 1]
    assert (batch["labels"] != -100).sum() == 2  # what transformers counts as the items of a step
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_heads_are_what_stands_beside_the_encoder() -> None:
    assert LABEL.parts(bert()) == ["classifier"]
    assert LABEL.parts(LlamaForSequenceClassification(llama().config)) == ["score"]


def test_a_head_is_drawn_from_the_seed_and_the_rest_is_the_bases(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "encoder")

    def load(seed: int) -> Any:
        return load_classifier(str(tmp_path / "encoder"), labels=7, pad_token_id=0, seed=seed, device="cpu")

    one, same, other = load(1), load(1), load(2)
    assert one.classifier.weight.shape == (7, 32)
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    encoder = bert().bert.state_dict()
    for name, value in one.bert.state_dict().items():
        assert torch.equal(value, encoder[name]), name


def test_weights_that_lack_more_than_a_head_are_refused(tmp_path: Path) -> None:
    BertForMaskedLM(bert().config).save_pretrained(tmp_path / "masked")  # without the pooler
    with pytest.raises(ModelError, match=r"lack bert\.pooler"):
        load_classifier(str(tmp_path / "masked"), labels=3, pad_token_id=0, seed=0, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_on": "all"}, "loss_on all is about written answers"),
        ({"max_new_tokens": 5}, "max_new_tokens 5 is about written answers"),
        ({"recipe": "published-flan"}, "recipe published-flan trains a model to write"),
        (
            {"task_type": "CAUSAL_LM", "recipe": "classification"},
            "recipe classification is for task_type SEQ_CLS",
        ),
    ],
)
def test_settings_that_contradict_the_task_type_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"task_type": "SEQ_CLS", **settings})


def test_a_model_in_an_installed_package_is_found_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carrier" / "model").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise AssertionError", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"package:carrier: that package holds neither a config\.json"):
        base_location("package:carrier")
    (tmp_path / "carrier" / "model" / "config.json").write_text("{}", encoding="utf-8")
    assert base_location("package:carrier") == str(tmp_path / "carrier" / "model")
    with pytest.raises(ModelError, match=r"package:no_such_one: no such package.*--no-deps no-such-one"):
        base_location("package:no_such_one")
    with pytest.raises(ModelError, match="no such package"):
        base_location("package:os.path")


def test_a_limit_takes_rows_of_every_label_from_a_sorted_file(tmp_path: Path) -> None:
    lines = [f'{{"instruction": "row {n}", "output": "{"a" if n < 30 else "b"}"}}' for n in range(60)]
    (tmp_path / "sorted.jsonl").write_text("\n".join(lines), encoding="utf-8")
    [few] = load_splits(data=tmp_path, limit=10, validation_fraction=0).train.values()
    assert [row.output for row in few] == ["a"] * 5 + ["b"] * 5
    [whole] = load_splits(data=tmp_path, limit=99, validation_fraction=0).train.values()
    assert len(whole) == 60


def test_what_a_classifier_has_no_place_for_is_refused_by_name() -> None:
    turns = (
        Message(role="user", content="a"),
        Message(role="assistant", content="b", fields={"tool_calls": [{}]}),
    )
    for more in ({"messages": turns}, {"messages": turns[:1], "tools": ({},)}):
        example = Example(task="t", form="chat", output="yes", origin="t.jsonl:3", **more)
        with pytest.raises(
            DataError, match=r"t\.jsonl:3: field 'tools' or 'tool_calls' is not read by a classifier"
        ):
            question_of(example)
    spoken = Example(task="t", system="Be kind.", history=(("a", "b"),), instruction="c", output="yes")
    assert question_of(spoken) == "Be kind.\n\na\n\nb\n\nc"


def test_an_encoder_pools_as_its_folder_says(tmp_path: Path) -> None:
    bert().bert.save_pretrained(tmp_path / "encoder")
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    def pooled() -> tuple[torch.Tensor, torch.Tensor]:
        model = load_classifier(
            str(tmp_path / "encoder"), labels=3, pad_token_id=0, seed=0, device="cpu"
        ).eval()
        with torch.no_grad():
            found = model.bert(input_ids=ids, attention_mask=mask)
            logits = model(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(logits, model.classifier(found.pooler_output))
        return found.pooler_output, found.last_hidden_state

    own, hidden = pooled()
    assert not torch.allclose(own, hidden[:, 0])  # BERT's: a layer on the first token
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    told = tmp_path / "encoder" / "1_Pooling" / "config.json"
    told.write_text('{"pooling_mode_mean_tokens": false, "pooling_mode_cls_token": true}', encoding="utf-8")
    torch.testing.assert_close(pooled()[0], own)
    told.write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    mean, hidden = pooled()
    torch.testing.assert_close(mean, torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)]))
    for damage in ("{", "[]", "\udcff"):
        told.write_bytes(damage.encode("utf-8", "surrogatepass"))
        with pytest.raises(ModelError, match=r"1_Pooling/config\.json .*; put a copy of it back"):
            pooled()
