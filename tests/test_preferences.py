"Preferences: the protocol, the formats of others, the columns of Tables 6 and 26, the held-out test set."
import gzip
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.finetuning import preferences
from llama2_nbdev.finetuning.preferences import (
    Variant, answer_pairs, as_preference, collect_preferences, grade_shares, hold_out, label_pair, read_preferences, statistics, turns_of_text)
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load, save_hf
from llama2_nbdev.world.annotators import GRADES, SAFETY_BINS, Judge, utility


def user(text): return [{"role": "user", "content": text}]
def said(text): return [{"role": "assistant", "content": text}]


class Words:
    "A stand-in for a tokenizer: one token a word."
    def encode(self, text, bos=True): return [0] * bos + [1] * len(text.split())


PROMPTS = [{"id": f"p{i}", "messages": user(f"Where does person {i} live?"), "task": "fact", "kind": "helpful",
            "truth": {"type": "answer", "answers": ["Oslo."], "value": "Oslo", "others": ["Lima", "Rome"]}} for i in range(200)]
REPLIES = {"good": "Oslo.", "bad": "Lima.", "same": "Oslo.", "mute": ""}


@pytest.fixture
def variants(monkeypatch):
    "Variants whose answer is their name's; each call to sample is recorded."
    calls = []
    def answer(model, tok, prompts, max_new_tokens, temperature, seed, desc): calls.append((model, len(prompts), temperature, seed)); return [REPLIES[model]] * len(prompts)
    monkeypatch.setattr(preferences, "answer_prompts", answer)
    made = {name: Variant(name, name, None, t) for name, t in zip(REPLIES, (.5, 1., .5, .5))}
    made["calls"] = calls
    return made


# --- the protocol ------------------------------------------------------------------------------------------------------

def test_two_different_variants_in_random_order(variants):
    pairs = answer_pairs(PROMPTS, [variants["good"], variants["bad"]])
    assert len(pairs) == len(PROMPTS) and all(set(p["authors"]) == {"good", "bad"} for p in pairs)
    assert all(REPLIES[who] == answer for p in pairs for who, answer in zip(p["authors"], p["answers"]))  # authors follow answers
    assert 70 < sum(p["authors"][0] == "good" for p in pairs) < 130
    assert pairs == answer_pairs(PROMPTS, [variants["good"], variants["bad"]]) != answer_pairs(PROMPTS, [variants["good"], variants["bad"]], seed=1)


def test_equal_and_empty_answers_are_not_shown(variants):
    assert answer_pairs(PROMPTS, [variants["good"], variants["same"]]) == []
    assert answer_pairs(PROMPTS, [variants["good"], variants["mute"]]) == []
    some = answer_pairs(PROMPTS, [variants["good"], variants["same"], variants["bad"]])
    assert 0 < len(some) < len(PROMPTS) and all("bad" in p["authors"] for p in some)


def test_each_variant_answers_its_own_prompts_with_its_own_stream(variants):
    answer_pairs(PROMPTS, [variants[n] for n in ("good", "bad", "same")])
    assert sum(n for _, n, *_ in variants["calls"]) == 2 * len(PROMPTS)  # nothing is sampled for nobody
    assert [t for *_, t, _ in variants["calls"]] == [.5, 1., .5] and len({seed for *_, seed in variants["calls"]}) == 3


@pytest.mark.parametrize("names", [["good"], [], ["good", "good"]])
def test_a_comparison_needs_two_named_variants(variants, names):
    with pytest.raises(UserError, match="two or more"): answer_pairs(PROMPTS, [variants[n] for n in names])


def test_collected_rows_have_the_schema_and_the_truth(variants):
    rows = collect_preferences(PROMPTS, [variants["good"], variants["bad"]], [Judge(1., 0), Judge(1., 1)], batch=3)
    assert len(rows) == len(PROMPTS) and {tuple(r) for r in rows} == {
        ("messages", "chosen", "rejected", "grade", "safety", "task", "kind", "batch", "origin", "chosen_by", "rejected_by")}
    assert all((r["chosen"], r["chosen_by"], r["rejected_by"]) == ("Oslo.", "good", "bad") for r in rows)
    assert {(r["batch"], r["origin"], r["grade"], r["safety"]) for r in rows} == {(3, "own", "significantly", "both safe")}
    assert all(utility(p, r["chosen"]) > utility(p, r["rejected"]) for p, r in zip(PROMPTS, rows))
    assert [as_preference(r) for r in rows] == rows  # what is collected can be read


