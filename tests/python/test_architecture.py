"""The import law of the project, read off its sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUST = ROOT / "src"
PYTHON = ROOT / "python" / "lmd3"


def rust_code(source: str) -> str:
    """Rust source without comments and without the text of string literals."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
    return pattern.sub(lambda found: '""' if found.group().startswith('"') else " ", source)


# What a file must not name, unless it is one of (or lies in one of) the places given.
RUST_LAW = {
    "intrinsics": (r"\b(?:std|core)::(?:\{[^}]*\b)?arch\b|\bis_\w+_feature_detected\b", ("simd/",)),
    "memory maps": (r"\bmemmap2\b", ("store/mapping.rs",)),
    "rayon": (r"\brayon\b", ("scan/", "index/", "text/", "estimate/")),
    "pyo3": (r"\b(?:pyo3|numpy)::|\buse (?:pyo3|numpy)\b", ("python/",)),
    "unsafe": (r"\bunsafe\b", ("simd/", "store/mapping.rs", "store/reading.rs", "python/")),
}


def allowed(name: str, places: tuple[str, ...]) -> bool:
    """Whether a file (by its path below the root) is one of the places, or in one of those ending in `/`."""
    return any(name.startswith(place) if place.endswith("/") else name == place for place in places)


def rust_files() -> list[Path]:
    return sorted(RUST.rglob("*.rs"))


@pytest.mark.parametrize("what", RUST_LAW)
def test_rust_names_only_where_it_may(what: str) -> None:
    pattern, places = RUST_LAW[what]
    assert rust_files()
    offenders = [
        name
        for name, path in ((path.relative_to(RUST).as_posix(), path) for path in rust_files())
        if not allowed(name, places) and re.search(pattern, rust_code(path.read_text(encoding="utf-8")))
    ]
    assert not offenders, f"{what} belong into {', '.join(places)}"


def test_lib_has_no_logic() -> None:
    assert not re.search(
        r"\bfn\b|\bimpl\b|\bstruct\b", rust_code((RUST / "lib.rs").read_text(encoding="utf-8"))
    )


def test_every_unsafe_block_says_why() -> None:
    silent = []
    for path in rust_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if re.search(r"\bunsafe\s*(?:\{|impl\b)", rust_code(line)):
                before = "\n".join(lines[max(0, number - 8) : number + 1])
                if "SAFETY:" not in before:
                    silent.append(f"{path.relative_to(ROOT)}:{number + 1}")
    assert not silent


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The full names of all modules and names that a module imports, at any depth of its code."""
    package = module.split(".")
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = (
                    [*package[: len(package) - level], *([origin] if origin else [])]
                    if level
                    else [origin or ""]
                )
                yield from (".".join([*base, alias.name]) for alias in names)


def module_level(tree: ast.Module) -> ast.Module:
    """The statements that run at import: not those of functions, nor those for type checkers only."""
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return ast.Module(body, [])


def python_files() -> list[tuple[str, ast.Module, str]]:
    """(path below the package, syntax tree, dotted name in which relative imports resolve) of every file."""
    found = []
    for path in sorted(PYTHON.rglob("*.py")):
        name = path.relative_to(PYTHON).as_posix()
        dotted = "lmd3." + name.removesuffix(".py").replace("/", ".")
        found.append((name, ast.parse(path.read_text(encoding="utf-8")), dotted))
    assert found
    return found


def named(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


NATIVE = ("lmd3._lmd3",)
TORCH = ("torch", "transformers", "sentence_transformers", "tokenizers", "safetensors")
PYTHON_LAW = {
    "the extension": (
        NATIVE,
        (
            "store/",
            "density/scan.py",
            "index.py",
            "system.py",
            "covariates.py",
            "encoders/hashing.py",
            "performance/ngram.py",
        ),
    ),
    "torch": (TORCH, ("encoders/", "performance/", "experiments/")),
    "ray": (("ray",), ("executors/ray.py",)),
    "unpickling": (("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"), ()),
}


@pytest.mark.parametrize("what", PYTHON_LAW)
def test_python_imports_only_where_it_may(what: str) -> None:
    modules, places = PYTHON_LAW[what]
    offenders = {
        name
        for name, tree, dotted in python_files()
        if not allowed(name, places) and any(named(found, modules) for found in imports(tree, dotted))
    }
    assert not offenders, f"{what} may be imported in {places or 'no file'} only"


def test_results_stand_on_nothing() -> None:
    for name, tree, dotted in python_files():
        if name == "results.py":
            own = {found for found in imports(tree, dotted) if named(found, ("lmd3",))}
            assert all(named(found, ("lmd3.errors",)) for found in own)
            return
    pytest.fail("results.py is missing")


def test_commands_import_their_parts_lazily() -> None:
    light = ("typer", "lmd3.cli", "lmd3.errors", "lmd3.progress")
    for name, tree, dotted in python_files():
        if name.startswith("cli/"):
            for found in imports(module_level(tree), dotted):
                root = found.split(".")[0]
                assert root in sys.stdlib_module_names or named(found, light), f"{name} imports {found}"


def test_no_code_from_models_and_no_pickles_are_run() -> None:
    offenders = []
    for name, tree, _ in python_files():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    offenders.append((name, node.arg))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec"):
                offenders.append((name, ast.unparse(node.func)))
    assert not offenders


@pytest.mark.parametrize("module", ["lmd3.analysis", "lmd3.report", "lmd3.results"])
def test_saved_files_are_analysed_without_the_extension_and_torch(module: str) -> None:
    program = (
        "import sys\n"
        "class Absent:\n"  # None in sys.modules would do, but scipy looks there for torch
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('lmd3._lmd3', 'torch', 'transformers', 'sentence_transformers', 'ray'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"import {module}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# The checks themselves.


@pytest.mark.parametrize(
    ("source", "what", "found"),
    [
        ("use std::arch::x86_64::*;", "intrinsics", True),
        ("use std::{arch::x86_64, fmt};", "intrinsics", True),
        ("// std::arch is elsewhere", "intrinsics", False),
        ('let s = "pyo3::x";', "pyo3", False),
        ("fn f() { pyo3::x() }", "pyo3", True),
        ("/* rayon\n */ fn f() {}", "rayon", False),
        ("use rayon::prelude::*;", "rayon", True),
    ],
)
def test_rust_law_sees(source: str, what: str, found: bool) -> None:
    assert bool(re.search(RUST_LAW[what][0], rust_code(source))) is found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("def f():\n    from lmd3 import _lmd3", {"lmd3._lmd3"}),
        ("from . import _lmd3", {"lmd3._lmd3"}),
        ("from .store import Store", {"lmd3.store.Store"}),
    ],
)
def test_python_law_sees(source: str, expected: set[str]) -> None:
    assert set(imports(ast.parse(source), "lmd3.texts")) == expected
