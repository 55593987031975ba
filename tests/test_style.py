"""The house style of a notebook, as CONTRIBUTING.md states it. `nbs/1_model/12_rope.ipynb` shows it in full."""
import ast
import re

import pytest
from notebooks import FACTS, ROOT, Cell, Notebook, find, read, rooms

ROOMS = rooms()
BOOKS = [read(p) for p in find()]
END = ["Summary", "Quiz", "Exercises", "Try it", "Next"]
CHECK = re.compile(r"^(test_\w+|is_close|all_equal|check\w*)$")
each_book = pytest.mark.parametrize("nb", BOOKS, ids=lambda nb: nb.name)
each_room = pytest.mark.parametrize("nb", ROOMS, ids=lambda nb: nb.name)


@each_book
def test_first_cell_is_title_and_one_line(nb: Notebook):
    assert nb.cells[0].kind == "markdown"
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", nb.cells[0].source.strip()), "first cell: `# Title`, a blank line, `> one line`"
    assert [text for level, text in nb.headings if level == 1] == [nb.title], "one H1 a notebook"


@each_room
def test_second_cell_is_the_fact_box(nb: Notebook):
    lines = nb.cells[1].source.strip().splitlines()
    assert lines[:2] == ["| | |", "|:--|:--|"], "the fact box starts with an empty header"
    assert len(lines) == 7 and tuple(nb.facts) == FACTS, f"the rows of the fact box are {FACTS}"
    assert all(nb.facts.values()), "a row of the fact box is empty"
    assert nb.facts["CPU time"] == "measured, on the [front page](../index.ipynb)"
    assert re.search(r"\d+ (minutes|hours?)", nb.facts["Study time"])
    assert len(re.findall(r"(?<!\*)\*\w[^*]*\*(?!\*)", nb.facts["You will be able to"])) >= 3, "three verbs in italics"


@each_room
def test_module_is_named_in_the_third_cell(nb: Notebook):
    if nb.module is None:  # a study
        assert not [c.index for c in nb.cells if c.exported], "a notebook without default_exp exports nothing"
    else:
        assert nb.cells[2].source.strip() == f"#| default_exp {nb.module}"


@each_room
def test_deviations_table_and_end_frame(nb: Notebook):
    names = [text for level, text in nb.headings if level == 2]
    assert names[-len(END):] == END, f"the last headings are {END}"
    assert "Deviations" in names[:-len(END)], "a deviations table stands before the end frame"
    table = section(nb, "Deviations")
    assert re.search(r"^\| *paper does *\| *we do *\| *why *\| *what changes *\|$", table, re.M | re.I)


def section(nb: Notebook, name: str) -> str:
    "The prose below an H2 heading, up to the next one."
    found = re.search(rf"^## {re.escape(name)}\s*$(.*?)(?=^## |\Z)", nb.markdown, re.M | re.S)
    return found[1] if found else ""


def folded(text: str, label: str) -> list[str]:
    "The bodies of the `<details>` whose summary starts with `label`."
    return re.findall(rf"<details>\s*<summary>\s*{label}[^<]*</summary>(.*?)</details>", text, re.S | re.I)


@each_room
def test_quiz_has_three_folded_answers(nb: Notebook):
    answers = folded(section(nb, "Quiz"), "Answer")
    assert len(answers) == 3 and all(a.strip() for a in answers)


@each_room
def test_exercises_are_graded_with_hint_and_solution(nb: Notebook):
    text = section(nb, "Exercises")
    graded = re.findall(r"\*[^*\n]*\b\d+ minutes[^*\n]*\*", text)
    assert 2 <= len(graded) <= 4, "two or three exercises, each with *difficulty, minutes*"
    assert len(folded(text, "Hint")) >= len(graded), "each exercise has a folded hint"
    assert len(folded(text, "Solution")) >= len(graded), "each exercise has a folded solution"


@each_room
def test_next_links_to_a_notebook_that_exists(nb: Notebook):
    links = re.findall(r"\]\(([^)#]+\.ipynb)\)", section(nb, "Next"))
    assert links, "`## Next` links to the next notebook"
    assert [x for x in links if not (nb.path.parent / x).exists()] == []


