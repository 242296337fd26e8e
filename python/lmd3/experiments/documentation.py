"""Real text that every installation has: paragraphs of documentation strings.

The sources of the standard library and of the packages that lmd3 depends on are parsed with `ast`; nothing is
imported or executed. The paragraphs depend on the installed versions only, never on the machine.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lmd3.errors import FileMissingError
from lmd3.progress import ProgressFactory, silent

#: The packages read by default, in this order. All are installed with lmd3.
PACKAGES = ("stdlib", "numpy", "scipy", "pandas", "statsmodels")

#: Folders whose documentation strings describe tests, or programs beside the library.
_SKIPPED = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
)
_BLANK_LINE = re.compile(r"\n\s*\n")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Paragraph:
    """One paragraph of a documentation string.

    Attributes:
        id: package, path inside it and the paragraph's number in that file: `scipy/fft/_basic.py#12`.
        group: the package.
        text: the paragraph on one line.
    """

    id: str
    group: str
    text: str


def paragraphs(
    packages: tuple[str, ...] = PACKAGES,
    *,
    min_words: int = 12,
    max_words: int = 120,
    min_letters: float = 0.8,
    progress: ProgressFactory | None = None,
) -> list[Paragraph]:
    """Paragraphs of the documentation strings of installed packages, in the order of packages and paths.

    Args:
        packages: names of top-level packages; `stdlib` is the standard library.
        min_words: shorter paragraphs are left out.
        max_words: longer paragraphs are left out.
        min_letters: least share of letters and spaces, which leaves out tables, formulas and code.
        progress: shows the files read.

    Returns:
        The paragraphs, each text once: of equal ones the first stays.

    Raises:
        FileMissingError: a package is not installed, or without its sources.
    """
    files = [(package, path, name) for package in packages for path, name in _sources(package)]
    found: list[Paragraph] = []
    seen: set[str] = set()
    with (progress or silent)("reading documentation", len(files), "files") as bar, _parsing():
        for done, (package, path, name) in enumerate(files, 1):
            number = 0
            for documentation in _documentation(path):
                for paragraph in _BLANK_LINE.split(inspect.cleandoc(documentation)):
                    words = paragraph.split()
                    if not min_words <= len(words) <= max_words:
                        continue
                    text = " ".join(words)
                    letters = sum(character.isalpha() or character == " " for character in text)
                    if letters < min_letters * len(text) or text in seen:
                        continue
                    seen.add(text)
                    found.append(Paragraph(f"{package}/{name}#{number}", package, text))
                    number += 1
            bar.update(done)
    return found


def _sources(package: str) -> list[tuple[Path, str]]:
    """The Python files of a package with their names inside it, sorted by name."""
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        # For a top-level name this finds the package without importing it.
        specification = importlib.util.find_spec(package)
        if specification is None or specification.origin is None:
            raise FileMissingError(f"the package {package} is not installed", remedy=f"pip install {package}")
        root = Path(specification.origin).parent
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if _SKIPPED.isdisjoint(path.relative_to(root).parts)
    )
    if not files:
        raise FileMissingError(f"the sources of {package} are not installed", file=str(root))
    return [(path, name) for name, path in files]


def _documentation(path: Path) -> Iterator[str]:
    """The documentation strings of a file's module, classes and functions, those of inner ones too."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):  # deliberately broken examples
        return
    waiting: list[_Documented] = [module]
    while waiting:
        node = waiting.pop()
        match node.body:
            case [ast.Expr(value=ast.Constant(value=str(text))), *_]:
                yield text
        waiting += [child for child in reversed(node.body) if isinstance(child, _Documented)]


@contextmanager
def _parsing() -> Iterator[None]:
    """No warnings about the sources of others, and no garbage collection: syntax trees have no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()
