"The annotation tool: sides, keys, the file, resume, undo; the window is driven without a browser."
import builtins
import json

import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, append_jsonl
from llama2_nbdev.finetuning.annotation import KEYS, Annotation, AnnotationTool, as_pair, judgement, page, pair_key, read_log, sides
from llama2_nbdev.finetuning.preferences import read_preferences


def pair(i, kind="helpful"):
    return {"id": i, "messages": [{"role": "user", "content": f"Question {i}?"}], "answers": [f"new {i}", f"old {i}"],
            "authors": ["new", "old"], "task": "fact", "kind": kind, "truth": {}}


PAIRS = [pair(i) for i in range(5)]


@pytest.fixture
def file(tmp_path): return tmp_path / "mine.jsonl"


def test_scale_runs_from_a_to_b():
    steps = [judgement(k) for k in "12345678"]
    assert [side for side, _ in steps] == [0] * 4 + [1] * 4
    assert [g for _, g in steps[:4]] == [g for _, g in steps[:3:-1]] == ["significantly", "better", "slightly", "negligible"]


def test_sides_depend_on_seed_and_content_only():
    drawn = [sides(as_pair(pair(i)), 0) for i in range(400)]
    assert all({tuple(x) for x in zip(p["answers"], p["authors"])} == {(f"new {i}", "new"), (f"old {i}", "old")} for i, p in enumerate(drawn))
    assert 160 < sum(p["authors"][0] == "new" for p in drawn) < 240
    turned = [sides(as_pair(pair(i) | {"answers": [f"old {i}", f"new {i}"], "authors": ["old", "new"]}), 0) for i in range(400)]
    assert turned == drawn and drawn != [sides(as_pair(pair(i)), 1) for i in range(400)]


def test_judgement_is_written_at_once_in_our_schema(file):
    session = Annotation(PAIRS, file, annotator="me", batch=7)
    a, b = session.current["answers"]
    session.press("3")
    row, = read_preferences(file)
    assert row == {"messages": PAIRS[0]["messages"], "chosen": a, "rejected": b, "grade": "slightly", "safety": "both safe", "task": "fact",
                   "kind": "helpful", "batch": 7, "origin": "own", "chosen_by": a.split()[0], "rejected_by": b.split()[0], "annotator": "me"}
    assert session.progress == "1 of 5 pairs done" and session.current["messages"] == PAIRS[1]["messages"]


@pytest.mark.parametrize("keys, safety", [("8", "both safe"), ("a8", "chosen safe"), ("ab8", "both unsafe"), ("b8", None), ("aa8", "both safe"), ("bb 8", "both safe")])
def test_safety_bins(file, keys, safety):
    session = Annotation(PAIRS, file)
    session.press(keys)
    assert [r["safety"] for r in read_log(file)] == ([safety] if safety else [])
    if safety: assert session.unsafe == set()  # marks do not stick to the next pair
    else:
        assert "leaves such pairs out" in session.notice and len(session.done) == 0
        session.press("1")  # the mark on B is still there
        assert read_log(file)[0]["safety"] == "chosen safe"


@pytest.mark.parametrize("keys, says", [("9", "'9' is no key"), ("88", "One pair at a time"), ("u8", "One pair at a time"), ("8x", "'x' is no key"), ("u", "nothing to undo")])
def test_mistakes_change_nothing(file, keys, says):
    session = Annotation(PAIRS, file)
    session.press(keys)
    assert says in session.notice and not file.exists() and session.current["messages"] == PAIRS[0]["messages"]
    session.press(" A ")
    assert session.notice == "" and session.unsafe == {0}


def test_resume_after_a_kill_and_with_a_longer_list(file):
    Annotation(PAIRS, file).press("1")
    Annotation(PAIRS, file).press("s")
    with open(file, "a") as f: f.write('{"messages": [{"ro')  # killed in the middle of a row
    session = Annotation([pair(9), *PAIRS[::-1], *PAIRS], file)
    assert session.progress == "2 of 6 pairs done" and session.current["messages"] == pair(9)["messages"]
    while session.current: session.press("7")
    assert len(read_preferences(file)) == 5 and session.progress == "6 of 6 pairs done"
    assert len({pair_key(r) for r in read_preferences(file)}) == 5  # nobody is asked twice
    session.press("1")
    assert "All pairs are done" in session.notice and len(read_preferences(file)) == 5


