"""The analysis of `lmd3 pretrain` from its files: nats per token on log density, beyond controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from lmd3 import experiment_files as files
from lmd3.analysis.regression import fit
from lmd3.errors import ParameterError
from lmd3.progress import ProgressFactory, silent
from lmd3.results import DensityTable, read_json, write_json, write_parquet

#: The controls of the ladder, and what may stand beside them.
CONTROLS = ("log_tokens", "unigram_cross_entropy")
LADDER: dict[str, tuple[str, ...]] = {
    "base": CONTROLS,
    "base + typicality": (*CONTROLS, "typicality"),
    "base + max_cosine": (*CONTROLS, "max_cosine"),
    "base + typicality + max_cosine": (*CONTROLS, "typicality", "max_cosine"),
}

#: The contrasts in words, with what their two slopes are of.
_CONTRASTS = {
    "trained − untrained": (
        "Groups trained on against groups that were not, per standard deviation of the first",
        "where trained",
        "where not",
    ),
    "finetuned, after − before": (
        "Texts of the groups left out, within groups, on the density under the finetuning texts",
        "after finetuning",
        "before",
    ),
    "finetuned, pooled, after − before": (
        "The same without group effects, where differences between groups weigh in",
        "after finetuning",
        "before",
    ),
}

#: Fewest texts of a group for a slope of its own.
FEWEST = 30


def load(folder: Path, which: str = "density") -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """One row per scored text: group, role, controls, `value:MODEL`, and `density:B` for every bandwidth.

    Returns:
        The frame and the bandwidths, the primary one first.
    """
    table = DensityTable.load(folder / which)
    split = pq.read_table(folder / "split.parquet").to_pandas().set_index("id")
    frame = pq.read_table(folder / "covariates.parquet").to_pandas().drop(columns=["group", "typicality"])
    queries = table.queries.to_pandas()[["id", "max_cosine", "typicality"]]
    frame = frame.merge(queries, on="id", validate="1:1")
    frame["group"] = split.loc[frame["id"], "group"].to_numpy()
    frame["role"] = split.loc[frame["id"], "role"].to_numpy()
    density = table.density.to_pandas()
    entries = table.run["bandwidths"]
    for number, entry in enumerate(entries):
        same = (density["bandwidth"] == entry["bandwidth"]) & (density["kernel"] == entry["kernel"])
        rows = density[same & density["group"].isna()].drop_duplicates("id").set_index("id")
        frame[f"density:{number}"] = rows.loc[frame["id"], "log_density"].to_numpy()
    outcomes = pq.read_table(folder / "outcomes.parquet").to_pandas()
    for model, rows in outcomes.groupby("model"):
        frame[f"value:{model}"] = rows.set_index("id").loc[frame["id"], "nats_per_token"].to_numpy()
    return frame, entries


def r_squared(frame: pd.DataFrame, terms: Sequence[str], effects: pd.Series[Any] | None) -> float:
    """R² of least squares of `value` on terms and group effects, of all variance."""
    columns = [np.ones(len(frame)), *(frame[term].to_numpy(dtype=np.float64) for term in terms)]
    if effects is not None:
        codes = pd.factorize(effects, sort=True)[0]
        columns += [(codes == code).astype(np.float64) for code in range(1, codes.max() + 1)]
    exog = np.column_stack(columns)
    y = frame["value"].to_numpy(dtype=np.float64)
    residual = y - exog @ np.linalg.lstsq(exog, y, rcond=None)[0]
    return 1 - float(residual @ residual) / float(((y - y.mean()) ** 2).sum())


def relation(
    frame: pd.DataFrame,
    predictor: NDArray[np.float64],
    controls: Sequence[str],
    within: bool,
    scale: float | None = None,
) -> dict[str, Any]:
    """Slope of `value` per standard deviation of a predictor beyond controls, with HC3 and clustered errors.

    Args:
        frame: `value`, the controls and `group`.
        predictor: (n,).
        controls: columns of the frame.
        within: an effect for every group.
        scale: what one unit of the slope is, if not the standard deviation.
    """
    frame = frame.reset_index(drop=True).copy()
    scale = float(predictor.std(ddof=1)) if scale is None else scale
    frame["x"] = (predictor - predictor.mean()) / scale
    groups = frame["group"]
    effects = groups if within and groups.nunique() > 1 else None
    found = fit(frame, ["x", *controls], binary=False, effects=effects)
    estimate = found["x"]
    entry = {name: value for name, value in estimate.to_dict().items() if name != "statistic"}
    before = r_squared(frame, controls, effects)
    after = r_squared(frame, ["x", *controls], effects)
    entry |= {"r_squared": after, "delta_r_squared": after - before, "n": found.n}
    between = r_squared(frame, [], effects)
    entry["delta_within"] = (after - before) / (1 - between)
    entry["clusters"] = int(groups.nunique())
    if groups.nunique() > 2:
        clustered = fit(frame, ["x", *controls], binary=False, effects=effects, clusters=groups)["x"]
        entry |= {"cluster_error": clustered.std_error, "cluster_p": clustered.p_value}
    return entry


def _samples(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    trained = frame[frame["role"] == "held_out"]
    yield "trained", trained
    untrained = frame[frame["role"] == "untrained"]
    if len(untrained):
        yield "untrained", untrained
    groups = sorted(trained["group"].unique())
    if len(groups) > 2:
        for group in groups:
            yield f"trained without {group}", trained[trained["group"] != group]


def analyse(folder: Path, *, progress: ProgressFactory | None = None) -> dict[str, Any]:
    """Analyses an experiment's files, writes the tables and returns the summary."""
    frame, entries = load(folder)
    out = folder / "analysis"
    out.mkdir(exist_ok=True)
    needed = [*LADDER["base + typicality + max_cosine"], "value:base"]
    dropped = int(frame[needed].isna().any(axis=1).sum())
    frame = frame.dropna(subset=needed)
    relations: list[dict[str, Any]] = []
    by_group: list[dict[str, Any]] = []
    contrasts: list[dict[str, Any]] = []
    with (progress or silent)("analysing", len(entries), "bandwidths") as bar:
        for number, entry in enumerate(entries):
            at = {name: entry[name] for name in ("kernel", "bandwidth", "rule")} | {"primary": number == 0}
            column = f"density:{number}"
            of = frame.assign(value=frame["value:base"])
            for sample, rows in _samples(of):
                for controls, terms in LADDER.items():
                    for within in (True, False):
                        if sample.startswith("trained without") and not within:
                            continue
                        try:
                            found = relation(rows, rows[column].to_numpy(), terms, within)
                        except ParameterError:
                            continue
                        about = {
                            "model": "base",
                            "sample": sample,
                            "effects": "within" if within else "pooled",
                            "controls": controls,
                        }
                        relations.append(about | found | at)
            for group, rows in of.groupby("group"):
                if len(rows) < FEWEST:
                    continue
                for controls in ("base", "base + max_cosine"):
                    found = relation(rows, rows[column].to_numpy(), LADDER[controls], False)
                    kept = ("estimate", "std_error", "p_value", "n")
                    by_group.append(
                        {
                            "model": "base",
                            "group": group,
                            "trained": bool((rows["role"] == "held_out").all()),
                            "controls": controls,
                        }
                        | {name: found[name] for name in kept}
                        | {name: at[name] for name in ("bandwidth", "rule", "primary")}
                    )
            contrasts += _trained_contrast(of, column, at)
            bar.update(number + 1)
    if (folder / "density-finetune").exists() and "value:finetuned" in frame:
        contrasts += _finetuned_contrast(folder)
    tables = {"relations": relations, "groups": by_group, "contrasts": contrasts}
    schemas = {"relations": files.RELATIONS, "groups": files.GROUP_SLOPES, "contrasts": files.CONTRASTS}
    for name, made in tables.items():
        if made:
            write_parquet(out / f"{name}.parquet", files.as_table(pd.DataFrame(made), schemas[name]))
    summary = {
        "texts": len(frame),
        "dropped_without_a_value": dropped,
        "counts": read_json(folder / "plan.json")["counts"],
        "primary_bandwidth": entries[0],
        "mean_loss": {
            model.removeprefix("value:"): {
                str(role): float(value) for role, value in frame.groupby("role")[model].mean().items()
            }
            for model in frame.columns
            if model.startswith("value:")
        },
        "verdicts": verdicts(pd.DataFrame(relations), pd.DataFrame(contrasts)),
    }
    write_json(out / "summary.json", summary)
    return summary