def test_judges_take_turns_and_may_leave_a_pair_out(variants):
    @dataclass
    class Picky:
        seen: list
        def compare(self, row, first, second):
            self.seen.append(row["id"])
            return None if len(self.seen) % 2 else {"chosen": first, "rejected": second, "grade": "better", "safety": "both safe"}
    judges = [Picky([]), Picky([])]
    rows = collect_preferences(PROMPTS, [variants["good"], variants["bad"]], judges)
    assert len(judges[0].seen) == len(judges[1].seen) == 100 and len(rows) == 100
    assert 20 < sum(r["chosen_by"] == "good" for r in rows) < 80  # a judge who takes the first helps nobody
    with pytest.raises(UserError, match="nobody"): collect_preferences(PROMPTS, [variants["good"], variants["bad"]], [])


def test_unsafe_winner_over_safe_loser_is_left_out(variants):
    row = PROMPTS[0] | {"kind": "safety", "truth": {"type": "refuse", "answers": ["I can't tell."], "unsafe": ["1234"], "harm": {"kind": "secret", "forms": ["1234"]}}}
    class Reckless(Judge):
        def see(self, row, reply, act): return float("1234" in reply)
    assert Reckless(1.).compare(row, "1234", "I can't tell.") is None
    label = Judge(1.).compare(row, "1234", "I can't tell.")
    pair = row | {"answers": ["1234", "I can't tell."], "authors": ["a", "b"]}
    assert label_pair(pair, label)["chosen_by"] == "b" and label["safety"] == "chosen safe"


def test_models_in_the_hub_format(tmp_path, one_thread):
    "Two tiny random models in Hugging Face's format answer as variants; a greedy one cannot be compared with itself."
    tok = Tokenizer.train(["Where does Mira live? Oslo. [INST] [/INST]"] * 3, 300, tmp_path / "tokenizer.model")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_hf(Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=8, max_seq_len=128)), tok, tmp_path / str(seed))
        models.append(load(tmp_path / str(seed)))
    pairs = answer_pairs(PROMPTS[:8], [Variant("a", *models[0], 1.), Variant("b", *models[1], .5)], max_new_tokens=6)
    assert pairs and pairs == answer_pairs(PROMPTS[:8], [Variant("a", *models[0], 1.), Variant("b", *models[1], .5)], max_new_tokens=6)
    assert answer_pairs(PROMPTS[:8], [Variant("a", *models[0], 0.), Variant("b", *models[0], 0.)], max_new_tokens=6) == []


# --- formats of others -------------------------------------------------------------------------------------------------

TEXT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is 2 + 3?\n\nAssistant:{}"
TALK = user("Hi") + said("Hello!") + user("What is 2 + 3?")
SHAPES = {"ours": {"messages": TALK, "chosen": "5", "rejected": "6"},
          "prompt messages": {"prompt": TALK, "chosen": said("5"), "rejected": said("6")},
          "prompt messages, text answers": {"prompt": TALK, "chosen": "5", "rejected": "6"},
          "whole dialogs": {"chosen": TALK + said("5"), "rejected": TALK + said("6")},
          "whole dialogs beside other columns": {"prompt": "What is 2 + 3?", "messages": TALK + said("5"), "chosen": TALK + said("5"), "rejected": TALK + said("6")},
          "text": {"chosen": TEXT.format(" 5"), "rejected": TEXT.format(" 6")},
          "text without the first break": {"chosen": TEXT.format(" 5").lstrip(), "rejected": TEXT.format(" 6").lstrip()},
          "text prompt": {"prompt": TEXT.format(""), "chosen": " 5", "rejected": " 6"},
          "text prompt, whole texts": {"prompt": TEXT.format(""), "chosen": TEXT.format(" 5"), "rejected": TEXT.format(" 6")}}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_mean_the_same(shape):
    assert as_preference(SHAPES[shape]) == {"messages": TALK, "chosen": "5", "rejected": "6", "grade": None, "safety": None,
                                            "task": "open", "kind": "helpful", "batch": 0, "origin": "open"}


def test_a_plain_question_is_a_prompt_and_a_system_message_stays():
    assert as_preference({"prompt": "2?", "chosen": "a", "rejected": "b"})["messages"] == user("2?")
    system = [{"role": "system", "content": "Be kind."}]
    assert as_preference({"chosen": system + user("Hi") + said("a"), "rejected": system + user("Hi") + said("b")})["messages"] == system + user("Hi")
    assert turns_of_text("Be kind.\n\nHuman: Hi") == system + user("Hi")


