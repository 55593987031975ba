"""Is `llama2_nbdev/` what the notebooks export, and are the notebooks clean?

Both questions are answered on a copy in a temporary folder, so nothing in the working tree changes.
Use: python tools/check_sync.py [export] [clean]     (both when nothing is named; exit 1 if anything differs)
"""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIP = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "_quarto.yml", "nbdev.yml", "sidebar.yml")
EXPORT = "from nbdev.doclinks import nbdev_export; nbdev_export()"
CLEAN = "from nbdev.clean import nbdev_clean; nbdev_clean()"


def sources_copy(root: Path, tmp: Path) -> Path:
    "Copy what the export reads, and nothing that it writes, to `tmp`."
    shutil.copytree(root / "nbs", tmp / "nbs", ignore=SKIP)
    shutil.copy(root / "settings.ini", tmp)
    return tmp


def in_folder(code: str, folder: Path) -> None:
    "Run a line of Python in a fresh process whose working folder is `folder`."
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nbdev stopped:\n{done.stdout}{done.stderr}")


def files_of(folder: Path) -> set[str]:
    "The files under a folder, relative to it, without caches."
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def differences(made: Path, kept: Path) -> list[str]:
    "What `diff -r made kept` would report, one line a file."
    a, b = files_of(made), files_of(kept) if kept.exists() else set()
    lines = [f"missing: {n} (a notebook exports it)" for n in sorted(a - b)]
    lines += [f"stale: {n} (no notebook exports it)" for n in sorted(b - a)]
    return lines + [f"differs: {n}" for n in sorted(a & b) if not filecmp.cmp(made / n, kept / n, shallow=False)]


def check_export(root: Path = ROOT) -> list[str]:
    "Export a copy of the notebooks and compare the result with the package in the tree."
    with tempfile.TemporaryDirectory() as tmp:
        copy = sources_copy(root, Path(tmp))
        in_folder(EXPORT, copy)
        return differences(copy / "llama2_nbdev", root / "llama2_nbdev")


def check_clean(root: Path = ROOT) -> list[str]:
    "Clean a copy of the notebooks and name those that change."
    with tempfile.TemporaryDirectory() as tmp:
        copy = sources_copy(root, Path(tmp))
        in_folder(CLEAN, copy)
        books = sorted((copy / "nbs").rglob("*.ipynb"))
        return [f"not clean: {p.relative_to(copy)}" for p in books
                if p.read_text(encoding="utf-8") != (root / p.relative_to(copy)).read_text(encoding="utf-8")]


CHECKS = {
    "export": (check_export, "run `nbdev_export` and commit the result"),
    "clean": (check_clean, "run `nbdev_clean` and commit the result"),
}

if __name__ == "__main__":
    found = 0
    for name in sys.argv[1:] or CHECKS:
        check, remedy = CHECKS[name]
        lines = check()
        found += len(lines)
        print("\n".join([*lines, f"-> {remedy}"] if lines else [f"{name}: in sync" if name == "export" else "notebooks: clean"]))
    sys.exit(1 if found else 0)
