"""Pages that people look at: one self-contained HTML file per run, its figures and tables beside it.

Reads files of a run folder alone, through the records of the rooms that wrote them, so a page can be drawn anew at any
time:
`python -m manylora.report FOLDER`.
"""

from manylora.report.page import Figure, Page, Plot, Section, write_page
from manylora.report.writing import write_report

__all__ = ["Figure", "Page", "Plot", "Section", "write_page", "write_report"]
