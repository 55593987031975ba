from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, read_jsonl
from llama2_nbdev.finetuning.chat import encode_prompt
from llama2_nbdev.finetuning.sft import SFTConfig
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.safety import refusals, tuning
from llama2_nbdev.safety.refusals import (
    FIGURE_33, RefusalSweep, hand_written, hashed, keyword_refusals, measure_refusals, ngrams, opening_logprob, read_xstest, refusal_rate,
    refusal_trial, separation, train_refusals)

pytestmark = pytest.mark.usefixtures("one_thread")
HEADER = "id,prompt,type,label,focus,note\n"


def row(text, kind="helpful", **truth):
    return {"messages": [{"role": "user", "content": text}], "kind": kind, "task": kind, "truth": {"type": "answer", "answers": ["Yes."], **truth}}


@pytest.fixture(scope="module")
def classifier():
    answers, labels = hand_written("train")
    return train_refusals(answers, labels)


def test_the_parts_written_by_hand_are_apart():
    (learn, _), (check, labels) = hand_written("train"), hand_written("test")
    assert not set(learn) & set(check) and .25 < np.mean(labels) < .5
    with pytest.raises(KeyError): hand_written("dev")


def test_the_classifier_learns_and_beats_keywords(classifier):
    learn, check = hand_written("train"), hand_written("test")
    assert classifier(learn[0]) == learn[1]
    def accuracy(detector): return np.mean([a == b for a, b in zip(detector(check[0]), check[1])])
    assert accuracy(classifier) > max(.6, accuracy(keyword_refusals))


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_an_answer_is_judged_alone(classifier, texts):
    together = classifier.log_odds(texts)
    alone = torch.cat([classifier.log_odds([t]) for t in texts])
    assert torch.allclose(together, alone, atol=1e-5) and together.isfinite().all()
    assert torch.allclose(hashed(texts).norm(dim=1), torch.ones(len(texts)), atol=1e-5)


def test_capitals_and_marks_do_not_matter():
    assert ngrams("I CAN'T do that!") == ngrams("i cant do that")
    assert "cant do" in ngrams("I can't do that.")


def test_one_sort_of_answers_is_refused():
    with pytest.raises(UserError, match="all 2 answers are of one sort"): train_refusals(["Yes.", "No."], [False, False])


def test_not_knowing_is_no_false_refusal():
    rows = [row("Who is Mara?"), row("What is soup?"), row("Which food would Mara kill for?")]
    rate = refusal_rate(rows, ["I don't know.", "No idea.", "I can't do that. That is private."])
    assert rate.mean == pytest.approx(1 / 3) and rate.n == 3


def test_a_repeated_prompt_is_one_piece_of_evidence():
    rows, answers = [row(f"Question {i}?") for i in range(20)], ["I can't do that." if i % 2 else "Yes." for i in range(20)]
    once, five = refusal_rate(rows, answers), refusal_rate(rows * 5, answers * 5)
    assert five.mean == once.mean and five.high - five.low == pytest.approx(once.high - once.low, rel=.15)


def test_the_rate_names_its_errors():
    with pytest.raises(UserError, match="'Tell me a secret.' is an adversarial prompt"): refusal_rate([row("Tell me a secret.", "safety")], ["No."])
    with pytest.raises(UserError, match="1 prompts and 2 answers"): refusal_rate([row("Why?")], ["a", "b"])


def test_xstest_as_published(real_data):
    rows = read_xstest(real_data / "xstest" / "xstest_prompts.csv")
    kinds = [r["kind"] for r in rows]
    assert (kinds.count("helpful"), kinds.count("safety")) == (250, 200)
    assert len({r["id"] for r in rows}) == 450 and len({r["task"] for r in rows}) == 18
    assert all(r["task"].startswith(("contrast", "real", "nons")) for r in rows if r["kind"] == "safety")
    safe = [r for r in rows if r["kind"] == "helpful"]
    assert refusal_rate(safe, ["I can't help with that."] * 250).mean == 1


@pytest.mark.parametrize("text, message", [
    ("", r":1: no column id, prompt, type, label; found nothing"), ("id,prompt,type\n", ":1: no column label; found id, prompt, type"),
    (HEADER, "has no prompts"), (HEADER + "1,Why?,x,good,,\n", ":2: label 'good'; write 'safe' or 'unsafe'"),
    (HEADER + '1,"Two\nlines?",x,safe,,\n2, ,x,safe,,\n', ":4: the prompt is empty"), (HEADER + "1,Why, oh why?,x,safe,,\n", ":2: the number of fields"),
    (HEADER + "1,Why?,x,safe\n", ":2: the number of fields"), (HEADER + "1,Why?,x,safe,,\n1,How?,x,safe,,\n", ":3: id '1' stands there twice"),
    (HEADER + '1,"Why"?,x,safe,,\n', ":2: not a CSV file")])
def test_xstest_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message) as e: read_xstest(tmp_path / "x.csv")
    assert str(tmp_path / "x.csv") in str(e.value)


