"""Comparisons: another model, a reference corpus, parts of the corpus, outcomes before an intervention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lmd3.analysis import contrast as _contrast
from lmd3.analysis import evidence as _evidence
from lmd3.analysis import paired as _paired
from lmd3.analysis import subsets as _subsets
from lmd3.analysis.slope import Data, slope
from lmd3.analysis.work import Work
from lmd3.errors import ParameterError


def contrasts(work: Work, clusters: np.ndarray | None, files: Mapping[str, str | None]) -> dict[str, Any]:
    """Contrasts with another model's outcomes, and with density under a reference corpus."""
    sample, options = work.sample, work.options
    headline = work.fits["headline"]
    found: list[pd.DataFrame] = []
    form = "within" if work.is_within else "pooled"
    if options.contrast is not None:
        other = options.contrast.to_pandas().set_index("id")["value"].reindex(sample.raw["id"])
        at = work.rows(work.is_within) & np.isfinite(other.to_numpy(dtype=np.float64))
        if at.sum() < len(headline.x[0]) + 10:
            raise ParameterError(
                "too few queries have both outcomes", remedy="give outcomes on the same queries"
            )
        name = str(options.contrast["outcome"][0].as_py())
        names = (sample.outcome, name)
        if name == sample.outcome:
            stems = [Path(files.get(side) or side).stem for side in ("outcomes", "contrast")]
            names = (stems[0], stems[1]) if stems[0] != stems[1] else (name, f"{name} (other)")
        kept = at[work.rows(work.is_within)]
        x = headline.x[kept]
        first = headline.slope.data.take(kept)
        second = Data(other.to_numpy(dtype=np.float64)[at], sample.binary, first.weights, first.effects)
        codes = None if clusters is None else np.unique(clusters[kept], return_inverse=True)[1]
        if sample.cluster_source in ("kmeans", "text", "none"):
            codes = None
        found.append(
            _contrast.models(
                first,
                second,
                x,
                codes,
                names,
                sample.cluster_name if codes is not None else None,
                form,
                options.draws,
                options.seed,
            )
        )
        sample.counts["contrasted"] = int(at.sum())
    if options.plain is not None:
        plain = options.plain.frame.set_index("id")[options.plain.specifications[0].column]
        values = plain.reindex(sample.raw["id"]).to_numpy(dtype=np.float64)
        at = work.rows(work.is_within)
        x = headline.x.copy()
        x[:, -1] = (values[at] - values.mean()) / values.std(ddof=1)
        sides = {
            "density less reference": (headline.slope, headline.x),
            "density alone": (slope(headline.slope.data, x), x),
        }
        for side, (of, design) in sides.items():
            row = {
                "contrast": "corpus",
                "side": side,
                "form": form,
                "scale": "log odds" if sample.binary else "outcome",
                **_evidence.judged(of, design, clusters, options.draws, options.seed),
                "covariance": headline.covariance,
                "n": headline.n,
                "clusters": headline.clusters,
            }
            found.append(pd.DataFrame([row]))
        if not work.is_within:
            sample.notices.append(
                "A contrast with a reference corpus without group effects can turn its sign: name the groups "
                "(--within)."
            )
    if found:
        table = pd.concat(found, ignore_index=True)
        work.tables["contrasts"] = table
        differences = table[table["side"].str.contains(" − ")]
        judged = differences[differences["side"].str.contains("bootstrap")]
        chosen = judged if len(judged) else differences
        return {"contrast": chosen.iloc[0].to_dict()} if len(chosen) else {}
    work.absent["contrasts"] = "no other model (--contrast) and no reference corpus (--reference) given"
    return {}


def parts_of_corpus(work: Work, clusters: np.ndarray | None) -> dict[str, Any]:
    """Densities per group of the corpus."""
    sample, s = work.sample, work.sample.specifications[0]
    density = work.predictors.density
    if density is None or s.kernel is None or s.bandwidth is None:
        work.absent["subsets"] = "no densities per group of the corpus (lmd3 density --by-group)"
        return {}
    ids = list(sample.raw["id"])
    sums = _subsets.sums_of(density, ids, s.kernel, s.bandwidth)
    if sums is None:
        work.absent["subsets"] = "the corpus has one group only"
        return {}
    work.tables["subset_changes"] = _subsets.changes(sums, ids)
    headline = work.fits["headline"]
    at = work.rows(work.is_within)
    part = _subsets.Sums(sums.names, sums.log_sums[at], sums.rows)
    table, facts = _subsets.evidence(
        headline.slope.data,
        headline.x[:, :-1],
        part,
        clusters,
        draws=min(work.options.draws, _subsets.DRAWS),
        seed=work.options.seed,
    )
    work.tables["subsets"] = table
    top = table.iloc[0] if len(table) else None
    if top is not None and top["r_squared_gain"] == top["r_squared_gain"]:
        facts["first"] = {
            "subset": top["subset"],
            "estimate": float(top["change_estimate"]),
            "p_by": float(top["change_p_by"]),
        }
    facts["below_05_by"] = int((table["change_p_by"] < 0.05).sum())
    return {"subsets": facts}


def before_and_after(work: Work) -> dict[str, Any]:
    """Tests of a study of changes: mean change, McNemar, randomisation, mediation."""
    sample, options = work.sample, work.options
    if options.paired is None or sample.joined is None:
        work.absent["paired"] = "no outcomes before an intervention (--before)"
        return {}
    frame = sample.joined
    raw = frame[["value", _paired.BEFORE, _paired.AFTER]].astype(np.float64)
    dose = change = None
    if _paired.LOG_DOSE in frame.columns:
        dose = frame[_paired.LOG_DOSE].to_numpy(dtype=np.float64)
    s = sample.specifications[0]
    if s.predictor == _paired.CHANGE:
        change = sample.raw[s.column].to_numpy(dtype=np.float64)
    else:
        sample.notices.append(
            "The densities before the intervention are not given (--density-before): the predictor is the "
            "log density after it, not its change."
        )
    held = [c for c in sample.controls.names if c != _paired.LOG_DOSE]
    whole = np.isin(raw[[_paired.BEFORE, _paired.AFTER]].to_numpy(), (0.0, 1.0)).all()
    table, facts = _paired.tests(
        raw,
        bool(options.paired and whole),
        dose,
        change,
        sample.frame[held].to_numpy(dtype=np.float64),
        sample.codes(work.everything),
        sample.effects(work.everything),
        options.draws,
        options.seed,
    )
    work.tables["paired"] = table
    return {"paired": facts}
