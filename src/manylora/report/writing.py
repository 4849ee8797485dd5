"""From a folder that a verb wrote to its page."""

from __future__ import annotations

from pathlib import Path

from manylora.errors import RunError
from manylora.report.files import read_if_there, read_settings
from manylora.report.page import Page
from manylora.report.render import write_page
from manylora.report.weights import check_adapters


def write_report(folder: Path) -> Path:
    """Draw the page of a folder of `train`, `federate`, `analyze` or `compare`; what is missing in it is left out.

    Args:
        folder: holds study.json, analysis.json, or a run's config.yaml and state.json.

    Returns:
        Path of report.html; figures/ and tables/ stand beside it.

    Raises:
        RunError: the folder is none of these, or a file in it is broken.
        ModelError: an adapter in it holds values that are not finite.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    return write_page(build_page(folder), folder)


def build_page(folder: Path) -> Page:
    """The page of a folder as a value; see `write_report`."""
    kind = kind_of(folder)
    check_adapters(folder)
    if kind == "compare":
        from manylora.report.compare_page import compare_page as build
    elif kind == "analyze":
        from manylora.report.analyze_page import analyze_page as build
    elif kind == "federate":
        from manylora.report.federate_page import federate_page as build
    else:
        from manylora.report.train_page import train_page as build
    return build(folder)


def kind_of(folder: Path) -> str:
    """The verb that wrote `folder`.

    Raises:
        RunError: none did.
    """
    if (folder / "study.json").is_file():
        return "compare"
    if (folder / "analysis.json").is_file():
        return "analyze"
    if not (folder / "config.yaml").is_file() or not (folder / "state.json").is_file():
        raise RunError(
            f"{folder} has no page to draw: it holds neither study.json, analysis.json, nor a run's config.yaml and "
            "state.json. Give a folder that train, federate, analyze or compare wrote."
        )
    kind = read_if_there(folder / "state.json").get("kind")
    if kind in ("train", "federate"):
        return str(kind)
    return "federate" if "strategy" in read_settings(folder / "config.yaml") else "train"