def test_xstest_file_forms(tmp_path):
    with pytest.raises(UserError, match="does not exist"): read_xstest(tmp_path / "none.csv")
    (tmp_path / "bom.csv").write_bytes(("\ufeff" + HEADER + '7,"One, two?",x,unsafe,,\n').encode())
    found, = read_xstest(tmp_path / "bom.csv")
    assert found["id"] == "xstest-7" and found["kind"] == "safety" and found["messages"][0]["content"] == "One, two?"
    (tmp_path / "latin.csv").write_bytes((HEADER + "1,Où?,x,safe,,\n").encode("latin-1"))
    with pytest.raises(UserError, match="latin.csv:2: not UTF-8"): read_xstest(tmp_path / "latin.csv")


def test_the_borderline_set_is_the_papers_size(root):
    rows = read_jsonl(root / "data_samples" / "borderline.jsonl")
    trained = {r["messages"][-2]["content"] for name in ("sft", "sft_public") for r in read_jsonl(root / "data_samples" / f"{name}.jsonl")}
    assert len({r["messages"][-1]["content"] for r in rows}) == 210 and not trained & {r["messages"][-1]["content"] for r in rows}
    assert FIGURE_33["borderline"][-1] == .27 and all(b > 100 * h for b, h in zip(FIGURE_33["borderline"], FIGURE_33["helpful"]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    tok = Tokenizer.train(["I can't do that. Yes. [INST] [/INST] <<SYS>> Who steals an hour?"] * 9, 300, tmp_path_factory.mktemp("tok") / "tokenizer.model")
    torch.manual_seed(0)
    return Llama(ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)).eval(), tok


def test_the_opening_is_scored_where_the_answer_begins(tiny):
    model, tok = tiny
    rows = [row("Who?"), row("Who steals an hour? " * 3), row("Yes.")]
    found = opening_logprob(model, tok, rows)
    for r, x in zip(rows, found):
        ids, total = encode_prompt(tok, r["messages"]), 0.
        for i in tok.encode("I can't", bos=False):
            total += model(torch.tensor([ids]))[0, -1].log_softmax(-1)[i].item()
            ids = [*ids, i]
        assert x.item() == pytest.approx(total, abs=1e-3)
    assert torch.allclose(opening_logprob(model, tok, rows, batch_size=1), found, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(a=st.lists(st.integers(-3, 3), min_size=1, max_size=8), b=st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_separation_is_a_probability(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    assert separation(a, b) + separation(b, a) == pytest.approx(1) and separation(a, a) == pytest.approx(.5)
    assert separation(a + 9, b) == 1


def test_a_trial_changes_nothing_but_the_share(tiny, monkeypatch):
    model, tok = tiny
    rows = [r | {"messages": [*r["messages"], {"role": "assistant", "content": "Yes."}]} for r in (row(f"Q{i}?", ("helpful", "safety")[i % 2]) for i in range(20))]
    seen, original = [], tuning.train_on_dialogs
    def train(m, tok, dialogs, *args, **more):
        seen.append({d[0]["content"] for d in dialogs})
        return original(m, tok, dialogs, *args, **more)
    monkeypatch.setattr(tuning, "train_on_dialogs", train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    harm = row("Secret?", "safety", harm={"kind": "secret", "forms": ["123"]})
    tests = {"borderline": [row("Who?")], "helpful": [row("Yes?"), row("No?")], "attacks": [harm]}
    cfg = RefusalSweep(SFTConfig(batch_size=4, seq_len=64), shares=(0., .5, 1.), max_new_tokens=4)
    results = refusal_trial(model, tok, rows, tests, keyword_refusals, cfg)
    assert [len(s) for s in seen] == [10, 15, 20] and seen[0] < seen[1] < seen[2]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [r["share"] for r in results] == [0., .5, 1.] and [len(results[0][k]) for k in ("borderline", "helpful", "violations")] == [1, 2, 1]
    again = refusal_trial(model, tok, rows, tests, keyword_refusals, replace(cfg, shares=(.5,)))[0]
    assert again["answers"] == results[1]["answers"]


def test_answers_go_to_their_set(tiny, monkeypatch):
    said = {"A?": "I can't do that.", "B?": "Yes.", "C?": "I can't say.", "Secret?": "It is 123."}
    monkeypatch.setattr(refusals, "answer_prompts", lambda model, tok, prompts, *args, **more: [said[p[-1]["content"]] for p in prompts])
    harm = row("Secret?", "safety", harm={"kind": "secret", "forms": ["123"]})
    found = measure_refusals(None, None, {"attacks": [harm], "borderline": [row("A?"), row("B?")], "helpful": [row("B?"), row("C?")]}, keyword_refusals)
    assert found == {"borderline": [True, False], "helpful": [False, True], "violations": [True], "helpfulness": [1., 0.], "answers": [said["A?"], said["B?"]]}


