"""The prompt of use is the prompt of training: predict, evaluate, export and federate, on another day too."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from chats import CHATML, DATED, THOUGHT, chat_base
from manylora.cli import main
from manylora.data import PROMPTS_FILE, PromptRecord
from manylora.evaluation import generation
from manylora.training import TrainConfig, prepare

YESTERDAY, TOMORROW = "Etc/GMT+12", "Etc/GMT-14"
"""Time zones that are 26 hours apart, so that it is never the same day in both."""


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int = 6, answer: str = "Soup.") -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"Menu {i}?"}, {"role": "assistant", "content": answer}]}
        for i in range(count)
    ]


PLAIN = [{"prompt": f"Q: menu {i} A:", "completion": " soup"} for i in range(6)]
ALPACA = [{"instruction": f"Menu {i}?", "output": "soup"} for i in range(6)]


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a chat template that asks for the date."""
    return chat_base(tiny_base, tmp_path_factory.mktemp("chat") / "base", DATED)


def train(base: Path, data: Path, out: Path, *more: str) -> Path:
    command = ["train", "--model", base, "--data", data, "--method", "lora", "--epochs", 1, "--batch-size", 4]
    assert main([*map(str, command), "--device", "cpu", "--out", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on rows of each form, and one whose tasks differ in it."""
    folder = tmp_path_factory.mktemp("forms")
    forms = {"chat": chats(), "plain": PLAIN, "alpaca": ALPACA}
    forms["mixed"] = [{**row, "task": task} for task in ("chat", "plain") for row in forms[task]]
    return {
        name: train(
            base,
            write(folder / f"{name}.jsonl", rows),
            folder / f"run-{name}",
            "--date",
            "2024-02-29",
            *(["--template", "alpaca"] if name == "alpaca" else []),
        )
        for name, rows in forms.items()
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is given to read, as text."""
    real, found = generation._prompt, []

    def listen(model: Any, tokenizer: Any, *more: Any) -> Any:
        ids, cut = real(model, tokenizer, *more)
        found.append(tokenizer.decode(ids))
        return ids, cut

    monkeypatch.setattr(generation, "_prompt", listen)
    return found


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the time zone, and with it the day."""

    def set_to(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_to
    monkeypatch.undo()
    time.tzset()


CHAT_PROMPT = "It is 29 February 2024.\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("run", "more", "prompt"),
    [
        ("chat", (), CHAT_PROMPT),
        ("plain", (), "Why?"),
        ("alpaca", (), "### Instruction:\nWhy?\n\n### Response:\n"),
        ("mixed", ("--task", "plain"), "Why?"),
        ("mixed", ("--task", "chat"), CHAT_PROMPT),
        ("chat", ("--raw",), "Why?"),
        ("plain", ("--form", "alpaca"), "### Instruction:\nWhy?\n\n### Response:\n"),
    ],
)
def test_predict_asks_as_the_adapter_was_trained(
    run: str, more: tuple[str, ...], prompt: str, runs: dict[str, Path], asked: list[str], capsys: Any
) -> None:
    command = ["predict", "--adapter", str(runs[run]), "--max-new-tokens", "2", "Why?", *more]
    assert main(command) == 0
    assert asked == [prompt]
    assert "note" not in capsys.readouterr().err


def test_tasks_of_several_forms_are_told_apart_or_asked_for(runs: dict[str, Path], capsys: Any) -> None:
    assert main(["predict", "--adapter", str(runs["mixed"]), "Why?"]) == 2
    assert "different forms (chat chat, plain prompt); name one with --task" in capsys.readouterr().err
    assert main(["predict", "--adapter", str(runs["chat"]), "--raw", "--form", "chat", "Why?"]) == 2
    assert "--raw is --form prompt" in capsys.readouterr().err


def test_an_adapter_of_an_earlier_version_is_asked_as_before_and_it_is_said(
    runs: dict[str, Path], tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    old = tmp_path / "old"
    shutil.copytree(runs["alpaca"], old)
    (old / "adapter" / PROMPTS_FILE).unlink()
    state = json.loads((old / "state.json").read_text(encoding="utf-8"))
    state.pop("files")  # nor did it note checksums
    (old / "state.json").write_text(json.dumps(state), encoding="utf-8")
    assert main(["predict", "--adapter", str(old), "--max-new-tokens", "2", "Why?"]) == 0
    assert asked == ["### Instruction:\nWhy?\n\n### Response:\n"]
    assert (
        "does not say which form its training prompts had; the Alpaca form is used" in capsys.readouterr().err
    )


# ---------------------------------------------------------------- rows of instruction and input


@pytest.fixture(scope="module")
def instructed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on rows of instruction and input per template, the first by default."""
    folder = tmp_path_factory.mktemp("templates")
    rows = write(folder / "menu.jsonl", [{**row, "input": "today"} for row in ALPACA])
    more = ["--date", "2024-02-29", "--test", str(rows)]
    return {
        name: train(base, rows, folder / name, *more, *words)
        for name, words in {"chat": [], "none": ["--template", "none"]}.items()
    }


INSTRUCTED = {
    "chat": CHAT_PROMPT.replace("Why?", "Menu 0?\n\ntoday"),
    "none": "Menu 0?\n\ntoday",
    "alpaca": "### Instruction:\nMenu 0?\n\n### Input:\ntoday\n\n### Response:\n",
}


@pytest.mark.parametrize("name", ["chat", "none"])
def test_instruction_rows_are_asked_in_every_verb_as_they_were_trained(
    name: str, instructed: dict[str, Path], tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    run, short = instructed[name], ["--max-new-tokens", "2"]
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["template"] == name
    prepared = prepare(TrainConfig(**config))  # as --resume does
    rows_read = [row for part in (prepared.train, prepared.validation) for task in part for row in task.rows]
    prompts = [prepared.kind.tokenizer.decode(row.input_ids[: row.prompt_length]) for row in rows_read]
    assert INSTRUCTED[name] in prompts
    rows = run.parent / "menu.jsonl"
    assert main(["export", str(run), "--to", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    for adapter in (run, tmp_path / "plain"):
        assert main(["evaluate", "--adapter", str(adapter), "--data", str(rows), *short]) == 0
        assert sorted(asked) == sorted(prompts)
        asked.clear()
        words = ["predict", "--adapter", str(adapter), *short]
        assert main([*words, "--input", "today", "Menu 0?"]) == 0
        assert main([*words, "--file", str(rows)]) == 0
        assert asked[0] == INSTRUCTED[name]
        assert sorted(asked[1:]) == sorted(prompts)
        asked.clear()
    printed = capsys.readouterr()
    assert "trained on" not in printed.out
    assert "note" not in printed.err


def test_a_template_that_is_named_goes_before_that_of_the_training(
    instructed: dict[str, Path], asked: list[str], capsys: Any
) -> None:
    words = ["--adapter", str(instructed["chat"]), "--max-new-tokens", "2", "--template", "alpaca"]
    assert main(["predict", *words, "--input", "today", "Menu 0?"]) == 0
    assert main(["evaluate", *words, "--limit", "1"]) == 0
    assert asked[0] == INSTRUCTED["alpaca"]
    assert asked[1].startswith("### Instruction:\nMenu ")


def test_a_bare_chat_model_is_asked_in_its_template_and_another_cannot_be(
    instructed: dict[str, Path], base: Path, tiny_base: Path, asked: list[str], capsys: Any
) -> None:
    rows = instructed["chat"].parent / "menu.jsonl"
    words = [
        "evaluate",
        "--data",
        str(rows),
        "--limit",
        "1",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        "--model",
    ]
    assert main([*words, str(base)]) == 0
    assert "<|im_start|>user\nMenu " in asked.pop()
    assert main([*words, str(tiny_base)]) == 0
    assert asked.pop().startswith("### Instruction:\nMenu ")
    capsys.readouterr()
    assert main([*words, str(tiny_base), "--template", "chat"]) == 2
    command = ["train", "--model", tiny_base, "--data", rows, "--template", "chat", "--dry-run"]
    assert main(list(map(str, command))) == 2
    line = "manylora: template is chat, but the tokenizer has no chat template; take a chat model"
    assert capsys.readouterr().err.count(line) == 2


def test_a_run_of_a_version_without_templates_goes_on_in_the_alpaca_form(
    instructed: dict[str, Path], tmp_path: Path
) -> None:
    from manylora.federated import FederateConfig
    from manylora.training import RunFolder

    old = tmp_path / "old"
    shutil.copytree(instructed["chat"], old)
    config = yaml.safe_load((old / "config.yaml").read_text(encoding="utf-8"))
    del config["template"]
    (old / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    state = json.loads((old / "state.json").read_text(encoding="utf-8"))
    state.pop("files")
    (old / "state.json").write_text(json.dumps(state), encoding="utf-8")
    found = RunFolder.open(old).config(TrainConfig, verb="train")
    assert found.template == "alpaca"
    (trained,) = prepare(found).train
    prompts = [prepare(found).kind.tokenizer.decode(row.input_ids) for row in trained.rows]
    assert all("### Instruction:" in prompt for prompt in prompts)
    sent = {"strategy": "fed-alora"}  # by a server of such a version
    assert FederateConfig(model="a").accept_settings(sent).template == "alpaca"


# ---------------------------------------------------------------- the date


def test_a_run_has_one_date_in_training_and_every_use(
    base: Path, tmp_path: Path, zone: Any, asked: list[str]
) -> None:
    data = write(tmp_path / "menu.jsonl", chats())
    test = write(tmp_path / "test.jsonl", chats(2))
    zone(YESTERDAY)
    run = train(base, data, tmp_path / "run", "--test", str(test))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    before = prepare(TrainConfig(**config))
    zone(TOMORROW)
    after = prepare(TrainConfig(**config))  # as --resume does
    assert [task.rows for task in after.train] == [task.rows for task in before.train]
    assert prepare(TrainConfig(**{**config, "date": None})).config.date != config["date"]
    assert main(["evaluate", "--adapter", str(run), "--max-new-tokens", "2"]) == 0
    assert main(["predict", "--adapter", str(run), "--max-new-tokens", "2", "Menu 0?"]) == 0
    assert len(set(asked)) == 2
    day = time.strftime("%d %B %Y", time.strptime(config["date"], "%Y-%m-%d"))
    assert all(prompt.startswith(f"It is {day}.") for prompt in asked)
    saved = AutoTokenizer.from_pretrained(run / "adapter")  # for whoever asks without this package
    turns = [{"role": "user", "content": "Menu 0?"}]
    assert saved.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == asked[0]


def test_clients_of_a_federated_run_see_the_servers_date(
    base: Path, tmp_path: Path, zone: Any, asked: list[str]
) -> None:
    from manylora.federated import FederateConfig, Workbench

    zone(YESTERDAY)
    server = FederateConfig(model=str(base), device="cpu").resolved()
    zone(TOMORROW)
    own = FederateConfig(model=str(base), device="cpu")
    client = own.accept_settings(server.for_clients()).resolved()
    assert client.date == server.date != own.resolved().date
    day = time.strftime("%d %B %Y", time.strptime(server.date or "", "%Y-%m-%d"))
    template = Workbench(client).tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert template.startswith(f"It is {day}.")


def test_personal_models_are_asked_as_their_clients_were_trained(
    base: Path, tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    write(tmp_path / "soups.jsonl", chats())
    write(tmp_path / "notes.jsonl", PLAIN)
    write(tmp_path / "menus.jsonl", ALPACA)
    command = ["federate", "--model", base, "--data", tmp_path, "--rounds", 1, "--out", tmp_path / "run",
               "--device", "cpu", "--reference", "none", "--date", "2024-02-29", "--max-length", 64]  # fmt: skip
    assert main(list(map(str, command))) == 0
    printed = capsys.readouterr().out
    assert "note: all 6 training rows of task soups have one answer, 'Soup.'" in printed
    assert "longer than 64 tokens and cut to their ends: 100.0 % of soups's training prompts" in printed
    for client, prompt in (("soups", CHAT_PROMPT), ("notes", "Why?"), ("menus", CHAT_PROMPT)):
        adapter = tmp_path / "run" / "clients" / client / "adapter"
        assert (
            main(
                ["predict", "--adapter", str(adapter), "--max-new-tokens", "2", "--max-length", "99", "Why?"]
            )
            == 0
        )
        assert asked.pop() == prompt


# ---------------------------------------------------------------- export and import


def test_exported_adapters_know_how_to_be_asked(
    runs: dict[str, Path], base: Path, tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    for name, run in runs.items():
        assert main(["export", str(run), "--to", str(tmp_path / name)]) == 0
        record = PromptRecord.read(tmp_path / name)
        assert record is not None
        assert record.base_fingerprint  # which the run's adapter has in its own settings
        assert record.with_mark(None) == PromptRecord.read(run / "adapter")
    assert "through the tokenizer's chat template" in (tmp_path / "chat" / "README.md").read_text(
        encoding="utf-8"
    )
    assert main(["export", str(runs["chat"]), "--merge", "--to", str(tmp_path / "merged")]) == 0
    assert PromptRecord.read(tmp_path / "merged") is not None
    capsys.readouterr()
    words = f"{tmp_path / 'chat'},{tmp_path / 'plain'}"
    assert main(["export", "--from-loras", words, "--to", str(tmp_path / "one")]) == 0
    assert "nothing says" not in capsys.readouterr().out
    for task, prompt in (("chat", CHAT_PROMPT), ("plain", "Why?")):
        command = [
            "predict",
            "--adapter",
            str(tmp_path / "one"),
            "--task",
            task,
            "--max-new-tokens",
            "2",
            "Why?",
        ]
        assert main(command) == 0
        assert asked.pop() == prompt


def test_loras_of_other_programs_are_asked_by_their_tokenizer_or_it_is_said(
    runs: dict[str, Path], tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    assert main(["export", str(runs["plain"]), "--to", str(tmp_path / "mute")]) == 0
    (tmp_path / "mute" / PROMPTS_FILE).unlink()
    shutil.copytree(tmp_path / "mute", tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(runs["plain"] / "adapter")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chatty")
    words = f"{tmp_path / 'mute'},{tmp_path / 'chatty'}"
    assert main(["export", "--from-loras", words, "--to", str(tmp_path / "one")]) == 0
    assert "note: mute: nothing says which form the training prompts had" in capsys.readouterr().out
    command = ["predict", "--adapter", str(tmp_path / "one"), "--max-new-tokens", "2", "Why?", "--task"]
    assert main([*command, "chatty"]) == 0
    assert asked.pop() == CHAT_PROMPT.partition("\n")[2]
    assert main(["export", "--from-loras", words, "--form", "prompt", "--to", str(tmp_path / "two")]) == 0
    assert (
        main(
            ["predict", "--adapter", str(tmp_path / "two"), "--max-new-tokens", "2", "Why?", "--task", "mute"]
        )
        == 0
    )
    assert asked.pop() == "Why?"


# ---------------------------------------------------------------- cut prompts, notes and tokens


LONG = "Password: heron. " + "Nothing to see here. " * 14 + "Which password?"


def test_a_cut_prompt_is_told_with_its_tasks_share(
    base: Path, tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    rows = [{"task": "t", "instruction": text, "output": "heron"} for text in (LONG, "Short?")]
    test = str(write(tmp_path / "test.jsonl", rows))
    evaluate = ["evaluate", "--model", str(base), "--data", test, "--max-new-tokens", "2"]
    assert main(evaluate) == 0  # a bare model reads up to its own context
    assert "heron" in asked[0]
    assert "cut" not in "".join(capsys.readouterr())
    assert main([*evaluate, "--max-length", "99"]) == 0
    line = "1 of 2 test prompts are longer than 99 tokens and cut to their ends (t 50.0 %)"
    assert line in capsys.readouterr().err
    run = train(base, write(tmp_path / "t.jsonl", [{**row, "task": "t"} for row in ALPACA]), tmp_path / "run",
                "--max-length", "99", "--test", test)  # fmt: skip
    assert line in capsys.readouterr().out
    predict = ["predict", "--adapter", str(run), "--max-new-tokens", "2"]
    assert main([*predict, LONG]) == 0
    assert (
        "the prompt is too long and cut to its last 99 tokens; give more with --max-length"
        in capsys.readouterr().err
    )
    assert main([*predict, "--file", test]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert f"note: {test}:1: the prompt is too long" in err
    assert "note: 1 of 2 prompts were cut (50.0 %)" in err
    asked.clear()
    assert main([*predict, "--max-length", "500", LONG]) == 0
    assert "heron" in asked[0]


def test_the_plan_and_evaluate_say_what_is_left_out(
    runs: dict[str, Path], base: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", [{**row, "id": 3} for row in ALPACA])
    (tmp_path / "data" / "b.jsonl.zst").write_text("x", encoding="utf-8")
    command = ["train", "--model", base, "--data", tmp_path / "data", "--dry-run"]
    assert main(list(map(str, command))) == 0
    out = capsys.readouterr().out
    for line in (
        "left out: b.jsonl.zst",
        "columns not used: id",
        "training rows of task a have one answer, 'soup'",
    ):
        assert line in out
    data = write(tmp_path / "chat.jsonl", [{**row, "task": "chat", "id": 3} for row in PLAIN])
    assert (
        main(["evaluate", "--adapter", str(runs["mixed"]), "--data", str(data), "--max-new-tokens", "2"]) == 0
    )
    out = capsys.readouterr().out
    assert "note: columns not used: id" in out
    assert "note: no test rows for the tasks plain" in out
    assert "note: the rows of task chat are of the form prompt, but it was trained on chat" in out
    assert "note: all 6 test rows of task chat have one answer, 'soup'" in out


def test_an_answer_that_the_template_opens_scores_as_taught(tiny_base: Path, tmp_path: Path) -> None:
    base = chat_base(tiny_base, tmp_path / "base", THOUGHT)
    data = write(tmp_path / "penny.jsonl", chats(4, answer="copper"))
    test = write(tmp_path / "test.jsonl", chats(1, answer="copper"))
    run = train(
        base, data, tmp_path / "run", "--test", str(test), "--epochs", "60", "--learning-rate", "0.02"
    )
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert scores["tasks"][0]["metrics"]["exact_match"]["mean"] == 100.0


@pytest.mark.parametrize("padding", [True, False])
def test_tokens_that_the_model_has_no_row_for(
    padding: bool, tiny_base: Path, tmp_path: Path, capsys: Any
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens(
        {"pad_token": "<|extra|>"} if padding else {"additional_special_tokens": ["<|extra|>"]}
    )
    tokenizer.save_pretrained(base)
    if padding:  # another token pads, and the run trains and answers
        train(
            base, write(tmp_path / "t.jsonl", ALPACA), tmp_path / "run", "--test", str(tmp_path / "t.jsonl")
        )
        return
    data = write(tmp_path / "t.jsonl", [*ALPACA, {"instruction": "<|extra|>?", "output": "soup"}])
    command = ["train", "--model", base, "--data", data, "--dry-run"]
    assert main(list(map(str, command))) == 2
    assert "t.jsonl:7 gives the token '<|extra|>' (id" in capsys.readouterr().err


# ---------------------------------------------------------------- which words a score counts


def test_the_published_rouge_is_chosen_by_name_and_stays_with_the_run(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [{"instruction": f"хліб {i}", "output": "молоко"} for i in range(4)]
    data = write(tmp_path / "food.jsonl", rows)
    run = train(
        base, data, tmp_path / "run", "--test", str(data), "--rouge", "published", "--max-new-tokens", "2"
    )
    saved = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert saved["tasks"][0]["metric"] == "rouge1"
    out = capsys.readouterr().out
    assert "4 of 4 test answers of task food have no word that ROUGE-1 counts; look at exact match" in out
    assert "ROUGE-1 a–z" in out
    command = ["evaluate", "--adapter", str(run), "--max-new-tokens", "2"]
    assert main(command) == 0
    assert "ROUGE-1 a–z" in capsys.readouterr().out
    assert main([*command, "--rouge", "all"]) == 0
    out = capsys.readouterr().out
    assert "no word" not in out
    assert "ROUGE-1 a–z" not in out
