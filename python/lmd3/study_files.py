"""The files of a study (`lmd3 analyze -o DIR`): one schema per table, with the meaning of every column.

Every number that a report shows stands in one of these tables or in `summary.json`. Slopes are per standard
deviation of the predictor (log odds for a binary outcome, units of the outcome else); intervals are of 95 %.
A table that a study could not make (no groups, no vectors, exact densities …) is not written; `summary.json`
says why under `not_computed`.
"""

from __future__ import annotations

import pyarrow as pa

_TEXT, _NUMBER, _COUNT, _FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


#: Models and their terms; the headline rows of the primary specification first. `inference` says where
#: p-value and interval come from: `normal`, `t(df)`, or a wild bootstrap with its draws and weights. The
#: models: `headline` (primary), `headline_sandwich` (the same with the plain sandwich, where a bootstrap
#: decides), `headline_cr2` (CR2 with Satterthwaite's df), `headline_linear` (linear-probability check of a
#: binary outcome), `headline_pooled` / `headline_within` (the other form), `headline_hc` (HC3, HC0),
#: `naive` (model-based errors), `alone`, `without_typicality`, `with_typicality`, `with_max_cosine`; and the
#: named alternatives `mixed`, `mixed_slopes`, `conditional_logit`, `gee`, `quantile_0.25` …, `gam`.
COEFFICIENTS = _schema(
    model=_TEXT,
    outcome=_TEXT,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    term=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    statistic=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    covariance=_TEXT,
    n=_COUNT,
    clusters=_COUNT,
    primary=_FLAG,
    inference=_TEXT,
    df=_NUMBER,
)

#: Steps M0 … M4. `shuffle_null`: 95 % point of the in-sample gain when the added columns are shuffled.
LADDER = _schema(
    step=_TEXT,
    terms=_TEXT,
    r_squared=_NUMBER,
    delta=_NUMBER,
    shuffle_null=_NUMBER,
    out_of_group_delta=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
)

#: R² (McFadden's for a binary outcome) of the full model split among blocks of terms by Shapley's value.
SHAPLEY = _schema(block=_TEXT, terms=_TEXT, r_squared=_NUMBER, share=_NUMBER)

#: One row per query analysed. `predictor_residual`, `outcome_residual`: what the other terms (and group
#: effects) leave of each: the added-variable plot, whose slope is the headline slope (working residuals for
#: a binary outcome, with `working_weight`). `influence`: change of the slope, in its standard errors, when
#: the query is left out. `support_p`: conformal p-value of the query's log density; `unsupported`: below .05
#: after false-discovery control. `std_error`: of the log density.
POINTS = _schema(
    id=_TEXT,
    value=_NUMBER,
    predictor=_NUMBER,
    typicality=_NUMBER,
    max_cosine=_NUMBER,
    group=_TEXT,
    cluster=_TEXT,
    fitted=_NUMBER,
    residual=_NUMBER,
    predictor_residual=_NUMBER,
    outcome_residual=_NUMBER,
    working_weight=_NUMBER,
    leverage=_NUMBER,
    influence=_NUMBER,
    std_error=_NUMBER,
    local_dimension=_NUMBER,
    duplicates=_COUNT,
    support_p=_NUMBER,
    unsupported=_FLAG,
)

#: The specification curve: every kernel × bandwidth × subset × set of controls × form. `p_max_t` is adjusted
#: for the whole family by the maximum of |t|, `p_by` by Benjamini and Yekutieli's false-discovery rate.
SPECIFICATIONS = _schema(
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    ess_median=_NUMBER,
    subset=_TEXT,
    controls=_TEXT,
    terms=_TEXT,
    form=_TEXT,
    covariance=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    statistic=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    n=_COUNT,
    clusters=_COUNT,
    p_max_t=_NUMBER,
    p_by=_NUMBER,
    primary=_FLAG,
)

#: Slope of the headline model inside each group. `kind`: `group`, or `random effects` (the mean over groups,
#: DerSimonian–Laird with Hartung–Knapp's interval) and `prediction` (where a new group's slope would lie).
#: `shrunken`: empirical Bayes.
FOREST = _schema(
    kind=_TEXT,
    group=_TEXT,
    n=_COUNT,
    outcome_mean=_NUMBER,
    estimate=_NUMBER,
    std_error=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    p_value=_NUMBER,
    p_by=_NUMBER,
    shrunken=_NUMBER,
    weight=_NUMBER,
)

#: Headline slope with one cluster or group left out (one-step for a binary outcome).
LEFT_OUT = _schema(kind=_TEXT, name=_TEXT, n=_COUNT, estimate=_NUMBER, change=_NUMBER)

#: Charts of the model's fit. `chart`: `qq` (x normal quantile, y standardised residual), `scale_location`
#: (x fitted, y mean √|standardised residual| in bins), `calibration` (x mean predicted, y share observed, by
#: tenths), `smooth` (x predictor, y partial effect of a spline with its interval).
CHECKS = _schema(chart=_TEXT, x=_NUMBER, y=_NUMBER, ci_low=_NUMBER, ci_high=_NUMBER, n=_COUNT)

#: Slopes under negative controls, draw by draw. `control`: `shuffle` (the density shuffled within groups),
#: `random embedding` (densities of vectors that mean nothing).
SHUFFLES = _schema(control=_TEXT, draw=_COUNT, estimate=_NUMBER, statistic=_NUMBER)

