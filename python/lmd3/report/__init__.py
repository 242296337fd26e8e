"""One offline page from a study's saved files."""

from lmd3.report.page import latex_of, render, write_report

__all__ = ["latex_of", "render", "write_report"]