def _trained_contrast(frame: pd.DataFrame, column: str, at: dict[str, Any]) -> list[dict[str, Any]]:
    """Slope in the trained groups less that in the untrained, both per standard deviation of the trained."""
    trained, untrained = frame[frame["role"] == "held_out"], frame[frame["role"] == "untrained"]
    if len(untrained) < FEWEST:
        return []
    scale = float(trained[column].std(ddof=1))
    rows = []
    for controls in ("base", "base + typicality", "base + max_cosine"):
        first = relation(trained, trained[column].to_numpy(), LADDER[controls], True, scale)
        second = relation(untrained, untrained[column].to_numpy(), LADDER[controls], True, scale)
        gap = first["estimate"] - second["estimate"]
        error = float(np.hypot(first["std_error"], second["std_error"]))
        rows.append(_contrast("trained − untrained", controls, first, second, gap, error, at))
    return rows


def _finetuned_contrast(folder: Path) -> list[dict[str, Any]]:
    """Slopes on the density under the finetuning texts, after and before, over texts of the groups left out.

    The difference is that of the paired outcome, after − before, on the same density: nothing else differs.
    """
    frame, entries = load(folder, "density-finetune")
    frame = frame[frame["role"] == "untrained"].dropna(subset=[*CONTROLS, "value:base", "value:finetuned"])
    rows = []
    for number, entry in enumerate(entries):
        at = {name: entry[name] for name in ("kernel", "bandwidth", "rule")} | {"primary": number == 0}
        x = frame[f"density:{number}"].to_numpy()
        for name, within in (
            ("finetuned, after − before", True),
            ("finetuned, pooled, after − before", False),
        ):
            after = relation(frame.assign(value=frame["value:finetuned"]), x, CONTROLS, within)
            before = relation(frame.assign(value=frame["value:base"]), x, CONTROLS, within)
            change = frame.assign(value=frame["value:finetuned"] - frame["value:base"])
            paired = relation(change, x, CONTROLS, within)
            rows.append(_contrast(name, "base", after, before, paired["estimate"], paired["std_error"], at))
    return rows


