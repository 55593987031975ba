"Every exercise of the course: the reference passes its check, every planted mistake is refused with a sentence of its own."
import importlib
import json
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama2_nbdev.solutions as package
from llama2_nbdev.exercises import Exercise, Wrong, call, prove

MODULES = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
EXERCISES = [(m, e) for m in MODULES for e in importlib.import_module(f"{package.__name__}.{m}").EXERCISES]

def test_every_solutions_module_has_exercises():
    assert "rope" in MODULES
    for module in MODULES: assert len([e for m, e in EXERCISES if m == module]) >= 2, module

@pytest.mark.parametrize("exercise", [pytest.param(e, id=f"{m}.{e.name}") for m, e in EXERCISES])
def test_check(exercise):
    for mistake, sentence in prove(exercise).items():
        assert sentence[0].isupper() and sentence[-1] in ".!?`", f"{mistake}: not a sentence: {sentence!r}"
        assert "stopped with" not in sentence, f"{mistake}: the planted answer crashes, so the check was not tried: {sentence}"

@pytest.mark.parametrize("exercise", [pytest.param(e, id=f"{m}.{e.name}") for m, e in EXERCISES])
def test_answers_that_are_not_answers(exercise):
    for answer in (lambda *args: None, lambda *args: "text", lambda: 1, lambda *args: args[0]):
        with pytest.raises(Wrong): exercise.check(answer)

@pytest.mark.parametrize("exercise", [pytest.param(e, id=f"{m}.{e.name}") for m, e in EXERCISES])
def test_checks_are_named_after_their_exercise(exercise):
    assert exercise.check.__name__ == f"check_{exercise.name}"

def folded_solutions(module):
    "The functions in the folded solutions of a module's notebook, by name."
    notebook, = Path(__file__).parents[1].glob(f"nbs/[0-9]_*/[0-9][0-9]_{module}.ipynb")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    names = {"torch": torch, **vars(importlib.import_module("llama2_nbdev." + re.search(r"default_exp (\S+)", text)[1]))}
    for solution in re.findall(r"<summary>Solution</summary>(.*?)</details>", text, re.S):
        for code in re.findall(r"```python\n(.*?)```", solution, re.S): exec(code, names)
    return names

@pytest.mark.parametrize("module", MODULES)
def test_folded_solutions_pass_their_checks(module):
    names = folded_solutions(module)
    for exercise in (e for m, e in EXERCISES if m == module): exercise.check(names[exercise.name])

# prove itself must be able to fail

def right(): return 7
def check_seven(answer):
    got = call(answer)
    if got == 8: raise Wrong("This is eight, one more than is asked for.")
    if got != 7: raise Wrong("Something else than seven came back.")
    return "Right."

SEVEN = Exercise("seven", check_seven, right, {"one more": lambda: 8, "one less": lambda: 6})

def test_prove_accepts_a_good_check():
    assert set(prove(SEVEN)) == {"nothing written yet", "one more", "one less"}

@pytest.mark.parametrize("bad, says", [
    (replace(SEVEN, check=lambda a: "Right."), "lets this mistake pass"),
    (replace(SEVEN, reference=lambda: 8), "one more than is asked"),
    (replace(SEVEN, mistakes={"a": lambda: 5, "b": lambda: 6}), "the same sentence"),
    (replace(SEVEN, mistakes={"a": lambda: 5}), "at least two"),
    (replace(SEVEN, check=lambda a: call(a) == 7 or None), "says nothing"),
])
def test_prove_refuses(bad, says):
    with pytest.raises(AssertionError, match=says): prove(bad)

def test_a_broken_check_is_not_a_wrong_answer():
    def broken(answer): raise KeyError("a bug of the check")
    with pytest.raises(KeyError): prove(replace(SEVEN, check=broken))