#: Groups of the corpus by what performance depends on, ranked. `mean_share`: of the kernel sum over the
#: queries. `estimate` …: slope of the group's share (per SD) in the joint model of total log density and all
#: shares but the largest, group effects and controls in; `change_*`: slope of the exact leave-one-group-out
#: change log f − log f₋g in a model of its own beside the controls and log f₋g; `r_squared_gain`: of that
#: model.
SUBSETS = _schema(
    rank=_COUNT,
    subset=_TEXT,
    mean_share=_NUMBER,
    mean_change=_NUMBER,
    estimate=_NUMBER,
    std_error=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    p_by=_NUMBER,
    change_estimate=_NUMBER,
    change_std_error=_NUMBER,
    change_p_value=_NUMBER,
    change_ci_low=_NUMBER,
    change_ci_high=_NUMBER,
    change_p_by=_NUMBER,
    r_squared_gain=_NUMBER,
)

#: Per query and group of the corpus: the group's log density and share of the kernel sum, and the log density
#: of the corpus without the group, exact from sums.
SUBSET_CHANGES = _schema(
    id=_TEXT, subset=_TEXT, log_density=_NUMBER, share=_NUMBER, log_density_without=_NUMBER, change=_NUMBER
)

#: SIMEX: the headline slope with errors of (1 + added) times the variance, and the extrapolation.
SIMEX = _schema(added=_NUMBER, estimate=_NUMBER, std_error=_NUMBER, extrapolation=_FLAG)

#: Contrasts: slopes of either side and their difference, clustered jointly. `contrast`: `model` (another
#: model's outcomes on the same queries) or `corpus` (log f_train − log f_reference as the predictor).
CONTRASTS = _schema(
    contrast=_TEXT,
    side=_TEXT,
    form=_TEXT,
    scale=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    statistic=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    covariance=_TEXT,
    n=_COUNT,
    clusters=_COUNT,
)

#: Before and after an intervention (`--before`). `test`: `mean change` (t interval over clusters, p-value by
#: sign flips of clusters), `McNemar` (exact; `estimate` and its interval are the odds gained : lost),
#: `randomisation` (slope on log(1 + dose), dose permuted inside groups; `statistic` is a correlation),
#: `mediation` (per unit of log(1 + dose)). `part`: all queries, those of one dose, or a path.
PAIRED = _schema(
    test=_TEXT,
    part=_TEXT,
    n=_COUNT,
    before=_NUMBER,
    after=_NUMBER,
    gained=_NUMBER,
    lost=_NUMBER,
    estimate=_NUMBER,
    std_error=_NUMBER,
    statistic=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
)

#: Training texts that are among the neighbours of most queries.
HUBS = _schema(neighbor_id=_TEXT, neighbor_group=_TEXT, occurrences=_COUNT)

#: File name → schema. `bins.parquet` and `neighbors.parquet` as before.
STUDY = {
    "coefficients": COEFFICIENTS,
    "ladder": LADDER,
    "shapley": SHAPLEY,
    "points": POINTS,
    "specifications": SPECIFICATIONS,
    "forest": FOREST,
    "left_out": LEFT_OUT,
    "checks": CHECKS,
    "shuffles": SHUFFLES,
    "subsets": SUBSETS,
    "subset_changes": SUBSET_CHANGES,
    "simex": SIMEX,
    "contrasts": CONTRASTS,
    "paired": PAIRED,
    "hubs": HUBS,
}

#: What `summary.json` holds beside `answer` (three sentences), `notices`, `outcome`, `kind`, `counts`,
#: `scales`, `bandwidths`, `ladder`, `controls_*`, `explained_by`, `unmatched`:
SUMMARY = {
    "primary": "the headline slope: estimate, std_error, p_value, ci_*, inference, df, covariance, clusters, "
    "effective_clusters, smallest_detectable_effect, equivalence_bound, r_squared, tjur_r_squared, "
    "average_marginal_effect with ci_*, odds_ratio, form, family, unit, controls, n",
    "by_controls": "the primary slope as controls are added: controls, added, estimate, p_value, ci_*",
    "inference": "few: bool, effective_clusters, draws, weights; beside: the sandwich, CR2 and (binary) the "
    "linear-probability check",
    "clusters": "source: column, text, kmeans or none; column, count, sizes",
    "moran": "Moran's I of the residuals over the nearest queries: value, expected, p_value, n, draws",
    "multiplicity": "looks, method (freedman-lane or sign-flips), draws, p_max_t of the primary, shares of "
    "specifications with the primary's sign and below .05",
    "negative_controls": "shuffle and random_embedding: draws, mean, sd, low, high (95 % range), p_value",
    "heterogeneity": "between groups: q, df, p_value, i_squared, tau",
    "measurement": "reliability (partial), marginal_reliability, mean_std_error, regression_calibration and "
    "simex (estimate, std_error, ci_*), advice",
    "paired": "before and after: mean_change, mcnemar, randomisation; mediation (indirect, direct, total "
    "with intervals, share, rho_zero, sensitivity, statsmodels), or why it is refused",
    "support": "alpha, calibration_rows, unsupported, share",
    "diagnostics": "hubness (skewness, largest), anisotropy, local_dimension, duplicates, influence, "
    "corpus_distance (mmd, sliced_wasserstein with p_values)",
    "adjustment": "the declared graph: role of every control, adjusted, refused",
    "not_computed": "table or fact -> why",
}
