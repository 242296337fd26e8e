"""Relates the density of queries to a model's performance on them; works from saved tables alone."""

from lmd3.analysis.regression import Estimate, Fit
from lmd3.analysis.run import regress
from lmd3.analysis.study import Study

__all__ = ["Estimate", "Fit", "Study", "regress"]
