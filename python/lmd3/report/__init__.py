"""One offline page from a study's saved files."""

from lmd3.report.page import render, write_report

__all__ = ["render", "write_report"]
