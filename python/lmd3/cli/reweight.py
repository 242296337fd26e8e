"""`lmd3 reweight`: densities under another sampling mixture of the groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd3.cli._common import ForceOption, OutOption, emit, existing, prepare_output


def reweight(
    density: Annotated[
        Path, typer.Argument(metavar="DENSITY", help="The folder of lmd3 density --by-group.")
    ],
    out: OutOption,
    mix: Annotated[
        Path,
        typer.Option("--mix", metavar="FILE", help='Weight of every group: {"web": 0.7, "code": 0.3}.'),
    ],
    force: ForceOption = False,
) -> None:
    """Densities under another sampling mixture of the groups, exactly and without a scan.

    Only the ratios of the weights count; every group must be named (0 leaves it out). The density under the
    mixture is the weighted mean of those under each group. Typicality and neighbours' shares, which these do
    not tell, become null.

    \b
    Examples:
      lmd3 reweight density/ --mix mix.json -o density-mixed/
    """
    from lmd3.density.reweighting import reweight as mixed
    from lmd3.results import DENSITY_FILES, DensityTable, read_json

    prepare_output(out, force, results=DENSITY_FILES)
    table = DensityTable.load(existing(density))
    found = mixed(table, read_json(existing(mix)))
    found.save(out)
    emit(
        {
            "out": out,
            "mix": found.run["mix"],
            "queries": found.queries.num_rows,
            "densities": found.density.num_rows,
            "zero_densities": sum(
                "zero" in (flags or "") and group is None
                for flags, group in zip(
                    found.density["flags"].to_pylist(), found.density["group"].to_pylist(), strict=True
                )
            ),
        }
    )
