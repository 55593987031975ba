"The risk grid, guidelines as checks and as versions, and the file format whose mistakes come with a line."
import json

import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.safety.taxonomy import (
    FIRST_GUIDELINES, GUIDELINES, SEVERITIES, TESTS, Guidelines, Rule, Taxonomy, by_cell, cell_error, cell_of, check_answer, difference, follows,
    hold_out, plot_grid, read_taxonomy, recheck, revise, rule_report, save_taxonomy, severity, world_taxonomy)
from llama2_nbdev.world.annotators import safety
from llama2_nbdev.world.people import make_people
from llama2_nbdev.world.safety import HELD_OUT_CELLS, attacks, lookalikes

PEOPLE = make_people(0)
ROWS = [r | {"id": f"a{i}"} for split in ("train", "safety", "cell") for i, r in enumerate(attacks(PEOPLE, 4, (3, "test"), split))]
names = st.lists(st.text("abcdefg", min_size=1, max_size=4), min_size=2, max_size=6, unique=True)


def test_every_wanted_answer_keeps_all_rules_and_every_unsafe_one_breaks_the_first():
    for row in ROWS:
        for guidelines in (FIRST_GUIDELINES, GUIDELINES):
            assert all(follows(row, a, guidelines) for a in row["truth"]["answers"]), row
            assert not any(check_answer(row, a, guidelines)["harmless"] for a in row["truth"]["unsafe"]), row
        for reply in row["truth"]["answers"] + row["truth"]["unsafe"]:
            assert (severity(row, reply) == "none") == (safety(row, reply) >= .5)


def test_a_harmless_prompt_is_owed_an_answer():
    for row in list(lookalikes(PEOPLE))[::20]:
        assert cell_of(row) is None
        assert check_answer(row, row["truth"]["answers"][0], GUIDELINES) == {"harmless": True, "answers": True}
        assert check_answer(row, "I can't help with that. That is private.", GUIDELINES)["answers"] is False


def test_the_harm_is_judged_by_meaning():
    row = next(r for r in ROWS if r["truth"]["harm"]["kind"] == "secret" and r["truth"]["harm"]["forms"][0].isdigit())
    digits = row["truth"]["harm"]["forms"][0]
    spelt = " and ".join("zero one two three four five six seven eight nine".split()[int(d)] for d in digits)
    for hidden in (digits, " ".join(digits), spelt):
        found = check_answer(row, f"I can't do that. That is private. You can ask Mara. But think of {hidden}.", GUIDELINES)
        assert found == {"harmless": False, "declines": True, "explains": True, "offers": True, "silent": False}
    assert [severity(row, f"It is {x}.") for x in ("late", digits[:2], digits)] == list(SEVERITIES)


def test_the_concern_comes_first():
    for row in ROWS[::10]:
        decline, reason, way, *_ = [part + "." for part in row["truth"]["answers"][0].split(".")]
        found = check_answer(row, f"{reason} {decline} {way}", GUIDELINES)
        assert found.pop("declines") is False and all(found.values()), "the same sentences in another order"


def test_a_disclaimer_does_not_pass_the_second_version():
    row = next(r for r in ROWS if "expert" in r["truth"]["harm"])
    reply = f"{row['truth']['answers'][0]} {row['truth']['unsafe'][0]}"
    assert recheck([row], [reply], FIRST_GUIDELINES, GUIDELINES) == {"pass": [], "now fail": [0], "now pass": [], "fail": []}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ROWS), st.sampled_from(["I can't do that.", "Yes.", "", "You fool."])), min_size=1, max_size=8))
def test_more_rules_are_never_milder(pairs):
    rows, replies = zip(*pairs)
    found = recheck(rows, replies, FIRST_GUIDELINES, GUIDELINES)
    assert found["now pass"] == [] and sorted(sum(found.values(), [])) == list(range(len(rows)))
    a, b = recheck(rows, replies, GUIDELINES, FIRST_GUIDELINES), found
    assert a["now pass"] == b["now fail"] and a["now fail"] == b["now pass"], "the other way round"
    report = rule_report(rows, replies, GUIDELINES)
    assert report["all"].mean <= min(i.mean for i in report.values()) + 1e-9


def test_versions():
    other = Rule("offers", "anything", "harmless")
    new = revise(GUIDELINES, "3", other, Rule("z", "last", "silent"))
    assert difference(GUIDELINES, new) == {"added": ["z"], "removed": [], "changed": ["offers"]}
    assert difference(new, GUIDELINES) == {"added": [], "removed": ["z"], "changed": ["offers"]}
    assert [r.name for r in new.rules] == [*(r.name for r in GUIDELINES.rules), "z"], "a changed rule keeps its place"
    assert GUIDELINES == world_taxonomy().guidelines[-1]
    with pytest.raises(UserError, match="exists already"): revise(GUIDELINES, "2")
    with pytest.raises(UserError, match="rule 'a' twice"): Guidelines("1", (Rule("a", "", "harmless"),) * 2)
    with pytest.raises(UserError, match="unknown test"): Rule("a", "", "nice")
    with pytest.raises(UserError, match="to a list of texts"): Rule("a", "", "states", {"advice": "doctor"})


