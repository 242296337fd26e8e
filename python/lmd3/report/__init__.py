"""One offline page from a study's or an experiment's saved files."""

from lmd3.report.experiment import render_experiment, write_experiment
from lmd3.report.page import latex_of, render, write_report

__all__ = ["latex_of", "render", "render_experiment", "write_experiment", "write_report"]
