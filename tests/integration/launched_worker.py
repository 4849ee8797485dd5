"""One of two real processes: goes through several commands of `manylora train`; started by `test_launched.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from manylora.cli import main
from manylora.training.trainer import RunRecorder


def run(command: list[str], *, port: int, interrupted_at: int | None) -> int:
    """The command's exit code; as if the processes had just been started, with a meeting place of their own."""
    os.environ["MASTER_PORT"] = str(port)
    before = RunRecorder.on_step_end

    def on_step_end(self: RunRecorder, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == interrupted_at:
            raise KeyboardInterrupt
        return before(self, args, state, control, **more)

    RunRecorder.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        return main(command)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        RunRecorder.on_step_end = before  # type: ignore[method-assign]


def work(folder: Path, plan: list[dict[str, Any]]) -> None:
    """Run every command, then write the exit codes."""
    codes = [run(step["command"], port=step["port"], interrupted_at=step["interrupted_at"]) for step in plan]
    (folder / f"codes-{os.environ['RANK']}.json").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    work(Path(sys.argv[1]), json.loads(sys.argv[2]))