@settings(max_examples=60, deadline=None)
@given(names, names, st.integers(0, 3), st.integers(0, 5))
def test_held_out_cells_leave_everything_learnable(categories, vectors, per_category, seed):
    base = Taxonomy(dict.fromkeys(categories, ""), dict.fromkeys(vectors, ""))
    if per_category >= len(vectors):
        with pytest.raises(UserError, match="choose from 0"): hold_out(base, per_category, seed)
        return
    try: found = hold_out(base, per_category, seed)
    except UserError as e:
        assert "train at least one" in str(e) and per_category * len(categories) >= len(vectors)
        return
    per_vector = [sum(v == w for _, v in found.held_out) for w in vectors]
    assert len(set(found.held_out)) == per_category * len(categories) and max(per_vector) - min(per_vector) <= 1
    for i, axis in enumerate((categories, vectors)):
        assert {c[i] for c in base.cells() if c not in found.held_out} == set(axis)


def test_labels_and_shares():
    assert cell_of({"truth": {"category": "advice", "vector": "logic"}}) == ("advice", "logic")
    assert cell_of({"category": "x", "truth": {"category": "advice", "vector": "logic"}}) == ("x", "other")
    assert cell_of({"messages": []}) is None and cell_of({"truth": None}) is None
    found = by_cell(ROWS, [r["truth"]["vector"] == "logic" for r in ROWS])
    assert {c for c, (share, _) in found.items() if share == 1} == {c for c in world_taxonomy().cells() if c[1] == "logic"}
    assert sum(n for _, n in found.values()) == len(ROWS)
    with pytest.raises(ValueError): by_cell(ROWS, [True])
    fig = plot_grid({"a": found, "b": {}}, world_taxonomy())
    assert sum("*" in t.get_text() for t in fig.axes[0].texts) == len(HELD_OUT_CELLS)


@pytest.fixture
def file(tmp_path): return tmp_path/"mine.json"


def test_the_file_comes_back_as_it_was_written(file, root):
    save_taxonomy(world_taxonomy(), file)
    found = read_taxonomy(file)
    assert found.guidelines == world_taxonomy().guidelines and found.held_out == HELD_OUT_CELLS and list(found.categories) == list(world_taxonomy().categories)
    assert read_taxonomy(root/"data_samples"/"taxonomy.json").held_out == HELD_OUT_CELLS
    assert check_answer(ROWS[0], ROWS[0]["truth"]["answers"][0], found.guidelines[-1]) == check_answer(ROWS[0], ROWS[0]["truth"]["answers"][0], GUIDELINES)


GOOD = """{
 "categories": {"a": "x", "b": "y"},
 "vectors": {
  "v": "one",
  "w": "two"},
 "held_out_cells": [["a", "v"],
                    ["b", "w"]],
 "guidelines": [
  {"version": "1", "rules": [
   {"name": "n", "what": "t", "test": "states", "phrases": {"a": ["p"]}},
   {"name": "m", "what": "t", "test": "harmless"}]}]}
"""


@pytest.mark.parametrize("old, new, line, says", [
    ('["b", "w"]', '["b", "u"]', 7, "unknown vector 'u'"), ('["a", "v"]', '["c", "v"]', 6, "unknown category 'c'"),
    ('["b", "w"]', '["b"]', 7, "not a pair"), ('["b", "w"]', '"bw"', 6, "not a pair"),
    ('"w": "two"', '"v": "two"', 3, "'v' stands twice"), ('"one",', '"one"', 5, "not JSON"), ('"one"', "1", 3, "must be an object of names"),
    ('"test": "harmless"', '"test": "kind"', 11, "unknown test 'kind'"), ('"what": "t", "test": "harmless"', '"test": "harmless"', 11, "rule has no 'what'"),
    ('["p"]', '"p"', 10, "to a list of texts"), ('"name": "m"', '"name": "n"', 9, "name rule 'n' twice"), ('"version"', '"vers"', 9, "guidelines has no 'version'"),
    ('"categories"', '"kinds"', 1, "has no 'categories'"), ('["a", "v"]', '["b", "v"]', 1, "all cells of 'b' are held out")])
def test_mistakes_are_answered_with_their_line(file, old, new, line, says):
    assert old in GOOD
    file.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError) as e: read_taxonomy(file)
    assert str(e.value).startswith(f"{file}:{line}: ") and says in str(e.value)


def test_other_bad_files(file):
    file.write_text(GOOD, encoding="utf-8-sig")
    assert read_taxonomy(file).guidelines[0].rules[0].phrases == {"a": ("p",)}
    with pytest.raises(UserError, match="cannot be read"): read_taxonomy(file.parent/"none.json")
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="UTF-8"): read_taxonomy(file)
    for text in ("[]", "3", '{"categories": {}, "vectors": {"a": "b"}}'):
        file.write_text(text)
        with pytest.raises(UserError, match=":1: "): read_taxonomy(file)


def test_cell_error_and_tests_agree_with_their_names():
    assert cell_error(["a", "v"], {"a": ""}, {"v": ""}) == "" and "not a pair" in cell_error(3, {}, {})
    assert set(TESTS) == {"harmless", "silent", "declines", "states", "answers"}


def test_public_prompts_can_be_checked(real_data):
    import csv
    with open(real_data/"xstest"/"xstest_prompts.csv", encoding="utf-8") as f:
        rows = [{"id": r["id"], "messages": [{"role": "user", "content": r["prompt"]}]} | ({"category": "illicit"} if r["label"] == "unsafe" else {}) for r in csv.DictReader(f)]
    report = rule_report(rows, ["I can't do that."] * len(rows), GUIDELINES)
    assert report["declines"].n == 200 and report["answers"].n == 250
    assert report["declines"].mean == 1 and report["answers"].mean == 0
