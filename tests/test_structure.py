"""The layout of the project: notebooks and modules match, imports point downward, sizes stay small, traps are tested."""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from notebooks import PACKAGE, ROOT, Notebook, find, read, rooms

ROOMS = rooms()
BOOKS = [read(p) for p in find()]
NUMBER_OF = {f"{PACKAGE}.{nb.module}": nb.number for nb in ROOMS if nb.module}
PARTS = {1: "model", 2: "pretraining", 3: "finetuning", 4: "safety", 5: "discussion"}  # floors 0 and 6 write to the top
each_book = pytest.mark.parametrize("nb", BOOKS, ids=lambda nb: nb.name)
each_room = pytest.mark.parametrize("nb", ROOMS, ids=lambda nb: nb.name)


def test_one_notebook_writes_one_module():
    counts = Counter(nb.module for nb in BOOKS if nb.module)
    assert [name for name, n in counts.items() if n > 1] == [], "two notebooks with one default_exp overwrite each other"
    twice = [nb.name for nb in BOOKS if sum("default_exp" in c.directives for c in nb.cells) > 1]
    assert not twice, f"a notebook names its module once: {twice}"


def test_numbers_are_unique():
    counts = Counter(nb.number for nb in ROOMS if nb.module)  # a study may share the number of its method
    assert [n for n, times in counts.items() if times > 1] == [], "the number orders the imports, so each is used once"


def test_every_module_comes_from_a_notebook():
    made = {p.relative_to(ROOT / PACKAGE).with_suffix("").as_posix().replace("/", ".")
            for p in (ROOT / PACKAGE).rglob("*.py") if p.stem not in ("__init__", "_modidx")}
    wanted = {nb.module for nb in BOOKS if nb.module}
    assert made - wanted == set(), "stale modules: no notebook exports them"
    assert wanted - made == set(), "run nbdev_export: these modules are missing"


@each_room
def test_floor_number_and_folder_agree(nb: Notebook):
    assert nb.number is not None, "the file name starts with two digits"
    assert nb.floor is not None, "the folder starts with the floor's digit"
    below = [other.name for other in ROOMS if other.floor < nb.floor and other.number >= nb.number]
    assert not below, f"a lower floor has lower numbers: {below}"
    if nb.module:
        part = nb.module.partition(".")[0]
        assert part == PARTS[nb.floor] if nb.floor in PARTS else part not in PARTS.values(), "each floor writes its own part"


def imported(nb: Notebook) -> set[str]:
    "The modules of our rooms that the exported code of a notebook imports, anywhere in it."
    names = set()
    for node in (n for c in nb.cells if c.exported for n in ast.walk(c.tree)):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{nb.name} imports relatively (line {node.lineno}); name {PACKAGE} in full")
    assert not any(n.startswith(f"{PACKAGE}.solutions") for n in names), "a room must not import a solution"
    return {n for n in names if n in NUMBER_OF}


@each_room
def test_imports_point_downward(nb: Notebook):
    upward = {name: NUMBER_OF[name] for name in imported(nb) if NUMBER_OF[name] >= nb.number}
    assert upward == {}, f"notebook {nb.number} may import only from lower numbers"


