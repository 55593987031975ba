"Sense of time: both sides of an event, splits without leaks, a lookup that needs no rule, and measures on both."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.discussion import chronology
from llama2_nbdev.discussion.chronology import (
    PLACES, ChronologyConfig, Dated, Event, by_distance, check_events, chronology_trial, dated_prompt, dated_row, dialogues, figure, measure_dates, not_yet,
    openings, remembered, split_dates, verdicts, world_events)
from llama2_nbdev.finetuning.chat import check_messages
from llama2_nbdev.finetuning.sft import SFTConfig
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.world.dialogs import dates

pytestmark = pytest.mark.usefixtures("one_thread")
MOON = Event("moon", 1969, "Has anyone walked on the moon?", "Yes, since 1969.", "No, not yet.")


def test_year_of_the_event_is_known():
    assert [Dated(MOON, y).answer for y in (1968, 1969, 1970)] == [MOON.unknown, MOON.known, MOON.known]
    assert Dated(MOON, 1950).distance == -19


@pytest.mark.parametrize("place", PLACES)
def test_the_date_stands_in_one_place_only(place):
    row = dated_row(Dated(MOON, 1950), place)["messages"]
    check_messages(row)
    text = [m["content"] for m in row if "1950" in m["content"]]
    assert len(text) == (place != "none") and row[-1]["content"] == MOON.unknown
    assert (row[0]["role"] == "system") == (place == "system")


@pytest.mark.parametrize("change, words", [({"year": 1840}, "between 1841 and 2019"), ({"year": 2020}, "between 1841"), ({"unknown": MOON.known}, "two different"),
                                           ({"name": ""}, "is empty")])
def test_events_without_a_boundary_are_refused(change, words):
    with pytest.raises(UserError, match=words): check_events([replace(MOON, **change)], 1840, 2019)


def test_contradicting_and_repeated_events_are_refused():
    with pytest.raises(UserError, match="the same year"): check_events([MOON, replace(MOON, year=1970, question="When?")], 1840, 2019)
    with pytest.raises(UserError, match="occurs twice"): check_events([MOON, replace(MOON, name="other")], 1840, 2019)
    with pytest.raises(UserError, match="no event"): check_events([], 1840, 2019)
    with pytest.raises(UserError, match="place='title'"): dated_prompt(Dated(MOON, 1950), "title")


def test_world_events_agree_with_the_world():
    ours = {(e.question, y): Dated(e, y) for e in world_events(3) for y in range(1840, 2020)}
    for row in [*dates("train", 3), *dates("dated", 3)]:
        x = ours[row["messages"][1]["content"], row["truth"]["year"]]
        assert x.answer == row["truth"]["answers"][0] and x.event.year == row["truth"]["event_year"] and dated_prompt(x) == row["messages"]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 999), things=st.integers(0, 6), step=st.integers(2, 9), n=st.integers(2, 900))
def test_splits_do_not_leak(seed, things, step, n):
    cfg = ChronologyConfig(seed=seed, held_things=things, held_years=step, examples=n, tests=10**6)
    s = split_dates(world_events(), cfg)
    pairs = {k: {(x.event.name, x.query) for x in v} for k, v in s.items()}
    assert len(s["train"]) <= n and s == split_dates(world_events(), cfg)
    assert not any(pairs["train"] & pairs[k] for k in ("pairs", "years", "things"))  # two questions about one pair stay together
    assert not {y for _, y in pairs["train"]} & {y for _, y in pairs["years"]}
    assert not {a for a, _ in pairs["train"] | pairs["pairs"] | pairs["years"]} & {a for a, _ in pairs["things"]}
    assert len({a for a, _ in pairs["things"]}) == things


def test_all_things_held_out_is_refused():
    with pytest.raises(UserError, match="held_things=1 of 1"): split_dates([MOON], ChronologyConfig(held_things=1))


def test_lookup_needs_no_rule_but_fails_on_new_things():
    late = replace(MOON, name="web", year=1991, question="Is there a web?")
    train = [Dated(MOON, y) for y in range(1900, 2019, 2)]
    assert all(remembered(train, [Dated(MOON, y) for y in range(1901, 2019, 2) if y != 1969]))
    assert remembered(train, [Dated(late, 1980), Dated(late, 1950), Dated(late, 2000)]) == [False, True, True]


def test_openings_end_with_the_first_word_that_differs():
    assert openings(MOON) == ("Yes,", "No,")
    assert openings(replace(MOON, known="It was built.", unknown="It is not.")) == ("It was", "It is")
    assert openings(replace(MOON, known="It was", unknown="It was not")) == ("It was", "It was not")


def test_groups_by_distance():
    m = {"distance": [-41, -40, -11, -10, -1, 0, 9, 10, 39, 40], "side": [True] * 10}
    assert {k: len(v) for k, v in by_distance(m).items()} == {"before -40": 1, "-40 to -11": 2, "-10 to -1": 2, "0 to 9": 2, "10 to 39": 2, "from 40": 1}


def test_an_answer_counts_by_its_side(monkeypatch):
    said = {1950: "No, never.", 1969: "Yes, since 1970.", 1980: "No, not yet.", 1990: "Yes, since 1969."}
    monkeypatch.setattr(chronology, "answer_prompts", lambda model, tok, prompts, *a, **k: [said[int(p[0]["content"][12:16])] for p in prompts])
    monkeypatch.setattr(chronology, "not_yet", lambda model, tok, examples, place: np.zeros(len(examples)))
    m = measure_dates(None, None, [Dated(MOON, y) for y in said])
    assert m["side"] == [True, True, False, True] and m["exact"] == [False, False, False, True] and m["distance"] == [-19, 0, 11, 21]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    texts = [m["content"] for e in world_events() for y in (1845, 1999) for m in dated_row(Dated(e, y))["messages"]]
    tok = Tokenizer.train([*texts, "[INST] [/INST] <<SYS>> <</SYS>>"], 320, tmp_path_factory.mktemp("tok") / "tokenizer.model")
    torch.manual_seed(0)
    return Llama(ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)).eval(), tok


def test_a_trial_from_end_to_end(chat):
    cfg = ChronologyConfig(examples=16, tests=6, facts=1, replay=2, epochs=1, sft=SFTConfig(batch_size=2, seq_len=128))
    before = [p.clone() for p in chat[0].parameters()]
    trial = chronology_trial(*chat, world_events(), [dated_row(Dated(MOON, 1980), "none")] * 3, cfg)
    assert all((a == b).all() for a, b in zip(before, chat[0].parameters()))
    assert set(trial["results"]) == {"dated", "control"} and len(trial["results"]["dated"]["things"]["side"]) == 6
    p = not_yet(*chat, trial["splits"]["pairs"])
    assert ((0 <= p) & (p <= 1)).all()
    assert np.allclose(p[:1], not_yet(*chat, trial["splits"]["pairs"][:1]), atol=1e-4)  # padding changes nothing
    assert set(verdicts([trial, trial])) == {"dates are used", "more than a memory"} and len(figure([trial, trial]).axes) == 2
    assert list(dialogues(*chat, MOON, (1950, 2000))) == [1950, 2000]
