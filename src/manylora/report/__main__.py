"""`python -m manylora.report FOLDER …` draws the pages of finished folders anew."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from manylora.errors import ManyLoraError
from manylora.report import write_report


def main(folders: Sequence[str]) -> int:
    """Draw each folder's page; 2 where one cannot be drawn."""
    if not folders or folders[0] in ("-h", "--help"):
        print("usage: python -m manylora.report FOLDER …    draws report.html of runs and studies anew")
        return 0 if folders else 2
    for folder in folders:
        try:
            print(write_report(Path(folder)))
        except (ManyLoraError, OSError) as error:
            print(f"manylora: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