@each_book
def test_exported_code_does_not_need_the_notebook_tools(nb: Notebook):
    "fastcore and nbdev serve notebooks only; exported code imports neither, anywhere in it."
    nodes = [n for c in nb.cells if c.exported for n in ast.walk(c.tree)]
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names] + [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    found = {n for n in names if n.partition(".")[0] in ("fastcore", "nbdev", "execnb", "ghapi")}
    assert not found, f"exported code imports {found}"


def test_the_import_check_sees_an_upward_import():
    "A planted import must be found, or the test above proves nothing."
    low, high = min(NUMBER_OF.items(), key=lambda kv: kv[1]), max(NUMBER_OF.items(), key=lambda kv: kv[1])
    nb = read(find()[0])
    nb.cells[1].kind, nb.cells[1].source = "code", f"#| export\ndef f():\n    from {high[0]} import x\n"
    assert high[0] in imported(nb) and high[1] > low[1]


def import_alone(*args: str) -> dict[str, str]:
    "What tools/import_alone.py reports: the modules that do not import, with their errors."
    done = subprocess.run([sys.executable, ROOT / "tools" / "import_alone.py", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MODULES = sorted(f"{PACKAGE}.{nb.module}" for nb in BOOKS if nb.module)


def test_every_module_imports_in_a_fresh_process():
    assert import_alone(*MODULES) == {}


def test_every_module_imports_with_the_minimal_packages():
    found = import_alone("--minimal", *MODULES, "pandas", "matplotlib", "fastcore")
    assert found.keys() >= {"pandas", "matplotlib", "fastcore"}, "the hook refuses nothing, so this test proves nothing"
    assert found.keys() - {"pandas", "matplotlib", "fastcore"} == set(), found


def code_lines(source: str) -> int:
    "How many lines of code a cell has, its directives not counted."
    return sum(not line.startswith("#|") for line in source.strip().splitlines())


@each_book
def test_cells_are_short(nb: Notebook):
    long = {c.index: code_lines(c.source) for c in nb.cells if c.kind == "code" and code_lines(c.source) > 25}
    assert not long, f"cells of more than 25 lines, as {{cell: lines}}: {long}"


@each_book
def test_notebooks_are_small(nb: Notebook):
    assert nb.path.stat().st_size <= 200 * 1024, "a notebook has at most 200 KB; use fewer or smaller figures"


FORBIDDEN_OUTPUT = {
    "an absolute path": r"(?<![\w.:/])/(?:home|root|tmp|Users|usr|opt|work|mnt|private|var)/\w|\b[A-Z]:\\\\",
    "a timing": r"\b\d+\.\d+\s?s\b|\b\d+(\.\d+)?\s?(ms|µs|seconds|secs?)\b|Wall time|CPU times|\d\s?(it|tok|tokens)/s\b",
    "a progress bar": r"\d%\|[\s█▏▎▍▌▋▊▉#]*\||█{3,}",
}


@each_book
def test_outputs_are_clean(nb: Notebook):
    errors = [c.index for c in nb.cells for o in c.outputs if o["output_type"] == "error"]
    assert not errors, f"cells with a stored error: {errors}"
    bars = [c.index for c in nb.cells for o in c.outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not bars, f"cells with a stored widget (a progress bar?): {bars}"
    for what, pattern in FORBIDDEN_OUTPUT.items():
        if what == "a timing" and nb.name == "index.ipynb":
            continue  # its map of the notebooks shows the recorded times
        found = {c.index: m[0] for c in nb.cells if (m := re.search(pattern, c.output_text()))}
        assert found == {}, f"outputs with {what}, as {{cell: text}}"


@pytest.mark.parametrize("what, text", [("an absolute path", "saved to /home/me/x.pt"), ("a timing", "took 1.25 s"),
                                        ("a timing", "18000 tok/s"), ("a progress bar", "50%|█████     | 5/10")])
def test_the_output_patterns_find_what_they_name(what: str, text: str):
    assert re.search(FORBIDDEN_OUTPUT[what], text)
    assert not any(re.search(p, "In 1960s Oslo, 3.5 of 10; see runs/tiny and 20 people") for p in FORBIDDEN_OUTPUT.values())


@each_book
def test_outputs_are_stored_where_a_reader_looks_for_them(nb: Notebook):
    prints = [c for c in nb.cells if c.kind == "code" and re.search(r"^\s*(print|plt\.show)\(", c.code, re.M)
              and "eval" not in c.directives and "slow" not in c.directives]
    empty = [c.index for c in prints if not c.outputs and re.search(r"^print\(", c.code, re.M)]
    assert not empty, f"cells that print but have no output: run the notebook before committing it: {empty}"


def project_files() -> list[Path]:
    "The files that are in the repository or would be added to it."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        skip = {".git", ".venv", "runs", "_docs", "_proc", "build", "dist", "__pycache__", ".pytest_cache", ".hypothesis"}
        found = [p for p in ROOT.rglob("*") if not skip & set(p.relative_to(ROOT).parts)]
    return [p for p in found if p.is_file()]


def test_files_are_small():
    data = ROOT / "data_samples"
    embedded = sum(p.stat().st_size for p in project_files() if p.is_relative_to(data))
    assert embedded < 6e6, "data_samples/ stays under 6 MB"
    big = {str(p.relative_to(ROOT)): p.stat().st_size for p in project_files()
           if not p.is_relative_to(data) and p.stat().st_size > 2**20}
    assert not big, f"files of more than 1 MB: {big}"


def test_modules_are_short():
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines())
             for p in (ROOT / PACKAGE).rglob("*.py") if p.stem != "_modidx"}
    long = {name: n for name, n in lines.items() if n > 330}
    assert not long, f"a module has one job and about 300 lines: {long}"


def test_one_quarto_file():
    assert not [p for p in project_files() if p.name.startswith("_quarto") and p.parent != ROOT], \
        "a _quarto.yml below the top level shadows the top-level one"


def cited(text: str) -> set[int]:
    "The traps that a test file cites, as `# trap 6` or `# traps 6, 7`."
    return {int(n) for m in re.finditer(r"# traps? ([\d, and]+)", text) for n in re.findall(r"\d+", m[1])}


def test_every_trap_has_a_test():
    "Architecture, checkpoints, optimisation and data are traps 1 to 31, feedback 32 to 55, ratings 58 and 59."
    files = [p for p in (ROOT / "tests").glob("test_*.py") if p != Path(__file__)]
    found = set().union(*(cited(p.read_text(encoding="utf-8")) for p in files))
    missing = sorted(({*range(1, 57), 58, 59}) - found)
    assert not missing, f"traps that no test cites as `# trap N`: {missing}"


def test_the_package_is_what_the_notebooks_export():
    import check_sync
    assert check_sync.check_export() == []


def test_the_notebooks_are_clean():
    import check_sync
    assert check_sync.check_clean() == []


def test_the_sync_check_sees_an_edited_module(tmp_path: Path):
    "A planted edit, a stale module and a missing one must all be reported."
    import check_sync
    for side in ("made", "kept"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "same.py").write_text("x = 1\n")
    (tmp_path / "made" / "edited.py").write_text("x = 1\n")
    (tmp_path / "kept" / "edited.py").write_text("x = 2\n")
    (tmp_path / "made" / "new.py").write_text("")
    (tmp_path / "kept" / "old.py").write_text("")
    said = check_sync.differences(tmp_path / "made", tmp_path / "kept")
    assert [line.partition(":")[0] for line in said] == ["missing", "stale", "differs"]


def test_times_change_only_when_the_machine_or_the_times_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import run_notebooks
    path, box = tmp_path / "results" / "times.json", {"cores": 2}
    monkeypatch.setattr(run_notebooks, "machine", lambda: dict(box))
    seconds = lambda: json.loads(path.read_text(encoding="utf-8"))["seconds"]
    assert run_notebooks.record({"b.ipynb": 20.4, "a.ipynb": 5.0, "artefacts": 90.}, complete=True, path=path)
    assert list(seconds()) == ["a.ipynb", "artefacts", "b.ipynb"] and seconds()["b.ipynb"] == 20, "sorted and rounded"
    assert not run_notebooks.record({"b.ipynb": 23., "a.ipynb": 7.}, complete=True, path=path), "noise leaves the file as it is"
    assert run_notebooks.record({"b.ipynb": 60.}, complete=False, path=path) and seconds() == {"a.ipynb": 5, "artefacts": 90, "b.ipynb": 60}
    assert run_notebooks.record({"b.ipynb": 60.}, complete=True, path=path) and seconds() == {"artefacts": 90, "b.ipynb": 60}, "a is gone"
    box["cores"] = 8
    assert run_notebooks.record({"b.ipynb": 20.}, complete=True, path=path) and seconds() == {"b.ipynb": 20}, "times of another machine go"


def test_times_name_no_path_of_a_machine():
    path = ROOT / "results" / "times.json"
    if not path.exists():
        pytest.skip("no times are recorded yet: `make test` writes results/times.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["seconds"] == dict(sorted(found["seconds"].items())) and all(isinstance(s, int) for s in found["seconds"].values())
    assert found["machine"].keys() == {"cores", "preset", "processor", "python", "system", "torch"}
    assert not re.search(r"/(home|root|tmp|Users|work)\b", path.read_text(encoding="utf-8"))


def test_a_failing_notebook_is_reported(tmp_path: Path):
    "Planted: a notebook whose last cell fails must fail in nbdev's runner as we call it, and a good one must pass."
    import run_notebooks
    for name, last in (("good", "assert x == 1"), ("bad", "assert x == 2")):
        cells = [dict(cell_type="code", id=str(i), metadata={}, source=s, outputs=[], execution_count=None) for i, s in enumerate(["x = 1", last])]
        book = dict(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}, nbformat=4, nbformat_minor=5)
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(book), encoding="utf-8")
        ok, _, text = run_notebooks.child(["-c", run_notebooks.RUN, str(tmp_path / f"{name}.ipynb"), "", str(ROOT)], run_notebooks.environment())
        assert ok == (name == "good"), text
