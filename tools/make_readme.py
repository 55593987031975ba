"""Write README.md from nbs/index.ipynb: the prose, the code that is not hidden, and the stored outputs.

Use: python tools/make_readme.py     (a test fails while README.md and the notebook differ)
"""
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


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
