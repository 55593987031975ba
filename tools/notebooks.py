"""Reading notebooks: cells, directives, title, fact box. Shared by the site build, the front page and the tests."""
import ast
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGE = "llama2_nbdev"
FACTS = ("Paper", "Study time", "CPU time", "Needs", "You will be able to")


@dataclass
class Cell:
    "One cell: its kind, its source, its stored outputs, and its place in the notebook."
    index: int
    kind: str  # "code", "markdown" or "raw"
    source: str
    outputs: list = field(default_factory=list)

    @cached_property
    def directives(self) -> dict[str, str]:
        "The `#|` lines on top of a code cell: `{'exports': '', 'code-fold': 'true'}`."
        found = {}
        for line in self.source.splitlines():
            if not line.startswith("#|"):
                break
            name, _, value = line[2:].strip().partition(" ")
            found[name.rstrip(":")] = value.strip()
        return found

    @property
    def exported(self) -> bool:
        "Whether the cell goes into the package."
        return self.kind == "code" and bool({"export", "exports", "exporti"} & self.directives.keys())

    @property
    def code(self) -> str:
        "The source without its directives, and without lines that only IPython understands."
        lines = [line for line in self.source.splitlines() if not line.startswith("#|")]
        return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in lines)

    @cached_property
    def tree(self) -> ast.Module:
        "The syntax tree of a code cell (empty where the cell is not plain Python)."
        if self.kind != "code":
            return ast.Module(body=[], type_ignores=[])
        try:
            return ast.parse(self.code)
        except SyntaxError:
            if self.exported:
                raise
            return ast.Module(body=[], type_ignores=[])

    @property
    def definitions(self) -> list[ast.stmt]:
        "The public functions and classes that the cell defines at top level."
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return [n for n in self.tree.body if isinstance(n, kinds) and not n.name.startswith("_")]

    def output_text(self) -> str:
        "Everything textual that the cell printed or displayed."
        parts = []
        for out in self.outputs:
            parts.append(_joined(out.get("text", "")))
            parts += [_joined(v) for k, v in out.get("data", {}).items() if k.startswith("text/")]
            parts += [*out.get("traceback", []), str(out.get("evalue", ""))]
        return "\n".join(p for p in parts if p)


@dataclass
class Notebook:
    "A notebook of the project."
    path: Path
    cells: list[Cell]

    @property
    def name(self) -> str:
        "The path below nbs/, such as `1_model/12_rope.ipynb`."
        return self.path.relative_to(NBS).as_posix() if self.path.is_relative_to(NBS) else self.path.name

    @property
    def number(self) -> str | None:
        "What the file name starts with: two digits and perhaps a letter, which sort as text (35 < 35b); None where it has none."
        found = re.match(r"(\d\d[a-z]?)_", self.path.name)
        return found[1] if found else None

    @property
    def floor(self) -> int | None:
        "The digit that the folder starts with; None outside the floors."
        found = re.match(r"(\d)_", self.path.parent.name)
        return int(found[1]) if found else None

    @property
    def module(self) -> str | None:
        "The module that `#| default_exp` names, such as `model.rope`."
        names = [c.directives["default_exp"] for c in self.cells if "default_exp" in c.directives]
        return names[0] if names else None

    @property
    def title(self) -> str:
        "The H1 of the first cell."
        found = re.match(r"# (.+)", self.cells[0].source) if self.cells else None
        return found[1].strip() if found else self.path.stem

    @property
    def subtitle(self) -> str:
        "The `>` line below the title."
        found = re.search(r"^> (.+)$", self.cells[0].source, re.M) if self.cells else None
        return found[1].strip() if found else ""

    @cached_property
    def facts(self) -> dict[str, str]:
        "The rows of the fact box."
        text = self.cells[1].source if len(self.cells) > 1 else ""
        return {m[1]: m[2].strip() for m in re.finditer(r"^\| \*\*(.+?)\*\* \| (.*) \|\s*$", text, re.M)}

    @property
    def markdown(self) -> str:
        "The prose, cell after cell."
        return "\n\n".join(c.source for c in self.cells if c.kind == "markdown")

    @property
    def headings(self) -> list[tuple[int, str]]:
        "Level and text of every heading, in order (lines inside fenced code do not count)."
        prose = re.sub(r"^```.*?^```", "", self.markdown, flags=re.M | re.S)
        return [(len(m[1]), m[2].strip()) for m in re.finditer(r"^(#{1,6}) (.+)$", prose, re.M)]


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def read(path: Path) -> Notebook:
    "Read one notebook."
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    cells = [Cell(i, c["cell_type"], _joined(c["source"]), c.get("outputs", [])) for i, c in enumerate(raw["cells"])]
    return Notebook(Path(path), cells)


def find(root: Path = ROOT) -> list[Path]:
    "Every notebook in reading order: the floors, the front page, then the solutions."
    found = [p for p in (root / "nbs").rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(root).parts)]
    return sorted(found, key=lambda p: ("solutions" in p.parts, p.name == "index.ipynb", p))


def rooms(root: Path = ROOT) -> list[Notebook]:
    "The notebooks that teach: all of them but the front page and the solutions."
    return [read(p) for p in find(root) if p.name != "index.ipynb" and "solutions" not in p.parts]
