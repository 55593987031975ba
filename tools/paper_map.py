"""The front page's table: paper section, notebook, module, measured time. Read from the notebooks, so it cannot drift."""
import json
import posixpath
import re
from pathlib import Path

from docs_filter import duration
from notebooks import PACKAGE, ROOT, rooms

PARTS = {0: "The ground", 1: "The model", 2: "Pretraining", 3: "Fine-tuning", 4: "Safety", 5: "Discussion", 6: "The pipeline"}


def measured(root: Path = ROOT) -> dict:
    "What results/times.json holds: the machine and the seconds by notebook."
    path = root / "results" / "times.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": {}, "seconds": {}}


def module_file(module: str | None, root: Path = ROOT) -> str:
    "The module in code type, linked to its file."
    if module is None:
        return "study, exports nothing"
    path = f"{PACKAGE}/{module.replace('.', '/')}.py"
    return f"[`{module}`](../{path})" if (root / path).exists() else f"`{module}`"


def from_front_page(text: str, name: str) -> str:
    "Markdown of the notebook `name` with its relative links as seen from nbs/."
    here = posixpath.dirname(name)
    return re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", lambda m: f"]({posixpath.normpath(posixpath.join(here, m[1]))})", text)


def paper_map(root: Path = ROOT) -> str:
    "The table as Markdown, with links relative to nbs/."
    seconds = measured(root)["seconds"]
    rows = ["| Paper | Notebook | Module | CPU time |", "|:--|:--|:--|--:|"]
    part = None
    for nb in rooms(root):
        if nb.floor != part:
            part = nb.floor
            rows.append(f"| **{PARTS[part]}** | | | |")
        time = duration(seconds[nb.name]) if nb.name in seconds else "–"
        paper = from_front_page(nb.facts.get("Paper", ""), nb.name)
        rows.append(f"| {paper} | [{nb.number} {nb.title}]({nb.name}) | {module_file(nb.module, root)} | {time} |")
    return "\n".join(rows)


def measured_on(root: Path = ROOT) -> str:
    "A sentence that says what was measured, and where."
    found = measured(root)
    if not found["seconds"]:
        return "No times are recorded yet; `make test` measures them."
    machine, seconds = found["machine"], found["seconds"]
    books = [v for k, v in seconds.items() if k.endswith(".ipynb")]
    text = (f"Measured on {machine['cores']} cores ({machine['processor']}, torch {machine['torch']}) with the preset "
            f"`{machine['preset']}`: all {len(books)} notebooks together take {duration(sum(books))}")
    return text + (f", training the shared artefacts before them {duration(seconds['artefacts'])}." if "artefacts" in seconds else ".")
