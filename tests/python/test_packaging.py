"""What is shipped: the wheel, what it needs, how fast it starts."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "sentence_transformers", "ray", "pandas", "scipy", "statsmodels", "plotly")


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, check=True, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_import_is_quick_and_light() -> None:
    program = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import lmd3\n"
        "print(time.perf_counter() - start)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    seconds, heavy = zip(
        *(run(sys.executable, "-c", program).stdout.splitlines() for _ in range(3)), strict=True
    )
    assert min(map(float, seconds)) <= 0.3
    assert set(heavy) == {"[]"}


def test_command_line_starts_without_heavy_libraries() -> None:
    heavy = (*HEAVY, "numpy", "pyarrow")
    program = f"import sys, lmd3.cli; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(sys.executable, "-c", program).stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import lmd3

    assert [name for name in lmd3.__all__ if getattr(lmd3, name, None) is None] == []
    assert set(lmd3.__all__) <= set(dir(lmd3))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lmd3.nothing


def test_development_versions_are_pinned_without_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines and all("==" in line and "://" not in line and not line.startswith("-") for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["encode"]]
    asked += [name for group in project["dependency-groups"].values() for name in group]
    assert {requirement.split(">")[0] for requirement in asked} <= pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make wheel` builds it."""
    if shutil.which("cargo") is None:
        pytest.skip("no Rust toolchain")
    folder = tmp_path_factory.mktemp("dist")
    maturin = Path(sys.executable).with_name("maturin")
    environment = {name: value for name, value in os.environ.items() if name != "RUSTFLAGS"}
    run(maturin, "build", "--release", "--quiet", "--out", folder, cwd=ROOT, env=environment)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_is_small_complete_and_for_every_python_since_311(wheel: Path) -> None:
    assert wheel.stat().st_size <= 10e6
    assert "-cp311-abi3-" in wheel.name
    assert sys.platform != "linux" or "manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(metadata_name))
    expected = {path.relative_to(ROOT / "python").as_posix() for path in (ROOT / "python").rglob("*.py")}
    assert expected <= set(names)
    assert {"lmd3/py.typed", "lmd3/_lmd3.pyi", "lmd3/_lmd3.abi3.so"} <= set(names)
    assert {name.rsplit("/", 1)[-1] for name in names if "/licenses/" in name} == {
        "LICENSE-MIT",
        "LICENSE-APACHE",
    }
    assert not [name for name in names if name.startswith("tests")]
    assert metadata["License-Expression"] == "MIT OR Apache-2.0"
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [
        line for line in needed if line.startswith(("torch", "transformers", "sentence-transformers", "ray"))
    ]


@pytest.fixture(scope="module")
def empty_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a new environment that holds the wheel and what it needs, as pinned."""
    folder = tmp_path_factory.mktemp("empty")
    uv = Path(sys.executable).with_name("uv")
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    binaries = folder / "venv" / "bin"
    constraints = ROOT / "constraints.txt"
    run(uv, "pip", "install", "--quiet", "--python", binaries / "python", "--constraint", constraints, wheel)
    return binaries


def test_wheel_works_in_an_empty_environment(empty_environment: Path, tmp_path: Path) -> None:
    facts = json.loads(run(empty_environment / "lmd3", "info", "--json", cwd=tmp_path).stdout)
    assert facts["torch"] is None and facts["simd_level"]
    texts = tmp_path / "texts.txt"
    texts.write_text("one two three\nfour five six\n", encoding="utf-8")
    run(empty_environment / "lmd3", "encode", texts, "-o", tmp_path / "store", cwd=tmp_path)
    assert (tmp_path / "store" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "arguments",
    [["encode", "texts.txt", "--model", "MiniLM"], ["perplexity", "texts.txt", "--model", "gpt2"]],
)
def test_neural_models_without_torch_say_what_to_install(
    arguments: list[str], empty_environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("one two three\n", encoding="utf-8")
    command = [empty_environment / "lmd3", *arguments, "-o", tmp_path / "out.parquet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "lmd3[encode]" in result.stderr
    assert not (tmp_path / "out.parquet").exists()


def test_a_slow_start_is_noticed() -> None:
    """The whole of `lmd3 --version`, the interpreter's own start included."""
    start = time.perf_counter()
    run(sys.executable, "-m", "lmd3", "--version")
    assert time.perf_counter() - start < 2.0


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_another_folder(empty_environment: Path, tmp_path: Path) -> None:
    result = json.loads(run(empty_environment / "lmd3", "demo", "--json", cwd=tmp_path).stdout)
    assert (tmp_path / str(result["report"])).is_file()
    probe = "import importlib.util as util; print(util.find_spec('torch'))"
    assert run(empty_environment / "python", "-c", probe).stdout.strip() == "None"