def _contrast(
    name: str,
    controls: str,
    first: dict[str, Any],
    second: dict[str, Any],
    gap: float,
    error: float,
    at: dict[str, Any],
) -> dict[str, Any]:
    return {
        "contrast": name,
        "controls": controls,
        "first": first["estimate"],
        "first_error": first["std_error"],
        "first_p": first["p_value"],
        "second": second["estimate"],
        "second_error": second["std_error"],
        "second_p": second["p_value"],
        "difference": gap,
        "std_error": error,
        "p_value": float(2 * stats.norm.sf(abs(gap) / error)),
        "ci_low": gap - 1.959964 * error,
        "ci_high": gap + 1.959964 * error,
        "n": first["n"] if name.startswith("finetuned") else first["n"] + second["n"],
        "bandwidth": at["bandwidth"],
        "rule": at["rule"],
        "primary": at["primary"],
    }


def verdicts(relations: pd.DataFrame, contrasts: pd.DataFrame) -> dict[str, str]:
    """Claim C in plain sentences, at the primary bandwidth."""
    rows = relations[relations["primary"] & (relations["effects"] == "within")]

    def one(sample: str, controls: str) -> Any:
        found = rows[(rows["sample"] == sample) & (rows["controls"] == controls)]
        return found.iloc[0] if len(found) else None

    said = {}
    first, beyond = one("trained", "base + typicality"), one("trained", "base + max_cosine")
    if first is not None:
        holds = first["p_value"] <= 0.05 and first["estimate"] < 0
        said["C"] = (
            f"Perplexity is {'' if holds else 'not seen to be '}explained by density within the trained"
            f" groups: {first['estimate']:+.3f} [{first['ci_low']:+.3f}, {first['ci_high']:+.3f}] nats per"
            " token for a standard deviation beyond length, word frequency and typicality,"
            f" ΔR² {first['delta_r_squared']:.3f}"
            + (
                f"; beyond the nearest text's cosine ΔR² {beyond['delta_r_squared']:.3f}."
                if beyond is not None
                else "."
            )
        )
    other = one("untrained", "base + max_cosine")
    if other is not None:
        said["untrained groups"] = (
            f"In groups never trained on, beyond the nearest text's cosine: {other['estimate']:+.3f}"
            f" [{other['ci_low']:+.3f}, {other['ci_high']:+.3f}], ΔR² {other['delta_r_squared']:.4f}."
        )
    if len(contrasts):
        rows_of: Any = contrasts[contrasts["primary"]].itertuples()
        for row in rows_of:
            if row.controls == "base":
                of, first, second = _CONTRASTS.get(str(row.contrast), (str(row.contrast), "", ""))
                clear = row.ci_low > 0 or row.ci_high < 0
                said[str(row.contrast)] = (
                    f"{of}: slope {row.first:+.3f} {first} against {row.second:+.3f} {second}, difference"
                    f" {row.difference:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
                    f"{'' if clear else ': not told apart'}."
                )
    return said
