"""What the commands of experiments share: option types, their texts, the model's name, and the answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmd3.cli._common import emit, existing

if TYPE_CHECKING:
    from lmd3.experiments.leak_inputs import Records

# --- option types ---

TextsArgument = Annotated[Path, typer.Argument(help="Table of texts with groups: .jsonl, .parquet or .csv.")]
TextGroupOption = Annotated[str, typer.Option("--group", metavar="COL", help="Column of the groups.")]
MaxTextsOption = Annotated[
    int | None, typer.Option("--max-texts", min=1, help="Most training texts of a group [default: all].")
]
VectorsOption = Annotated[
    Path | None, typer.Option("--vectors", metavar="FILE", help="Embeddings (.npy), one row per text.")
]
EncoderOption = Annotated[
    str,
    typer.Option("--encoder", metavar="NAME", help="hashing, or a sentence-transformers NAME or FOLDER."),
]
KernelOption = Annotated[str, typer.Option("--kernel", metavar="K", help="Kernel of the density.")]

EpochsOption = Annotated[float, typer.Option("--epochs", min=0.01, help="Times the texts are read.")]
WidthOption = Annotated[int, typer.Option("--width", min=8, help="Of a model from scratch.")]
LayersOption = Annotated[int, typer.Option("--layers", min=1, help="Of a model from scratch.")]
HeadsOption = Annotated[int, typer.Option("--heads", min=1, help="Of a model from scratch.")]
ContextOption = Annotated[int, typer.Option("--context", min=8, help="Tokens of a sequence.")]
VocabularyOption = Annotated[int, typer.Option("--vocabulary", min=257, help="Of a model from scratch.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Sequences of an update.")]


# --- setting up ---


def read_grouped(texts: Path, *, id: str | None, text: str, group: str, vectors: Path | None) -> Records:
    """The texts of a table with their groups, and their vectors where these are given."""
    from lmd3.experiments import leak_inputs

    return leak_inputs.read_records(texts, leak_inputs.Columns(id=id, text=text, group=group), vectors)


def locate_model(model: str) -> str:
    """The name of a built-in model, or the whole path of a model's folder.

    Raises:
        FileMissingError: there is no such folder.
    """
    from lmd3.experiments.leak import NGRAM, SCRATCH

    if model in (NGRAM, SCRATCH):
        return model
    existing(model)
    return str(Path(model).resolve())


def chosen_bandwidths(bandwidth: list[str] | None) -> dict[str, Any]:
    """The bandwidths given, as settings of an experiment; nothing where its own are to be taken."""
    return {} if bandwidth is None else {"bandwidths": tuple(bandwidth)}


# --- talking ---


def emit_verdicts(summary: Mapping[str, Any], out: Path) -> None:
    """Prints what came out: the verdicts by name, and where the tables are."""
    lines = [f"{name}: {sentence}" for name, sentence in summary["verdicts"].items()]
    emit({**summary, "out": out}, text="\n".join([*lines, "", f"Tables: {out / 'analysis'}"]))
