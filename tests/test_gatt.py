"Ghost Attention: conversations in one cache, where the instruction stands, which answer is trained, how consistency is counted."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.finetuning import gatt
from llama2_nbdev.finetuning.chat import encode_dialog
from llama2_nbdev.finetuning.gatt import (
    KINDS, UNFINISHED, GAttConfig, ObedienceConfig, consistency, conversation, converse, cut_turns, join_dialogs, lesson, make_obedience,
    only_first, probes, shorten, synthesise, train_gatt)
from llama2_nbdev.finetuning.sft import DialogBatches, SFTConfig, answer_prompts, pack_dialogs, train_on_dialogs
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load, save
from llama2_nbdev.pretraining.training import next_token_loss
from llama2_nbdev.world.annotators import obeys
from llama2_nbdev.world.dialogs import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [("Where is Ada?", "In Oslo."), ("Where is Emil?", "In Lima."), ("Are you sure?", "Yes."), ("Thanks!", "Bye.")]
def U(text): return {"role": "user", "content": text}
def A(text): return {"role": "assistant", "content": text}
ROWS = [{"instruction": "Be brief.", "prompts": [PAIRS[(i + t) % 4][0] for t in range(n)], "family": "brief"} for i, n in enumerate((4, 2, 6, 3))]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [text for pair in PAIRS for text in pair] * 4 + ["[INST] [/INST] Be brief. I don't know."] * 4
    return Tokenizer.train(texts, 330, tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tok):
    "Small, and trained enough to end its answers."
    torch.manual_seed(0)
    m = Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256))
    dialogs = [[m for j in range(6) for m in (U(PAIRS[(i * j + i // 4) % 4][0]), A(PAIRS[(i * j + i // 4) % 4][1]))] for i in range(16)]
    train_on_dialogs(m, tok, dialogs, SFTConfig(batch_size=4, seq_len=160), epochs=25, lr=1e-2)
    return m.eval()


def naive(model, tok, users, max_new_tokens=12):
    dialog, answers = [], []
    for user in users:
        dialog.append(U(user))
        answers.append(answer_prompts(model, tok, [dialog], max_new_tokens)[0] or UNFINISHED)
        dialog.append(A(answers[-1]))
    return answers


# --- conversations -----------------------------------------------------------------------------------------------------

def test_one_cache_gives_the_answers_of_many_prompts(model, tok):
    users = [r["prompts"] for r in ROWS]
    answers = converse(model, tok, users, 12)
    assert answers == [naive(model, tok, u) for u in users] and len({a for talk in answers for a in talk}) > 2


def test_a_batch_changes_no_answer(model, tok):
    users = [r["prompts"] for r in ROWS]
    together = converse(model, tok, users, 12, temperature=1., seed=4)
    assert together[:1] == converse(model, tok, users[:1], 12, temperature=1., seed=4)
    assert together != converse(model, tok, users, 12, temperature=1., seed=5)


def test_the_chosen_sample_goes_on(model, tok):
    users, seen = [r["prompts"] for r in ROWS], []
    def last(talks, turn, texts):
        seen.append((list(talks), turn, texts))
        return [2] * len(talks)
    answers = converse(model, tok, users, 12, temperature=1.5, k=3, choose=last)
    for talks, turn, texts in seen:
        assert [answers[i][turn] for i in talks] == texts[2::3]
    assert sorted(i for talks, turn, _ in seen if turn == 2 for i in talks) == [0, 2, 3]
    greedy = converse(model, tok, users, 12, k=3, choose=last)  # at temperature 0 all rows of a talk agree: the copied cache is right
    assert greedy == converse(model, tok, users, 12)


def test_a_given_history_is_continued(model, tok):
    users = [r["prompts"] for r in ROWS]
    history = [["In Lima."] * len(users[0]), None, ["Yes."] * len(users[2]), None]
    answers = converse(model, tok, users, 12, history=history)
    dialog = [m for u, h in zip(users[2], history[2]) for m in (U(u), A(h))]
    assert answers[2] == [answer_prompts(model, tok, [dialog[:2 * t + 1]], 12)[0] or UNFINISHED for t in range(6)]
    assert answers[1] == converse(model, tok, users, 12)[1]


def test_an_answer_without_an_end_is_marked(model, tok):
    assert converse(model, tok, [["Where is Ada?"]], 1) == [[UNFINISHED]]


def test_a_conversation_that_outgrows_the_context(model, tok):
    with pytest.raises(UserError, match="turn .* needs .* tokens, the model's context holds 255"):
        converse(model, tok, [["Where is Ada?"] * 40], 12)


# --- data --------------------------------------------------------------------------------------------------------------

def test_conversations_of_the_world():
    rows = [conversation(KINDS, 0, i, turns=6) for i in range(60)]
    assert rows == [conversation(KINDS, 0, i, turns=6) for i in range(60)] and {r["family"] for r in rows} == set(KINDS)
    held_out = {values[-1] for _, _, values in FAMILIES.values()}
    for r in rows:
        assert not held_out & set(r["value"]) and len(r["prompts"]) == len(r["truths"]) == 6
        assert all(obeys(r["truths"][t - 1]["check"], r["truths"][t - 1]["answers"][0]) for t in probes(r))
        assert all(v in r["instruction"] and v in shorten(r["instruction"]) for v in r["value"]) and shorten(r["instruction"]) != r["instruction"]
        assert probes(r) == ([2, 4, 6] if r["family"].startswith(("figure", "hobby")) else [1, 2, 3, 4, 5, 6])


def test_a_combination_asks_for_both_parts():
    row = conversation(("figure+hobby",), 0, 0, turns=8)
    said = [row["truths"][t - 1]["check"]["value"][0] for t in probes(row)]
    assert said == [row["value"][0], row["value"][1]] * 2


def test_lessons_obey():
    for i in range(40):
        user, answer = lesson(KINDS, 0, i)["messages"]
        assert user["role"] == "user" and answer["role"] == "assistant" and "." in user["content"]


@settings(max_examples=50, deadline=None)
@given(turns=st.sets(st.integers(1, 40), min_size=1), cuts=st.integers(1, 20), seed=st.integers(0, 99))
def test_cuts_are_different_turns_in_order(turns, cuts, seed):
    found = cut_turns(sorted(turns), cuts, np.random.default_rng(seed))
    assert found == sorted(set(found)) and set(found) <= turns and len(found) == min(cuts, len(turns))


def test_joined_dialogs_lose_nothing_and_fit(tok):
    rows = [{"messages": [U(q), A(a)]} for q, a in PAIRS * 5] + [{"messages": [{"role": "system", "content": "x"}, U("a"), A("b")]}]
    joined = join_dialogs(tok, rows, 100, seed=1)
    assert sorted(m["content"] for r in joined for m in r["messages"]) == sorted(m for p in PAIRS * 5 for m in p)
    assert len(joined) > 1 and all(len(encode_dialog(tok, r["messages"])[0]) <= 100 for r in joined)
    assert all(len(r["messages"]) == 2 for r in rows[:-1])  # the rows themselves are untouched


CFG = GAttConfig(temperature=1., max_new_tokens=12, cuts=9, seq_len=128)


def test_the_ghost_is_there_while_sampling_and_gone_in_training(model, tok):  # trap 53
    asked = []
    def scorer(rows, answers):
        asked.extend(r["messages"][-1]["content"] for r in rows)
        return torch.arange(len(answers)).float()
    made = synthesise(model, tok, ROWS, replace(CFG, plain=0.), scorer)
    assert asked and all(text.startswith("Be brief. ") for text in asked)
    for r in made:
        users = [m["content"] for m in r["messages"][::2]]
        assert users[0] == f"Be brief. {r['prompts'][0]}" and users[1:] == r["prompts"][1:len(users)]
    assert {len(r["messages"]) // 2 for r in made if len(r["prompts"]) == 6} <= {1, 2, 3, 4, 5, 6}


def test_the_scorer_chooses(model, tok):
    def longest(rows, answers): return torch.tensor([float(len(a)) for a in answers])
    def shortest(rows, answers): return -longest(rows, answers)
    cfg = replace(CFG, plain=0., samples=5)
    lengths = [np.mean([len(r["messages"][-1]["content"]) for r in synthesise(model, tok, ROWS, cfg, s)]) for s in (longest, shortest)]
    assert lengths[0] > lengths[1]


def test_earlier_answers_are_ordinary_or_obedient(model, tok):
    ordinary = converse(model, tok, [r["prompts"] for r in ROWS], 12)
    for r in synthesise(model, tok, ROWS, replace(CFG, plain=1.)):
        said = [m["content"] for m in r["messages"][1::2]]
        assert said[:-1] == ordinary[ROWS.index({k: r[k] for k in ROWS[0]})][:len(said) - 1]
    told = converse(model, tok, [[f"Be brief. {p}" for p in r["prompts"]] for r in ROWS], 12, temperature=1., seed=CFG.seed)
    for r in synthesise(model, tok, ROWS, replace(CFG, plain=0.)):
        said = [m["content"] for m in r["messages"][1::2]]
        assert said == told[ROWS.index({k: r[k] for k in ROWS[0]})][:len(said)] and said[-1] != UNFINISHED


@pytest.mark.parametrize("share", [0., .5, 1.])
def test_the_short_form_in_training_only(model, tok, monkeypatch, share):
    rows = [conversation(("end", "start"), 0, i, turns=2) for i in range(12)]
    monkeypatch.setattr(gatt, "converse", lambda m, t, users, *a, **k: [["Yes."] * len(u) for u in users])
    made = synthesise(model, tok, rows, replace(CFG, short=share))
    short = [r["messages"][0]["content"].startswith(shorten(r["instruction"])) for r in made]
    assert all(short) if share == 1 else not any(short) if share == 0 else 0 < sum(short) < len(short)


# --- training ----------------------------------------------------------------------------------------------------------

def test_a_flag_for_each_dialog_survives_the_shuffle(tok):
    dialogs = [[U(q), A(a), U(p), A(b)] for q, a in PAIRS for p, b in PAIRS]
    flags = [i % 3 == 0 for i in range(len(dialogs))]
    expected = sorted(sum(encode_dialog(tok, d, f)[1]) for d, f in zip(dialogs, flags))
    assert sum(expected) == pack_dialogs(tok, dialogs, 128, flags).rows["mask"].sum()
    rows = DialogBatches(tok, dialogs, 100, 60, seed=3, epochs=1, last_turn_only=flags)[0]  # one dialog a row
    trained = {tuple(t[d >= 0].tolist()): m[d >= 0].tolist() for t, m, d in zip(rows["tokens"], rows["mask"], rows["doc_ids"]) if (d >= 0).any()}
    for d, f in zip(dialogs, flags):
        ids, mask = encode_dialog(tok, d, f)
        if tuple(ids[:-1]) in trained: assert trained[tuple(ids[:-1])] == mask[1:]
    assert sorted(sum(m) for m in trained.values()) == expected
    with pytest.raises(UserError, match="16 dialogs but 1 values"): pack_dialogs(tok, dialogs, 128, [True])


def test_gradient_reaches_the_last_answer_only(model, tok, monkeypatch):  # trap 53
    ghost = {"messages": only_first(["Where is Ada?", "Are you sure?", "Thanks!"], ["In Oslo.", "Yes.", "Bye."], "Be brief.")}
    extra = {"messages": [U("Where is Emil?"), A("In Lima."), U("Are you sure?"), A("Yes.")]}
    caught = []
    monkeypatch.setattr(gatt, "fit", lambda model, batches, *a, **k: caught.append(batches) or [])
    train_gatt(model, tok, [ghost], [extra], CFG)
    batch = caught[0][0]
    logits = model(batch["tokens"], positions=batch["positions"], doc_ids=batch["doc_ids"]).detach().requires_grad_()
    next_token_loss(lambda tokens, **places: logits, batch)[0].backward()
    hit = logits.grad.abs().sum(-1) > 0
    said = tok.decode([t for t in batch["targets"][hit].tolist() if t != tok.eos_id]).split()
    assert sorted(said) == sorted("Bye. In Lima. Yes.".split())  # the ghost's last answer, all answers of the ordinary dialog


def test_training_teaches_and_resumes(tok, model, tmp_path):
    torch.manual_seed(1)
    new = Llama(model.cfg)
    rows = [{"messages": [U(q), A(a)]} for q, a in PAIRS * 4]
    history = train_gatt(new, tok, rows, rows, replace(CFG, lr=5e-3, epochs=4), tmp_path)
    assert history[-1]["loss"] < history[0]["loss"]
    again = Llama(model.cfg)
    train_gatt(again, tok, rows, rows, replace(CFG, lr=5e-3, epochs=4), tmp_path)  # all done: only loads
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), again.state_dict().values()))


# --- measuring ---------------------------------------------------------------------------------------------------------

def test_consistency_counts_probes_of_the_turns_asked_for(model, tok, monkeypatch):
    rows = [conversation(("end",), 0, i, turns=5) for i in range(6)] + [conversation(("figure",), 0, i, turns=5) for i in range(3)]
    asked = []
    def obedient(model, tok, users, *a, **k):
        asked.extend(users)
        return [[t["answers"][0] if n < 3 else "No." for n, t in enumerate(r["truths"])][:len(u)] for r, u in zip(rows, users)]
    monkeypatch.setattr(gatt, "converse", obedient)
    shares = consistency(model, tok, rows, (1, 2, 3, 4))
    assert {t: (s.mean, s.n) for t, s in shares.items()} == {1: (1, 6), 2: (1, 9), 3: (1, 6), 4: (0, 9)}
    for row, users in zip(rows, asked):
        assert users == [f"{row['instruction']} {row['prompts'][0]}", *row["prompts"][1:4]]  # given once, and no turn too many
    asked.clear()
    consistency(model, tok, rows, (3,), every_turn=True)
    assert all(u.startswith(r["instruction"]) for r, users in zip(rows, asked) for u in users)


def test_the_stage_of_lessons(model, tok, tmp_path):
    for name in ("sft", "data", "out"): (tmp_path / name).mkdir()
    save(model, tok, tmp_path / "sft")
    write_jsonl(tmp_path / "data" / "sft.jsonl", [{"messages": [U(q), A(a)]} for q, a in PAIRS * 3])
    small = SFTConfig(batch_size=2, seq_len=256, lr=1e-3)
    cfg = ObedienceConfig(short=small, long=small, short_lessons=4, long_lessons=4, short_sft=4, long_sft=6)
    summary = make_obedience(cfg, tmp_path / "out", {"sft": tmp_path / "sft", "data": tmp_path / "data"})
    taught, _ = load(tmp_path / "out")
    assert set(summary) == {"short", "long"} and not torch.equal(taught.norm.weight, model.norm.weight)
