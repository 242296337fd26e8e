"""The files of an experiment (`lmd3 leak`, `pretrain`, `subsets`): one schema per table, for a report to
draw.

Every number that a report shows stands in one of these tables, in `plan.json` or in `analysis/summary.json`,
whose `verdicts` hold one plain sentence for each claim. Losses are nats per token; log densities are natural
logarithms; intervals are of 95 %. `primary` marks the primary bandwidth.
"""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

_TEXT, _NUMBER, _COUNT, _FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


# --- leak ---

#: `assignment.parquet`, one row per item. `block` and `cell` (its number in the block) are null where held
#: back.
ASSIGNMENT = _schema(
    id=_TEXT,
    group=_TEXT,
    block=_COUNT,
    cell=_COUNT,
    kind=_TEXT,
    dose=_COUNT,
    held_back=_FLAG,
    base_log_density=_NUMBER,
)

#: `slots.parquet`, one row per text leaked, with the placebo in its place in every control arm.
SLOTS = _schema(variant=_COUNT, item=_TEXT, kind=_TEXT, copies=_COUNT, placebos=pa.list_(_TEXT))

#: `variants.parquet`: the texts of items in blocks that an assignment may leak.
VARIANTS = _schema(item=_TEXT, kind=_TEXT, prompt=_TEXT, text=_TEXT)

#: `density.parquet`, one row per item and bandwidth. `delta` = treatment − control = `own` (owed to the
#: item's own variants) + `others`; `delta_base` = treatment − base alone.
CHANGES = _schema(
    id=_TEXT,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    log_density_base=_NUMBER,
    log_density_control=_NUMBER,
    log_density_treatment=_NUMBER,
    delta=_NUMBER,
    own=_NUMBER,
    others=_NUMBER,
    delta_base=_NUMBER,
)

#: `measures.parquet`, one row per item, arm (control, treatment), seed and outcome; `kind`: continuous,
#: binary.
MEASURES = _schema(id=_TEXT, arm=_TEXT, seed=_COUNT, outcome=_TEXT, value=_NUMBER, kind=_TEXT, tokens=_COUNT)

#: `loss.parquet`: loss curves of the training runs.
LOSS_CURVES = _schema(
    step=_COUNT, loss=_NUMBER, learning_rate=_NUMBER, seconds=_NUMBER, arm=_TEXT, seed=_COUNT
)

#: `analysis/cells.parquet`: change of every outcome by kind and dose (also `none` and `held back`), and
#: `effect`: its difference to the untreated of the same blocks; also of the placebo outcome
#: (`placebo:NAME`).
CELLS = _schema(
    outcome=_TEXT,
    kind=_TEXT,
    dose=_COUNT,
    n=_COUNT,
    mean=_NUMBER,
    std_error=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    effect=_NUMBER,
    effect_error=_NUMBER,
    effect_low=_NUMBER,
    effect_high=_NUMBER,
)

#: `analysis/responses.parquet`: claim A, the change of log density by kind and dose.
RESPONSES = _schema(
    kind=_TEXT,
    dose=_COUNT,
    n=_COUNT,
    median=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    share_positive=_NUMBER,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    primary=_FLAG,
)

#: `analysis/points.parquet`, one row per item: what the figures of Δ performance against Δ density show.
POINTS = _schema(
    id=_TEXT,
    outcome=_TEXT,
    kind=_TEXT,
    dose=_COUNT,
    held_back=_FLAG,
    delta_density=_NUMBER,
    delta=_NUMBER,
)

#: `analysis/slopes.parquet`: Δ outcome on Δ log density. Models: `overall`, `dose` (log(1 + dose) alone),
#: `dose and density`, `within cells` (an effect for each dose × kind), `within cells, baseline`. `seed_sd`:
#: standard deviation of the estimate over pairs of arms.
SLOPES = _schema(
    outcome=_TEXT,
    model=_TEXT,
    sample=_TEXT,
    term=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    statistic=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    r_squared=_NUMBER,
    n=_COUNT,
    covariance=_TEXT,
    seed_sd=_NUMBER,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    primary=_FLAG,
)

#: `analysis/randomisation.parquet`: tests by replayed assignments (`dose`, `density`, `spillover, …`), also
#: of the placebo outcome (`placebo:NAME`).
RANDOMISATION = _schema(
    outcome=_TEXT,
    test=_TEXT,
    statistic=_NUMBER,
    slope=_NUMBER,
    p_value=_NUMBER,
    replays=_COUNT,
    n=_COUNT,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    primary=_FLAG,
)

#: `analysis/spillover_bins.parquet`: untreated items in bins of their exposure less its mean over the
#: replays; `null_low`, `null_high`: 95 % of what the same bin shows under replayed assignments. Primary
#: bandwidth.
SPILLOVER_BINS = _schema(
    outcome=_TEXT,
    focal=_TEXT,
    x=_NUMBER,
    estimate=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    null_low=_NUMBER,
    null_high=_NUMBER,
    n=_COUNT,
)

