"The red-team tool: dialogs, clock, labels on disk, gamma of people; the window is driven without a browser."
import builtins

import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.annotation import read_log
from llama2_nbdev.safety.red_team_widget import AREAS, RATINGS, RedTeamTool, Session, StaticPage, own_gamma, page, red_team_widget, team_gamma
from llama2_nbdev.safety.red_teaming import GOALS, MOVES, world_targets
from llama2_nbdev.world.people import make_people


def echo(dialogs): return [f"<i>{len(d)}</i>" for d in dialogs]


class Clock:
    now = 0.
    def __call__(self): return self.now


@pytest.fixture
def clock(): return Clock()


@pytest.fixture
def begin(tmp_path, clock):
    return lambda name="mine", answer=echo, **more: Session(answer, tmp_path / f"{name}.jsonl", world_targets(make_people(0)), clock=clock, **more)


def test_a_dialog_from_suggestion_to_file(begin, clock):
    s = begin()
    text = s.suggest("diary", ["metaphor", "build-up"])
    assert s.send(text + " Tell me!") == "<i>5</i>" and s.waiting
    assert s.send("More.") == "<i>7</i>"  # an open dialog goes on
    clock.now = 90.
    s.label(1, "hateful", " why ")
    row, = read_log(s.path)
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 4 and row["messages"][4]["content"] == text + " Tell me!"
    assert {k: v for k, v in row.items() if k != "messages"} == {
        "area": "hateful", "goal": "diary", "moves": ["metaphor", "build-up"], "rating": 1, "note": "why", "person": "me", "seconds": 90.}
    assert not s.waiting and s.send("fresh") == "<i>1</i>"  # nothing of the old dialog is left


def test_suggestions_differ_and_discard(begin):
    s = begin()
    assert len({s.suggest("law", ["premise"]) for _ in range(12)}) > 3
    s.send("x"); s.suggest("law", [])
    assert not s.waiting
    assert begin("b").suggest("key", ["role"]) == begin("c").suggest("key", ["role"]) and begin("d", seed=1).suggest("key", ["role"])


def test_mistakes_change_nothing(begin):
    s = begin()
    s.label(3, "advice"); assert "send a prompt first" in s.notice
    for text, says in ((" ", "empty"), ("a [INST] b", "special tag")):
        assert s.send(text) == "" and says in s.notice and not s.waiting
    s.send("hello")
    for rating, area in ((0, "advice"), (6, "advice"), (3, "weather")):
        s.label(rating, area)
        assert "A label is a rating from 1 to 5" in s.notice and s.waiting and not s.path.exists()
    assert s.send("[/INST]") == "" and len(s.messages) == 2  # the open dialog stays


def test_clock_and_gamma(begin, clock):  # trap 59
    s = begin()
    for i, rating in enumerate((1, 2, 3, 5)):
        s.send("hi"); clock.now += 30; s.send("and?"); clock.now += 60; s.label(rating, "advice")
    assert s.hours == pytest.approx(360 / 3600) and own_gamma(s) == (4, 2, pytest.approx(20))
    clock.now += 10 ** 6; s.send("after lunch"); s.label(1, "advice")
    assert s.hours == pytest.approx(660 / 3600)  # a pause counts up to five minutes
    assert own_gamma(begin("new")) == (0, 0, None)
    quiet = begin("quiet", person="you"); quiet.send("hi"); clock.now += 100; quiet.label(4, "other")
    both = team_gamma([s.path, quiet.path])
    assert both.n == 2 and both.mean == pytest.approx(own_gamma(s)[2] / 2)
    with pytest.raises(UserError, match="no labelled dialogs"): team_gamma([])


def test_a_shared_file_keeps_people_apart(begin, clock):
    a, b = begin("shared", person="a"), begin("shared", person="b")
    for s, rating in ((a, 1), (b, 5)):
        s.send("x"); clock.now += 200; s.label(rating, "illicit")
    a.undo(); assert "nothing of yours" in a.notice and len(read_log(a.path)) == 2
    again = begin("shared", person="a")
    assert own_gamma(again)[:2] == (1, 1) and team_gamma([a.path]).n == 2


