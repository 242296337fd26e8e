"""The manners that all commands share: option types, output paths, progress, results and errors.

A command is a plain annotated function `def X(...)` in `cli/X.py`. It raises the errors of `lmd3.errors`,
which `main` turns into one line (or one JSON object) and an exit status; `--json`, `--quiet` and `--debug`
are added to every command that does not declare them.
"""

from __future__ import annotations

import json as _json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lmd3 import progress as _progress
from lmd3.errors import FileMissingError, OutputError

#: Exit statuses.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

# --- option types ---

OutOption = Annotated[Path, typer.Option("-o", "--out", help="What is written.", show_default=False)]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite an existing result.")]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object (also for errors)."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress and no notices.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads [default: all cores]."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all draws.")]

TextOption = Annotated[str, typer.Option("--text", metavar="COL", help="Column of the text.")]
IdOption = Annotated[
    str | None,
    typer.Option(
        "--id",
        metavar="COL",
        help="Column of the id [default: `id` if there is one, else the row number].",
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option("--group", metavar="COL", help="Column of the group (source)."),
]
WeightOption = Annotated[
    str | None,
    typer.Option("--weight", metavar="COL", help="Column of the weight, a number ≥ 0 [default: all 1]."),
]
OutcomeIdOption = Annotated[
    str | None,
    typer.Option("--outcome-id", metavar="COL", help="Id column of the outcomes."),
]
OutcomeValueOption = Annotated[
    str | None,
    typer.Option("--outcome-value", metavar="COL", help="Value column of the outcomes."),
]
KernelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kernel",
        metavar="K",
        help="exponential or gaussian; slower: vmf, laplacian, tophat, epanechnikov, linear; repeatable "
        "[default: exponential].",
    ),
]
BandwidthOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bandwidth",
        metavar="B",
        help="A number, ess=N, mass=N, mu=X, loo or @bandwidth.json; repeatable, the first is the primary "
        "one [default: ess=1000 ess=10 ess=100 ess=10000].",
    ),
]


# --- state of one run of the command line ---


@dataclass
class Manners:
    """How this run of the command line talks; read off the arguments before they are parsed, so that even a
    usage error keeps to it."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    arguments: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Iterable[str]) -> Manners:
        """The manners that a list of arguments asks for."""
        given = tuple(arguments)
        flags = set()
        for argument in given:
            if argument == "--":
                break
            flags.add(argument)
        return cls("--json" in flags, "--quiet" in flags, "--debug" in flags, given)


#: Those of the current run; set by `lmd3.cli.main`.
manners = Manners()


def limit_threads(threads: int | None) -> None:
    """Limits the threads of native code that is not told their number otherwise: text, linear algebra, torch.

    It has to come first in a command: each part reads the number once, when it is first used.
    """
    if threads is not None:
        for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(threads)


# --- talking ---


def progress(
    label: str, total: float | None = None, unit: str = ""
) -> AbstractContextManager[_progress.ProgressBar]:
    """A progress bar on stderr with the time left, silent under `--quiet`; `.update(done)` on it."""
    return (_progress.silent if manners.quiet else _progress.console)(label, total, unit)


def notice(message: str) -> None:
    """Says something worth knowing on stderr, unless `--quiet`."""
    if not manners.quiet:
        print(message, file=sys.stderr, flush=True)


def emit(result: Mapping[str, Any], json: bool | None = None, text: str | None = None) -> None:
    """Prints a result on stdout: as one JSON object, or `text`, or else one `name: value` line per entry.

    `json=None` follows the run's `--json`. Numbers that JSON lacks (NaN, infinities) become null.
    """
    if manners.json if json is None else json:
        print(_json.dumps(_plain(result), ensure_ascii=False))
        return
    print(lines_of(result) if text is None else text)


def _plain(value: Any) -> Any:
    """A value in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def lines_of(result: Mapping[str, Any]) -> str:
    width = max((len(str(key)) for key in result), default=0)
    return "\n".join(
        f"{str(key).replace('_', ' '):<{width}}  {_cell(value)}" for key, value in result.items()
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value) or "-"
    return str(value)


# --- paths ---


def prepare_output(path: str | Path, force: bool = False, *, results: Iterable[str] = ()) -> Path:
    """Checks before work that a result may be written at `path`; writes nothing itself.

    A file that exists is refused without `force`. A folder that exists is refused without `force` if it holds
    one of the files named by `results`, or anything at all where no `results` are named.

    Raises:
        OutputError: the result exists, or the place can't be written.
    """
    path = Path(path)
    if path.is_dir():
        names = list(results)
        taken = (
            [name for name in names if (path / name).exists()]
            if names
            else [entry.name for entry in path.iterdir()]
        )
        if taken and not force:
            raise OutputError(
                f"holds a result already ({taken[0]})",
                file=str(path),
                remedy="name another -o, or give --force",
            )
    elif path.exists() and not force:
        raise OutputError("exists already", file=str(path), remedy="name another -o, or give --force")
    place = path if path.is_dir() else path.absolute().parent
    while not place.exists():
        place = place.parent
    try:
        # os.access is not enough: root may write everywhere, except where nobody can.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"can't be written: {place}: {reason}", file=str(path)) from None
    return path


def existing(path: str | Path) -> Path:
    """A path that is there and readable, or a `FileMissingError`; of an address its copy in the cache."""
    from lmd3.store import remote

    if address := remote.address_of(path):
        return remote.stage(address, notice)
    path = Path(path)
    if not path.exists():
        raise FileMissingError("no such file or folder", file=str(path))
    if not os.access(path, os.R_OK):
        raise FileMissingError("not readable", file=str(path), remedy="check its permissions")
    return path


def is_texts(path: str | Path) -> bool:
    """Whether a path names texts (a text file, or a folder of such) rather than rows (a store, bare vectors).

    Raises:
        FileMissingError: there is nothing.
    """
    from lmd3 import texts

    return texts.is_texts(existing(path))


def read_outcomes(source: str, **columns: Any) -> Any:
    """An outcome table: of a table (id, value), or of an evaluation log, a pattern or a folder of such.

    Raises:
        FileMissingError: there is nothing.
    """
    import lmd3
    from lmd3.performance.eval_logs import from_eval_logs, harness_of

    path = Path(source)
    is_log = path.is_dir() or not path.exists() or harness_of(path) is not None
    if not is_log:
        return lmd3.read_outcomes(source, **columns)
    table = from_eval_logs(source)
    for line in _json.loads(table.schema.metadata[b"lmd3"])["notices"]:
        notice(line)
    return table
