"""What `manylora export` refuses, and that nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exports import only_line
from manylora.cli import main
from processes import killed_process

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


CASES: dict[str, tuple[list[str], list[str]]] = {
    "no target": (["{task}"], ["--to is missing"]),
    "an empty target": (["{task}", "--to", ""], ["to is empty"]),
    "a target inside a file": (
        ["{task}", "--to", "{plain}/adapter_config.json/out"],
        ["adapter_config.json/out cannot be written (Not a directory)", "choose another --to"],
    ),
    "nothing to export": (["--to", "out"], ["manylora export runs/train-001 --to exported", "--from-loras"]),
    "both ways": (["{task}", "--from-loras", "x", "--to", "out"], ["either", "--from-loras"]),
    "missing run": (["runs/nothing", "--to", "out"], ["runs/nothing", "neither a run folder"]),
    "a plain LoRA": (["{plain}", "--to", "out"], ["LORA adapter", "needs no export"]),
    "unknown task": (
        ["{task}", "--to", "out", "--tasks", "swap,poems"],
        ["'poems'", "first_word, last_word, swap"],
    ),
    "tasks of one LoRA": (["{uniform}", "--to", "out", "--tasks", "swap"], ["--tasks swap", "every task"]),
    "rows for an exact export": (
        ["{task}", "--to", "out", "--data", "{data}"],
        ["exported exactly", "leave out --data"],
    ),
    "a loss for an exact export": (["{uniform}", "--to", "out", "--max-loss", "2"], ["leave out --max-loss"]),
    "rows for an import": (
        ["--from-loras", "{plain}", "--to", "out", "--limit", "3"],
        ["leave it out", "--limit"],
    ),
    "existing folder": (["{task}", "--to", "{base}"], ["exists already", "--to"]),
    "token router without data": (["{token}", "--to", "out"], ["token router", "--data"]),
    "unknown task of the data": (
        ["{token}", "--to", "out", "--data", "{data}", "--tasks", "poems"],
        ["'poems'", "swap"],
    ),
    "missing data": (["{token}", "--to", "out", "--data", "nowhere"], ["nowhere", "does not exist"]),
    "no such base": (["{task}", "--to", "out", "--model", "./none"], ["./none"]),
    "negative loss": (["{token}", "--to", "out", "--max-loss", "-1"], ["max_loss is -1"]),
    "no rows": (["{token}", "--to", "out", "--limit", "0"], ["limit is 0"]),
    "no LoRA folder": (["--from-loras", "nowhere", "--to", "out"], ["nowhere", "adapter_config.json"]),
    "not a LoRA": (["--from-loras", "{task}", "--to", "out"], ["MANYLORA adapter, not a plain LoRA"]),
    "the same name": (["--from-loras", "{plain},{plain}", "--to", "out"], ["Two LoRAs", "one="]),
    "one name for several": (["--from-loras", "a={exported}", "--to", "out"], ["3 LoRAs"]),
    "unequal bases": (
        ["--from-loras", "{plain},{elsewhere}", "--to", "out"],
        ["base_model_name_or_path", "elsewhere"],
    ),
    "a misspelt option": (["{task}", "--to", "out", "--task", "swap"], ["--task", "--tasks"]),
}


@pytest.fixture(scope="module")
def words(adapters: dict[str, Path], tiny_base: Path, small_data: Path) -> dict[str, str]:
    root = adapters["task"].parent
    assert main(["export", str(adapters["single"]), "--to", str(root / "plain")]) == 0
    assert main(["export", str(adapters["task"]), "--to", str(root / "exported")]) == 0
    shutil.copytree(root / "plain", root / "other" / "elsewhere")
    path = root / "other" / "elsewhere" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "elsewhere/model"})
    )
    places = {"base": tiny_base, "data": small_data / "train", "elsewhere": path.parent, **adapters}
    return {
        **{name: str(root / name) for name in ("plain", "exported")},
        **{k: str(v) for k, v in places.items()},
    }


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, words: dict[str, str], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, wanted = CASES[case]
    capsys.readouterr()
    assert main(["export", *(word.format(**words) for word in arguments)]) == 2
    line = only_line(capsys)
    for text in wanted:
        assert text in line
    assert not list(in_empty_folder.iterdir()), "something was written"


def test_a_killed_export_leaves_no_folder_and_the_next_one_works(
    adapters: dict[str, Path], in_empty_folder: Path
) -> None:
    command = ["export", adapters["task"], "--to", "out", "--merge"]
    killed_process(command, in_empty_folder, before="out")
    partial = Path("out.partial")
    assert list(partial.rglob("*.safetensors"))
    assert not Path("out").exists()
    assert main(["export", str(adapters["task"]), "--to", "out"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["out"]
