"""The command line: `lmd3 COMMAND …`, one file per command, registered here.

Exit status: 0 done, 1 failed at work, 2 refused before work (a bad option or input), 130 interrupted.
"""

from __future__ import annotations

import functools
import importlib
import keyword
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, get_type_hints

import typer

from lmd3.cli import _common
from lmd3.errors import Lmd3Error

#: The commands in the order of the work. Each is the function of the same name in the module of that name
#: (`-` being `_` there, and `_` behind a word of Python's).
COMMANDS = (
    "study",
    "encode",
    "density",
    "merge",
    "bandwidth",
    "covariates",
    "perplexity",
    "eval-logs",
    "analyze",
    "report",
    "inspect",
    "verify",
    "convert",
    "import",
    "append",
    "reweight",
    "index",
    "leak",
    "pretrain",
    "subsets",
    "demo",
    "info",
)

app = typer.Typer(name="lmd3", rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)

# The base class of all mistakes in the arguments; typer exports its subclass only.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _print_version(wanted: bool) -> None:
    if wanted:
        from lmd3 import __version__

        print(f"lmd3 {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _lmd3(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Does a language model do well where its training data is dense?

    \b
    lmd3 demo                                        see it work, offline, in two minutes
    lmd3 study --corpus train.jsonl --queries test.jsonl --outcomes results.jsonl -o study
    lmd3 COMMAND --help                              options and examples of a command
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def _with_manners(function: Callable[..., None]) -> Callable[..., None]:
    """The command with `--json`, `--quiet` and `--debug` added where it does not declare them itself."""
    hints = get_type_hints(function, include_extras=True)
    declared = signature(function)
    parameters = [p.replace(annotation=hints[p.name]) for p in declared.parameters.values()]
    added = {"json": _common.JsonOption, "quiet": _common.QuietOption, "debug": _common.DebugOption}
    added = {name: kind for name, kind in added.items() if name not in hints}
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in added.items()
    ]

    @functools.wraps(function)
    def command(**arguments: Any) -> None:
        function(**{name: value for name, value in arguments.items() if name not in added})

    command.__signature__ = declared.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


def _register() -> None:
    for name in COMMANDS:
        function = name.replace("-", "_") + ("_" if keyword.iskeyword(name) else "")
        module_name = f"lmd3.cli.{function}"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            continue
        app.command(name)(_with_manners(getattr(module, function)))


_register()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; `arguments` default to those of the process."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    manners = _common.manners
    asked = _common.Manners.of(arguments)
    manners.json, manners.quiet, manners.debug = asked.json, asked.quiet, asked.debug
    manners.arguments = asked.arguments
    try:
        status = app(arguments, prog_name="lmd3", standalone_mode=False)
        sys.stdout.flush()
        if status == _common.INTERRUPTED:
            raise KeyboardInterrupt
        return status if isinstance(status, int) else _common.DONE
    except Lmd3Error as error:
        return _fail(error.to_dict(), str(error), _common.REFUSED if error.refused else _common.FAILED)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        remedy = f"{context.command_path if context else 'lmd3'} --help"
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return _fail(_error("UsageError", message, remedy), f"{message} (try {remedy})", _common.REFUSED)
    except (KeyboardInterrupt, typer.Abort):
        message = "interrupted"
        return _fail(_error("Interrupted", message, None), message, _common.INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone (`lmd3 … | head`): keep the interpreter from complaining at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _common.FAILED
    except OSError as error:
        reason = error.strerror or str(error)
        failure = _error("WorkError", reason, None) | {"file": error.filename}
        return _fail(failure, f"{error.filename}: {reason}" if error.filename else reason, _common.FAILED)
    except MemoryError:
        message = "out of memory"
        return _fail(_error("WorkError", message, None), message, _common.FAILED)
    except Exception as error:
        message = f"internal error: {type(error).__name__}: {error}"
        remedy = "run it again with --debug and report what it prints"
        return _fail(_error("InternalError", message, remedy), f"{message} ({remedy})", _common.FAILED)


def _error(kind: str, message: str, remedy: str | None) -> dict[str, Any]:
    return {"kind": kind, "message": message, "file": None, "row": None, "remedy": remedy}


def _fail(error: dict[str, Any], line: str, status: int) -> int:
    if _common.manners.debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if _common.manners.json:
        _common.emit({"error": error}, json=True)
    else:
        print(f"lmd3: {line}", file=sys.stderr)
    return status


def run() -> None:
    """The console script."""
    from lmd3.system import end_where_files_are_cut_short

    end_where_files_are_cut_short(_common.Manners.of(sys.argv[1:]).json)
    sys.exit(main())
