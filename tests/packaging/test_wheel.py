"""The wheel as a user gets it: built from the sdist, installed in a clean environment, complete.

Guards the src layout with its links: a component folder that setuptools does not follow, a data file that is left
behind, or a `--version` that needs more than the standard library, would all go unnoticed in an editable install.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import kvbaton

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parent.parent.parent
COMPONENTS = ("cluster", "decode_worker", "engine", "kernels", "kvtransfer", "prefill_worker", "router")
DATA_SUFFIXES = (".py", ".json", ".c", ".h", ".yaml")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed. Without PYTHONPATH, whose packages pip takes for installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist, as `python -m build` does."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=ROOT)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def expected_files() -> set[str]:
    """Modules and data files of the component folders, and what lies beside their links, as paths below `kvbaton/`."""
    package = ROOT / "src" / "kvbaton"
    return {path.name for path in package.iterdir() if path.is_file()} | {
        str(path.relative_to(ROOT))
        for component in COMPONENTS
        for path in (ROOT / component).rglob("*")
        if path.suffix in DATA_SUFFIXES and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_module_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
    inside = {name.removeprefix("kvbaton/") for name in names if name.startswith("kvbaton/")}
    assert inside == expected_files()
    assert {"__init__.py", "py.typed", "cluster/cli.py"} <= inside
    tops = {name.split("/")[0] for name in names}
    assert tops == {"kvbaton", f"kvbaton-{kvbaton.__version__}.dist-info"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_holds_sources_and_licence(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/kvbaton/py.typed"} <= names
    assert {f"src/kvbaton/{name}" for name in expected_files()} <= names


def test_wheel_runs_in_a_clean_environment(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """`kvbaton --version` and `--help` must not need torch or Ray: the environment holds nothing but the wheel."""
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", distributions[1], cwd=tmp_path)
    command = tmp_path / "clean" / "bin" / "kvbaton"
    assert run(command, "--version", cwd=tmp_path).strip() == f"kvbaton {kvbaton.__version__}"
    assert "serve" in run(command, "--help", cwd=tmp_path)
    location = run(python, "-c", "import kvbaton.cluster.cli as c; print(c.__file__)", cwd=tmp_path)
    assert location.strip().startswith(str(tmp_path))