def test_a_last_line_without_its_newline_counts(file):
    append_jsonl(file, {"messages": ["a"]}); file.write_bytes(file.read_bytes()[:-1])
    assert read_log(file) == [{"messages": ["a"]}]
    file.write_text('{"messages": []}\nno json\n{"messages": []}\n')
    with pytest.raises(UserError, match="mine.jsonl:2"): read_log(file)  # damage elsewhere is told, not cut
    assert file.read_text().count("\n") == 3


def test_skipped_pairs_stay_out_of_the_data(file):
    session = Annotation(PAIRS, file)
    for key in "s1s11": session.press(key)
    assert len(read_preferences(file)) == 3 and len(read_log(session.skipped)) == 2
    assert Annotation(PAIRS, file).current is None
    for left in (4, 3, 2, 1, 0):
        session.press("u")
        assert len(session.done) == left == len(read_log(file)) + len(read_log(session.skipped))
    assert session.current["messages"] == PAIRS[0]["messages"]


def test_undo_spares_the_rows_of_others(file):
    other = {"messages": [{"role": "user", "content": "theirs"}], "chosen": "a", "rejected": "b"}
    append_jsonl(file, other)
    session = Annotation(PAIRS[:1], file)
    session.press("2"); append_jsonl(file, other)
    session.press("u"); session.press("u")
    assert read_log(file) == [other, other] and "nothing to undo" in session.notice


@settings(max_examples=40, deadline=None)
@given(keys=st.lists(st.sampled_from("12345678absu"), max_size=25), stops=st.sets(st.integers(0, 25)))
def test_files_always_equal_the_session(tmp_path_factory, keys, stops):
    "Whatever is pressed, wherever one stops and resumes: the files hold each finished pair once, and nothing else."
    file = tmp_path_factory.mktemp("a") / "mine.jsonl"
    session = Annotation(PAIRS, file)
    for i, key in enumerate(keys):
        if i in stops: session = Annotation(PAIRS, file)
        session.press(key)
        written = [pair_key(r) for r in read_log(file) + read_log(session.skipped)]
        assert sorted(written) == sorted(session.done) and len(set(written)) == len(written)
    assert Annotation(PAIRS, file).current == session.current


def test_a_second_opinion_forgets_the_first(file):
    judged = {"messages": PAIRS[0]["messages"], "chosen": "x", "rejected": "y", "grade": "better", "safety": "both safe", "batch": 3, "chosen_by": "m"}
    p = as_pair(judged)
    assert set(p) == {"messages", "answers", "authors"} and p["authors"] == ["m", None]
    Annotation([judged], file).press("8")
    assert read_preferences(file)[0]["grade"] == "significantly"
    with pytest.raises(UserError, match="nothing to compare"): as_pair(judged | {"rejected": "x"})


def test_page_is_blind_and_escaped(file):
    p = pair(0) | {"answers": ["<i>one</i>", "two & two"], "messages": [{"role": "user", "content": "<script>"}], "authors": ["SECRET1", "SECRET2"]}
    session = Annotation([p], file)
    shown = page(session)
    assert "<i>" not in shown and "<script>" not in shown and "two &amp; two" in shown and "SECRET" not in shown
    session.press("8")
    assert "Done." in page(session)
    assert "safer" in page(Annotation([pair(1, "safety")], file.with_name("b.jsonl")))


def test_window_by_its_callbacks(file):
    pytest.importorskip("ipywidgets")
    tool = AnnotationTool(Annotation(PAIRS[:2], file))
    assert "".join(tool.buttons) == "12345678absu" == "".join(KEYS) and "Question 0?" in tool.page.value
    tool.box.value = "b1"
    assert tool.box.value == "" and read_log(file)[0]["safety"] == "chosen safe" and "Question 1?" in tool.page.value
    tool.box.value = "??"
    assert "is no key" in tool.page.value and tool.box.value == ""
    for key in "a8": tool.buttons[key].click()
    assert "Done." in tool.page.value and [k for k, b in tool.buttons.items() if not b.disabled] == ["u"]
    tool.buttons["u"].click()
    assert "Question 1?" in tool.page.value and not tool.buttons["1"].disabled
    file.write_text("damaged\n")
    tool.buttons["s"].click(); tool.buttons["u"].click(); tool.buttons["u"].click()
    assert "not valid JSON" in tool.page.value  # told in the window, which goes on
    assert json.loads(json.dumps(tool.session.progress))


def test_without_ipywidgets(file, monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name == "ipywidgets": raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install ipywidgets"): AnnotationTool(Annotation(PAIRS, file))