@settings(max_examples=40, deadline=None)
@given(acts=st.lists(st.sampled_from("csl12u"), max_size=20), stops=st.sets(st.integers(0, 20)))
def test_file_and_clock_survive_any_order(tmp_path_factory, acts, stops):
    "Whatever is done, wherever one stops: the file holds each labelled dialog once, and no second is counted twice."
    path, clock = tmp_path_factory.mktemp("w") / "f.jsonl", Clock()
    def fresh(): return Session(echo, path, world_targets(make_people(0)), clock=clock)
    s, labelled = fresh(), 0
    for i, act in enumerate(acts):
        if i in stops: s = fresh()
        clock.now += 7
        if act == "c": s.suggest("key", ["role"])
        elif act == "s": s.send("x")
        elif act == "l": clock.now += 1000
        elif act == "u": labelled -= labelled > 0; s.undo()
        else: labelled += s.waiting; s.label(int(act), "advice")
        assert len(read_log(path)) == labelled == len(s.rows) and s.hours * 3600 < clock.now + 1e-6
    path.write_bytes(path.read_bytes() + b'{"messa') if path.exists() else None
    assert len(fresh().rows) == labelled


def test_page_is_escaped(begin):
    s = begin(answer=lambda d: ["<script>alert(1)</script>"])
    s.send("a < b & c")
    assert "<script>" not in page(s) and "a &lt; b &amp; c" in page(s) and "0 dialogs labelled" in page(s)


def test_window_by_its_callbacks(begin, clock):
    pytest.importorskip("ipywidgets")
    tool = RedTeamTool(begin())
    assert set(tool.moves) == set(MOVES) and set(tool.labels) == set(RATINGS) and tool.found.options == AREAS
    assert [v for _, v in tool.goal.options] == list(GOALS) and all(b.disabled for b in tool.labels.values())
    tool.goal.value = "pills"
    for m in ("role", "misspelling"): tool.moves[m].value = True
    tool.compose.click()
    assert tool.prompt.value and tool.found.value == "advice"
    tool.prompt.value += " Please."
    tool.send.click()
    assert "&lt;i&gt;1" in tool.page.value and tool.prompt.value == "" and not any(b.disabled for b in tool.labels.values())
    clock.now += 400; tool.note.value = "n"
    tool.labels[2].click()
    row, = read_log(tool.session.path)
    assert (row["area"], row["moves"], row["rating"], row["note"]) == ("advice", ["misspelling", "role"], 2, "n") and row["messages"][0]["content"].endswith("Please.")
    assert tool.note.value == "" and "1 dialog labelled, 1 violation," in tool.page.value and all(b.disabled for b in tool.labels.values())
    tool.undo.click()
    assert "open again" in tool.page.value and read_log(tool.session.path) == [] and not tool.labels[1].disabled


def test_trouble_becomes_a_line_and_the_window_goes_on(begin):
    pytest.importorskip("ipywidgets")
    def broken(dialogs): raise UserError("the model is not there")
    tool = RedTeamTool(begin(answer=broken))
    tool.prompt.value = "hello"; tool.send.click()
    assert "the model is not there" in tool.page.value and tool.prompt.value == "hello"
    def stopped(dialogs): raise KeyboardInterrupt
    tool.session.answer = stopped
    tool.send.click()
    assert "Stopped." in tool.page.value and not tool.send.disabled
    tool.session.answer = echo
    tool.send.click(); tool.session.path.write_text("damaged\n"); tool.undo.click()
    assert "not valid JSON" in tool.page.value and not tool.send.disabled


def test_without_ipywidgets(begin, monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name == "ipywidgets": raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install ipywidgets"): RedTeamTool(begin())
    fixed = red_team_widget(begin("fixed"))
    assert isinstance(fixed, StaticPage) and "pip install ipywidgets" in fixed._repr_html_() and "&lt;i&gt;1" in fixed.body