#: `analysis/nulls.parquet`: the statistics of the replays, primary bandwidth.
NULLS = _schema(outcome=_TEXT, test=_TEXT, statistic=_NUMBER)

#: `analysis/spillover.parquet`: among untreated items. `p_value` by replays; `naive_p_value` takes the
#: exposure for random, which it is not.
SPILLOVER = _schema(
    outcome=_TEXT,
    focal=_TEXT,
    n=_COUNT,
    slope=_NUMBER,
    p_value=_NUMBER,
    naive_slope=_NUMBER,
    naive_p_value=_NUMBER,
    null_mean_exposure=_NUMBER,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    primary=_FLAG,
)

#: `analysis/mcnemar.parquet`: binary outcomes, paired, exact.
MCNEMAR = _schema(
    outcome=_TEXT,
    kind=_TEXT,
    dose=_COUNT,
    seed=_COUNT,
    n=_COUNT,
    control=_NUMBER,
    treatment=_NUMBER,
    gained=_COUNT,
    lost=_COUNT,
    p_value=_NUMBER,
)

# --- pretrain ---

#: `analysis/relations.parquet`: nats per token on log density. `sample`: trained, untrained, `trained
#: without G`; `effects`: within (an effect for each group) or pooled; `controls`: `base` (log tokens,
#: unigram cross-entropy) `+ typicality`, `+ max_cosine`; slope per standard deviation; `delta_r_squared`:
#: what log density adds.
RELATIONS = _schema(
    model=_TEXT,
    sample=_TEXT,
    effects=_TEXT,
    controls=_TEXT,
    kernel=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    cluster_error=_NUMBER,
    cluster_p=_NUMBER,
    r_squared=_NUMBER,
    delta_r_squared=_NUMBER,
    delta_within=_NUMBER,
    n=_COUNT,
    clusters=_COUNT,
    primary=_FLAG,
)

#: `analysis/groups.parquet`: the slope inside each group.
GROUP_SLOPES = _schema(
    model=_TEXT,
    group=_TEXT,
    trained=_FLAG,
    controls=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    p_value=_NUMBER,
    n=_COUNT,
    primary=_FLAG,
)

#: `analysis/contrasts.parquet`: differences of slopes: trained − untrained groups; after − before
#: finetuning.
CONTRASTS = _schema(
    contrast=_TEXT,
    controls=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    first=_NUMBER,
    first_error=_NUMBER,
    first_p=_NUMBER,
    second=_NUMBER,
    second_error=_NUMBER,
    second_p=_NUMBER,
    difference=_NUMBER,
    std_error=_NUMBER,
    p_value=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    n=_COUNT,
    primary=_FLAG,
)

#: `analysis/rivals.parquet`: other predictors in the same ladder, with their cost.
RIVALS = _schema(
    predictor=_TEXT,
    outcome=_TEXT,
    effects=_TEXT,
    estimate=_NUMBER,
    std_error=_NUMBER,
    p_value=_NUMBER,
    delta_r_squared=_NUMBER,
    delta_over_density=_NUMBER,
    density_over_it=_NUMBER,
    seconds=_NUMBER,
    seconds_per_query=_NUMBER,
    n=_COUNT,
)

# --- subsets ---

#: `analysis/scores.parquet`: rank correlations of predicted with measured changes, by predictor (log
#: density, max cosine, random). `score`: `effects` (across groups, mean over queries), `effects
#: pooled` (all pairs at once; chance is not 0), `lds` (across models, mean over queries).
#: `over_max_cosine`: by how much it is above that of max cosine, with its interval over the same models.
SCORES = _schema(
    predictor=_TEXT,
    bandwidth=_NUMBER,
    rule=_TEXT,
    score=_TEXT,
    estimate=_NUMBER,
    ci_low=_NUMBER,
    ci_high=_NUMBER,
    over_max_cosine=_NUMBER,
    over_low=_NUMBER,
    over_high=_NUMBER,
    n=_COUNT,
    models=_COUNT,
    primary=_FLAG,
)

#: `analysis/effects.parquet`, one row per query and group: the measured change of loss when the group is in
#: the training data, and what the predictors say of it.
EFFECTS = _schema(
    id=_TEXT, own_group=_TEXT, group=_TEXT, measured=_NUMBER, density=_NUMBER, max_cosine=_NUMBER
)


def as_table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """A frame as a table of a schema; columns that it lacks are null.

    Raises:
        KeyError: the frame has a column that the schema does not.
    """
    strange = set(map(str, frame.columns)) - set(schema.names)
    if strange:
        raise KeyError(f"columns without a place in the schema: {sorted(strange)}")
    columns = [
        pa.array(frame[field.name], field.type, from_pandas=True)
        if field.name in frame.columns
        else pa.nulls(len(frame), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