@each_book
def test_links_lead_somewhere(nb: Notebook):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", re.sub(r"`[^`\n]*`", "", nb.markdown))
    assert [x for x in links if not (nb.path.parent / x).exists()] == []


def checks(cell: Cell) -> bool:
    "Whether a code cell asserts something."
    for node in ast.walk(cell.tree):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if CHECK.match(name):
                return True
    return False


def unchecked(nb: Notebook) -> list[str]:
    "The exported public definitions without a check in their own cell or the three code cells after it."
    code = [c for c in nb.cells if c.kind == "code"]
    return [f"{d.name} (cell {c.index})" for i, c in enumerate(code) if c.exported for d in c.definitions
            if not any(checks(after) for after in code[i + 1:i + 4] if not after.exported)]


@each_room
def test_every_exported_definition_is_checked_nearby(nb: Notebook):
    missing = unchecked(nb)
    assert not missing, f"exported definitions without a check within three code cells: {missing}"


def test_the_check_finder_sees_a_missing_check():
    "Planted: a definition whose check comes one cell too late, and the same with the check in time."
    sources = ["#| exports\ndef f(): return 1", "1", "2", "3", "assert f() == 1"]
    late = Notebook(ROOT / "nbs" / "x.ipynb", [Cell(i, "code", s) for i, s in enumerate(sources)])
    in_time = Notebook(late.path, [Cell(i, "code", s) for i, s in enumerate(sources[:2] + sources[3:])])
    assert unchecked(late) == ["f (cell 0)"] and unchecked(in_time) == []


@each_book
def test_public_definitions_have_docstrings(nb: Notebook):
    missing = []
    for cell in (c for c in nb.cells if c.exported):
        for node in cell.definitions:
            if not ast.get_docstring(node):
                missing.append(node.name)
            if isinstance(node, ast.ClassDef):
                missing += [f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)
                            and not m.name.startswith("_") and not ast.get_docstring(m)]
    assert not missing, f"public names without a docstring: {missing}"


@each_book
def test_definitions_are_shown_in_the_site(nb: Notebook):
    hidden = [f"{d.name} (cell {c.index})" for c in nb.cells if c.exported and "exports" not in c.directives for d in c.definitions]
    assert not hidden, f"use `#| exports` (with s) for definitions: `#| export` hides them from the reader: {hidden}"


@each_book
def test_directives_have_no_trailing_colon_and_drafts_stay_home(nb: Notebook):
    code = [c for c in nb.cells if c.kind == "code"]
    assert [c.index for c in code if re.match(r"#\|\s*(export|exports|hide|default_exp):", c.source)] == []
    assert [d.name for c in code if c.exported for d in c.definitions if re.search(r"_v\d$", d.name)] == [], "drafts are not exported"


@each_book
def test_text_comes_before_code(nb: Notebook):
    prose = [c.index for c in nb.cells if c.kind == "markdown"]
    shown = [c.index for c in nb.cells if c.kind == "code" and not {"hide", "export", "default_exp"} & c.directives.keys()]
    assert not shown or any(i < shown[0] for i in prose[1:]), "explain before the first cell that a reader sees"


AMERICAN = re.compile(r"\b(behaviors?|colors?|colored|favorites?|neighbors?|gray|labeled|modeling|centered|analyze[ds]?|"
                      r"(?:normal|token|initial|summar|general|optim|organ|recogn|vector|regular|minim|maxim|real|memor|quant)i(?:ze[ds]?|zing|zation))\b", re.I)
EMOJI = re.compile("[\U0001F300-\U0001FAFF\u2600-\u26FF\u2705\u274C\u2B50]")


def prose(nb: Notebook) -> str:
    "The notebook's words: markdown without code, links' targets and HTML."
    text = re.sub(r"^```.*?^```|^~~~.*?^~~~", "", nb.markdown, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)|<[^>]+>|\$[^$]*\$", " ", text)


@each_book
def test_spelling_is_british_and_there_are_no_emoji(nb: Notebook):
    assert sorted({m[0] for m in AMERICAN.finditer(prose(nb))}) == [], "British spelling"
    assert EMOJI.findall("\n".join([c.source for c in nb.cells] + [c.output_text() for c in nb.cells])) == []


def test_readme_is_what_the_front_page_says():
    from make_readme import readme
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make readme`"


def test_front_page_names_every_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [nb.name for nb in ROOMS if f"nbs/{nb.name}" not in text] == [], "run nbs/index.ipynb again, then `make readme`"