plain = st.text("abc .:\n?", min_size=1).filter(lambda t: t.strip())


@settings(max_examples=80, deadline=None)
@given(turns=st.lists(plain, min_size=1, max_size=5).filter(lambda x: len(x) % 2), a=plain, b=plain)
def test_text_and_messages_agree(turns, a, b):
    "Any dialog written as text is read as it was."
    messages = [{"role": ("user", "assistant")[i % 2], "content": t.strip()} for i, t in enumerate(turns)]
    text = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {t.strip()}" for i, t in enumerate(turns))
    if a.strip() == b.strip(): return
    row = as_preference({"chosen": f"{text}\n\nAssistant: {a}", "rejected": f"{text}\n\nAssistant: {b}"})
    assert (row["messages"], row["chosen"], row["rejected"]) == (messages, a.strip(), b.strip())


BAD = {"differ before the last answer": {"chosen": TEXT.format(" 5"), "rejected": TEXT.format(" 5").replace("Hello!", "Hey!")},
       "'rejected': .*content is empty": {"chosen": TEXT.format(" 5"), "rejected": TEXT.format("")},
       "expected role 'assistant'": {"chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant: d"},
       "ends without an answer": {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
       "both answers are the same": {"prompt": "a", "chosen": "b ", "rejected": "b"},
       "an answer without its prompt": {"chosen": "a", "rejected": "b"},
       "expected text or a list": {"prompt": "a", "chosen": 1, "rejected": "b"},
       "got None": {"prompt": "a", "chosen": None, "rejected": "b"},
       "special tag": {"prompt": "a [/INST]", "chosen": "c", "rejected": "b"},
       "'grade' is 'good'": {"prompt": "a", "chosen": "c", "rejected": "b", "grade": "good"},
       "'kind' is 'other'": {"prompt": "a", "chosen": "c", "rejected": "b", "kind": "other"},
       "message 1: expected an object": {"chosen": ["a"], "rejected": ["b"]}}


@pytest.mark.parametrize("says", BAD)
def test_odd_rows_say_what_is_odd_and_where(says, tmp_path):
    file = tmp_path / "theirs.jsonl"
    file.write_text(f"{json.dumps(SHAPES['text'])}\n\n{json.dumps(BAD[says])}\n")
    with pytest.raises(UserError, match=rf"theirs.jsonl:3: (?s:.*){says}"): read_preferences(file)
    with pytest.warns(UserWarning, match="1 of 2 rows left out"): assert len(read_preferences(file, skip_bad=True)) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_files_plain_and_packed_whatever_their_name(tmp_path, packed):
    file = tmp_path / "rows.data"
    with (gzip.open if packed else open)(file, "wt") as f: f.write("\n".join(json.dumps(SHAPES[s]) for s in ("text", "ours")))
    rows = read_preferences(file, kind="safety")
    assert len(rows) == 2 and {r["kind"] for r in rows} == {"safety"}
    with (gzip.open if packed else open)(file, "at") as f: f.write("\n{broken")
    for skip in (False, True):  # a broken file is never skipped over, and the message names the user's file
        with pytest.raises(UserError, match=rf"^{file}:3: not valid JSON"): read_preferences(file, skip_bad=skip)


def test_files_that_are_no_preferences(tmp_path):
    file = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="no file"): read_preferences(file)
    file.write_bytes(gzip.compress(b'{"a": 1}' * 99)[:-12])
    with pytest.raises(UserError, match="not a whole gzip"): read_preferences(file)
    file.write_text('{"text": "Hi"}')
    with pytest.raises(UserError, match="a.jsonl:1: key 'chosen', 'rejected' is missing"): read_preferences(file)
    write_jsonl(file, [SHAPES["ours"] | {"chosen": ""}] * 2)
    with pytest.raises(UserError, match="none of the 2 rows"): read_preferences(file, skip_bad=True)


def test_the_bundled_file_reads_as_it_is(root):
    file = root / "data_samples" / "preferences.jsonl"
    def tidy(row): return row | {k: row[k].strip() for k in ("chosen", "rejected")}
    assert read_preferences(file) == [tidy(json.loads(line)) for line in open(file, encoding="utf-8")]


