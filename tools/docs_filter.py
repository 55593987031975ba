"""What the web site shows of a notebook: the cells a reader needs, the title as a page title, the measured CPU time.

nbdev's own filter hides every exported cell and stops at notebooks whose first cell is an H1, so this one replaces it.
- `#| export` and `#| hide` cells, `#| default_exp` and calls of nbdev are left out; `#| exports` cells are shown.
- Directives that only nbdev reads go; those that the site reads (`#| code-fold: true`, `#| echo: false`) stay.
- The fact box gets its CPU time from results/times.json.
- Links to the package's files become plain text: the site shows their code in the notebooks.
"""
import json
import re
from pathlib import Path

from notebooks import ROOT, Notebook, read

HIDDEN = {"export", "exporti", "hide", "default_exp"}
SITE = re.compile(r"^(echo|output|include|label|code-|fig-|tbl-|layout|column|warning)")
MODULE_LINK = re.compile(r"\[([^\]]*)\]\((?:\.\./)+llama2_nbdev/[^)]*\)")
TIMES = ROOT / "results" / "times.json"


def seconds(path: Path = TIMES) -> dict[str, int]:
    "The measured seconds by notebook; empty before the first measurement."
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else {}


def duration(spent: float) -> str:
    "Seconds in words, as coarse as the measurement deserves."
    return f"{spent:.0f} seconds" if spent < 90 else f"{spent / 60:.0f} minutes"


def shown(source: str, directives: dict[str, str]) -> bool:
    "Whether the site shows a code cell."
    return not HIDDEN & directives.keys() and "nbdev_export(" not in source and "nbdev.nbdev_export" not in source


def with_site_directives(source: str, directives: dict[str, str]) -> str:
    "The source with only the directives that the site reads on top, as YAML."
    kept = [f"#| {name}: {value}" for name, value in directives.items() if SITE.match(name)]
    return "\n".join(kept + [line for line in source.splitlines() if not line.startswith("#|")])


def front_matter(nb: Notebook) -> dict:
    "Title, subtitle and place of the page, as a raw cell that Quarto and smalldocs read."
    plain = {"title": nb.title, "subtitle": nb.subtitle}
    rows = [f"{key}: {json.dumps(re.sub('[*`]', '', text), ensure_ascii=False)}" for key, text in plain.items() if text]
    if nb.number is not None:
        digits, letter = nb.number[:2], nb.number[2:]  # 35b stands between 35 and 36
        rows.append(f"order: {int(digits) + (ord(letter) - 96) / 100 if letter else int(digits)}")
    return {"cell_type": "raw", "metadata": {}, "id": "front", "source": "\n".join(["---", *rows, "---"])}


def without_title(source: str) -> str:
    "The first cell without the H1 and its `>` line, which the page shows as its title."
    return re.sub(r"\A# .+\n*(> .+\n*)?", "", source)


def without_module_links(output: dict) -> dict:
    "A stored output whose Markdown names modules without linking them."
    data = output.get("data", {})
    if "text/markdown" not in data:
        return output
    text = data["text/markdown"] if isinstance(data["text/markdown"], str) else "".join(data["text/markdown"])
    return {**output, "data": {**data, "text/markdown": MODULE_LINK.sub(r"\1", text)}}


def filter_notebook(path: Path, times: dict[str, int]) -> dict:
    "The notebook at `path` as the site shows it, in the notebook format."
    raw, nb = json.loads(path.read_text(encoding="utf-8")), read(path)
    cells = [front_matter(nb)]
    for cell, old in zip(nb.cells, raw["cells"]):
        if cell.kind == "code":
            if shown(cell.source, cell.directives):
                cells.append({**old, "source": with_site_directives(cell.source, cell.directives),
                              "outputs": [without_module_links(o) for o in cell.outputs]})
            continue
        source = without_title(cell.source) if cell.index == 0 else cell.source
        if cell.index == 1 and nb.name in times:
            source = re.sub(r"^(\| \*\*CPU time\*\* \| ).*( \|)$", rf"\g<1>{duration(times[nb.name])}\2", source, flags=re.M)
        if source.strip():
            cells.append({**old, "source": MODULE_LINK.sub(r"\1", source)})
    return {**raw, "cells": cells}
