"""Execute nbs/index.ipynb, so its table is of today, and write README.md from its prose, shown code and outputs.

Use: python tools/make_readme.py     (a test fails while README.md and the notebook differ)
"""
import os
import posixpath
import re
from pathlib import Path

from notebooks import NBS, ROOT, Cell, read

NOTE = "<!-- Written from nbs/index.ipynb by tools/make_readme.py: edit the notebook, then `make readme`. -->"
LINK = re.compile(r"(\]\(|src=\")(?![a-z]+:|#|/)([^)\"\s]+)")


def from_root(text: str) -> str:
    "The text with links that start at nbs/ rewritten to start at the project's root."
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join("nbs", m[2])), text)


def output_markdown(cell: Cell) -> list[str]:
    "The stored outputs of a cell: Markdown as it is, text in a block."
    parts = []
    for out in cell.outputs:
        data = out.get("data", {})
        text = data.get("text/markdown") or out.get("text") or data.get("text/plain") or ""
        text = text if isinstance(text, str) else "".join(text)
        parts.append(text.strip() if "text/markdown" in data else f"```\n{text.rstrip()}\n```")
    return parts


def readme(index: Path = NBS / "index.ipynb") -> str:
    "README.md as the notebook says it."
    parts = [NOTE]
    for cell in read(index).cells:
        if cell.kind == "markdown":
            parts.append(cell.source.strip())
        elif cell.kind == "code" and "hide" not in cell.directives:
            if cell.directives.get("echo") != "false":
                parts.append(f"```python\n{cell.code.strip()}\n```")
            parts += output_markdown(cell)
    return from_root("\n\n".join(p for p in parts if p)) + "\n"


def refresh(index: Path = NBS / "index.ipynb") -> None:
    "Run the notebook in a fresh kernel and store its outputs, cleaned as nbdev cleans them."
    import nbformat
    from execnb.nbio import read_nb, write_nb
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    book = nbformat.read(index, as_version=4)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(index.parent)}}).execute()
    for cell in book.cells:
        for out in cell.get("outputs", []):
            out.pop("transient", None)
    nbformat.write(book, index)
    clean = read_nb(index)
    clean_nb(clean)
    write_nb(clean, index)


if __name__ == "__main__":
    refresh()
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