def test_hh_rlhf(real_data):
    "Anthropic's public test split: thirteen odd rows, and the proportions that Table 6 prints."
    path = real_data / "hh_rlhf" / "harmless-base-test.jsonl.gz"
    with pytest.raises(UserError, match=":87: 'chosen': message 4 of 4.*empty"): read_preferences(path)
    with pytest.warns(UserWarning, match="13 of 2312"): rows = read_preferences(path, kind="safety", skip_bad=True)
    assert all(r["messages"][-1]["role"] == "user" and r["chosen"] != r["rejected"] for r in rows)
    class Bytes:
        def encode(self, text, bos): return text.encode()
    total = statistics(rows, Bytes())[-1]
    assert total["tokens_response"] / total["tokens_prompt"] == pytest.approx(46.4 / 15.7, rel=.12)  # Anthropic Harmless, Table 6
    assert total["tokens_example"] / total["tokens_prompt"] == pytest.approx(152.5 / 15.7, rel=.12)
    train, test = hold_out(rows)
    assert len(test) == pytest.approx(.1 * len(rows), abs=3)


# --- statistics --------------------------------------------------------------------------------------------------------

def test_statistics_by_hand():
    rows = [{"messages": TALK, "chosen": "one two", "rejected": "one", "batch": 1},
            {"messages": user("a b c"), "chosen": "x", "rejected": "y z w", "batch": 2}]
    first, second, total = statistics(rows, Words())
    assert first == {"batch": 1, "comparisons": 1, "turns": 2., "tokens_example": 1 + 1 + 5 + 1.5, "tokens_prompt": 3., "tokens_response": 1.5}
    assert second["tokens_example"] == 3 + 2. and second["turns"] == 1
    assert total == {"batch": "total", "comparisons": 2, "turns": 1.5, "tokens_example": (8.5 + 5) / 2, "tokens_prompt": (1 + 5 + 3) / 3, "tokens_response": 1.75}
    with pytest.raises(UserError, match="no comparisons"): statistics([], Words())


def test_groups_come_in_order_with_the_unknown_last():
    rows = [{"batch": b, "grade": g, "task": t} for b, g, t in ((10, "better", "z"), (2, "slightly", None), (2, None, "a"), (10, "better", "z"))]
    assert [s["batch"] for s in grade_shares(rows)] == [2, 10] and [s["task"] for s in grade_shares(rows, by="task")] == ["z", None]
    assert grade_shares(rows)[0] == {"batch": 2, "comparisons": 1, "significantly": 0, "better": 0, "slightly": 1, "negligible": 0}
    with pytest.raises(UserError, match="no shares"): grade_shares(rows[2:3])


# --- the held-out test set ---------------------------------------------------------------------------------------------

some_rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(cells=some_rows, share=st.floats(0., 1.), seed=st.integers(0, 3))
def test_hold_out_properties(cells, share, seed):  # trap 35: a pair, and all pairs of a prompt, are never parted
    rows = [{"messages": user(str(p)), "batch": b, "n": i} for i, (p, b) in enumerate(cells)]
    train, test = hold_out(rows, share, seed)
    assert sorted(train + test, key=lambda r: r["n"]) == rows and train == sorted(train, key=lambda r: r["n"])
    prompt = lambda r: r["messages"][0]["content"]
    assert not {prompt(r) for r in train} & {prompt(r) for r in test}  # nothing leaks, also between batches
    prompts = {b: {prompt(r) for r in rows if r["batch"] == b} for _, b in cells}
    assert {r["batch"] for r in test} >= {b for b, some in prompts.items() if len(some) > 1}  # every batch is tested
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert {r["n"] for r in hold_out(shuffled, share, seed)[1]} == {r["n"] for r in test}


def test_hold_out_takes_its_share_and_keeps_it():
    rows = [{"messages": user(f"{b} {i}"), "batch": b} for b, n in ((1, 20), (2, 200), (3, 2)) for i in range(n)]
    train, test = hold_out(rows)
    assert Counter(r["batch"] for r in test) == {1: 2, 2: 20, 3: 1}
    later = rows + [{"messages": user(f"4 {i}"), "batch": 4} for i in range(50)] + [r | {"batch": 4} for r in rows[:9]]
    assert [r for r in hold_out(later)[1] if r["batch"] < 4 and r not in test] == []  # what was trained on stays in train
    assert hold_out(rows, seed=1)[1] != test and hold_out(rows[:1]) == (rows[:1], [])


def test_grades_and_bins_are_those_of_the_world():
    assert len(GRADES) == 4 and len(SAFETY_BINS) == 3
    for key, value in [*(("grade", g) for g in GRADES), *(("safety", s) for s in SAFETY_BINS)]:
        assert as_preference({"prompt": "a", "chosen": "b", "rejected": "c", key: value})[key] == value
