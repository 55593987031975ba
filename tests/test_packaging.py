"""Dependencies are declared once, the wheel holds the package and nothing else, and the build's commands are in order."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from notebooks import PACKAGE, ROOT

RUNTIME_AT_IMPORT = {"torch", "numpy", "einops", "sentencepiece", "safetensors", "tqdm", "filelock"}
EXTRAS = [f"{name}_requirements" for name in ("dev", "hub", "scale", "eval", "data")]


def plain(requirement: str) -> str:
    "The name in a requirement, in the spelling that all spellings share."
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def declared(settings: dict[str, str], *keys: str) -> list[str]:
    return [r for key in keys for r in settings[key].split()]


def test_dependencies_are_declared_once(settings: dict[str, str]):
    names = [plain(r) for r in declared(settings, "requirements", *EXTRAS)]
    assert len(names) == len(set(names)), "a dependency stands in one list"
    assert RUNTIME_AT_IMPORT <= {plain(r) for r in declared(settings, "requirements")}
    for other in ("pyproject.toml", "setup.py"):
        assert "torch" not in (ROOT / other).read_text(encoding="utf-8"), f"{other} repeats what settings.ini declares"


def test_constraints_pin_what_is_declared(settings: dict[str, str]):
    lines = [x for x in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", x) for x in lines), "one `name==version` a line: no paths, no addresses"
    pinned = {plain(x): x.partition("==")[2] for x in lines}
    wanted = {plain(r) for r in declared(settings, "requirements", *EXTRAS) if plain(r) != "tensorboard"}
    assert wanted <= pinned.keys(), f"not pinned: {wanted - pinned.keys()}"
    assert pinned["torch"] == "2.13.0" and pinned["nbdev"] == "2.4.14"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The wheel, built from a copy, since a build leaves files beside its sources."
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("building the wheel without a network needs setuptools 77 or newer in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in (PACKAGE, "nbs", "tests", "tools"):  # folders beside the package must not slip in
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "katex"))
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", folder],
                          cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_only_the_package(wheel: Path, settings: dict[str, str]):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.partition("/")[0] for n in names} == {PACKAGE, f"{PACKAGE}-{settings['version']}.dist-info"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / PACKAGE).rglob("*.py")}
    assert {n for n in names if n.startswith(f"{PACKAGE}/")} == modules, "every module, in every sub-package"
    folders = {p.parent for p in (ROOT / PACKAGE).rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == [], "a folder without __init__.py is left out of the wheel"


def test_wheel_declares_what_settings_declare(wheel: Path, settings: dict[str, str]):
    with zipfile.ZipFile(wheel) as archive:
        info = f"{PACKAGE}-{settings['version']}.dist-info"
        text, scripts = (archive.read(f"{info}/{name}").decode() for name in ("METADATA", "entry_points.txt"))
        assert any(n.startswith(info) and n.endswith("LICENSE") for n in archive.namelist())
    assert "llama2 = llama2_nbdev.cli:main" in scripts
    found = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*(?:; extra == ['\"](\w+)['\"])?", text, re.M)
    assert {plain(n) for n, extra in found if not extra} == {plain(r) for r in declared(settings, "requirements")}
    assert {extra for _, extra in found if extra} == {"dev", "hub", "scale", "eval", "data"}
    assert f"Requires-Python: >={settings['min_python']}" in text


def test_wheel_imports_without_the_notebooks(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import {PACKAGE}, {PACKAGE}.model.llama as m; print({PACKAGE}.__file__); m.ModelConfig.preset('7b')"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_targets():
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "VENV"}
    text = subprocess.run(["make"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    wanted = {"run", "test", "test-full", "lab", "docs", "chat", "clean"}
    assert wanted <= set(re.findall(r"make ([\w-]+)", text)), "plain `make` lists the targets"
    planned = subprocess.run(["make", "-n", "run"], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert "llama2 run --preset tiny </dev/null" in planned, "`make run` never waits for input"


def test_ci_runs_the_readme_command():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^exec make test$", text, re.M) and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert subprocess.run(["sh", "-n", ROOT / ".ci" / "run"]).returncode == 0
