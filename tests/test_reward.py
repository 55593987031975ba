"Reward models: loss and margins, the place of the score, pairs that stay together, data mixes, the stage; traps 32 to 36."
import json
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, read_jsonl, write_jsonl
from llama2_nbdev.finetuning import reward
from llama2_nbdev.finetuning.chat import Message, encode_dialog
from llama2_nbdev.finetuning.reward import (
    MARGIN_LARGE, MARGIN_SMALL, MARGINS, PairBatches, RewardConfig, RewardModel, RewardStageConfig, accuracy, accuracy_by_grade, draw,
    encode_answer, epoch_batches, helpfulness_mix, load_reward, margin_ranking_loss, pad_rows, pair_loss, safety_mix, save_reward,
    score_answers, score_pairs, train_pair_of_rewards, train_reward, train_rewards, wins)
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load, save
from llama2_nbdev.pretraining.training import TrainConfig, set_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = "Mira Otto Lena Paul Nora Emil Ada Hugo Ines Karl Lara Max".split()
GRADES, BINS = list(MARGIN_SMALL), ["chosen safe", "both safe", "both unsafe"]


def user(text): return {"role": "user", "content": text}


def pairs(n, kind="helpful", origin="own", batches=3):
    "Pairs in which the polite answer wins."
    return [{"messages": [user(f"Where does {NAMES[i % 12]} live, number {i}?")], "chosen": "In Oslo, I think." if i % 3 else "In Oslo.",
             "rejected": "No." if i % 2 else "Go away and ask Otto.", "grade": GRADES[i % 4], "safety": BINS[i % 3], "task": "fact",
             "kind": kind, "batch": i % batches, "origin": origin} for i in range(n)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [r[k] for r in pairs(12) for k in ("chosen", "rejected")] * 3 + ["Where does he live, number 1 2 3 ? [INST] [/INST] <<SYS>> <</SYS>>"]
    return Tokenizer.train(texts, 320, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def llama(tok, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)
    return Llama(ModelConfig(**shape | changes))


def new_model(tok, seed=0, **changes): return RewardModel(llama(tok, seed, **changes)).eval()


QUICK = RewardConfig(batch_size=4, lr=3e-3, train=TrainConfig(steps=1, lr=1., warmup=0, dtype="float32", checkpoint_every=2))


# --- loss ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("margin, nats", [(0, .6931), (1 / 3, .8736), (2 / 3, 1.0810), (1, 1.3133), (2, 2.1269), (3, 3.0486)])
def test_loss_of_equal_scores(margin, nats):  # trap 34
    assert margin_ranking_loss(torch.zeros(1), torch.zeros(1), margin).item() == pytest.approx(nats, abs=5e-5)


def test_margin_tables_are_those_of_the_paper():  # Table 27
    assert MARGIN_SMALL == {"significantly": 1, "better": 2 / 3, "slightly": 1 / 3, "negligible": 0}
    assert MARGIN_LARGE == {"significantly": 3, "better": 2, "slightly": 1, "negligible": 0}
    assert MARGINS["none"].get("significantly", 0.) == 0


numbers = st.floats(-50, 50)


@settings(max_examples=60, deadline=None)
@given(numbers, numbers, st.floats(0, 5), st.floats(-30, 30))
def test_loss_properties(c, r, m, shift):
    one = lambda *x: margin_ranking_loss(*(torch.tensor(v, dtype=torch.double) for v in x)).item()
    loss = one(c, r, m)
    assert loss == pytest.approx(math.log1p(math.exp(-abs(c - r - m))) + max(0., -(c - r - m)), abs=1e-9)
    assert one(c + shift, r + shift, m) == pytest.approx(loss, abs=1e-9)  # only the difference counts
    assert one(c, r, m + 1) >= loss and math.isfinite(one(-1e4, 1e4, 3.))  # inside the sigmoid; never infinite


def test_margin_moves_the_gradient():  # trap 34: outside the sigmoid it would not
    gap = torch.linspace(-4, 6, 11, requires_grad=True)
    plain, large = (torch.autograd.grad(margin_ranking_loss(gap, torch.zeros(11), m).sum(), gap)[0] for m in (0., 3.))
    assert (large < plain).all()


@pytest.mark.parametrize("margin", [None, [1., 2 / 3, 0.], [3., 2., 0.]])
def test_equal_to_trl(margin):  # traps 34 and 35: what trl's trainer computes from the same scores
    trainer = pytest.importorskip("trl").RewardTrainer
    c, r = torch.tensor([1.5, -.2, .3]), torch.tensor([.5, .4, .3])
    gather = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    stub = SimpleNamespace(model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=None), accelerator=gather,
                           _total_train_tokens=0, _tp_size=1, _metrics={"train": defaultdict(list)})
    inputs = {"attention_mask": torch.ones(6, 1)} | ({} if margin is None else {"margin": torch.tensor(margin)})
    model = lambda **_: SimpleNamespace(logits=torch.cat([c, r])[:, None])
    theirs = trainer.compute_loss(stub, model, inputs)
    ours = margin_ranking_loss(c, r, 0. if margin is None else torch.tensor(margin)).mean()
    torch.testing.assert_close(ours, theirs)
    assert stub._metrics["train"]["accuracy"][0] == pytest.approx(1 / 3) and wins(torch.stack([c, r], 1)).tolist() == [1, 0, .5]


# --- the model -----------------------------------------------------------------------------------------------------------

def test_head_starts_small_and_right_half_of_the_time(tok):  # trap 33
    heads = torch.cat([new_model(tok, s).head.weight for s in range(60)])
    assert heads.std().item() == pytest.approx(33 ** -.5, rel=.1) and abs(heads.mean()) < .02
    model, rows = new_model(tok), pairs(40)
    assert model.head.bias is None and not list(model.llama.output.parameters())
    before = []
    for s in range(30):
        torch.manual_seed(s); torch.nn.init.normal_(model.head.weight)
        before.append(wins(score_pairs(model, tok, rows)).mean())
    assert abs(sum(before) / 30 - .5) < .15


def test_body_is_the_chat_models(tok):
    chat = llama(tok)
    body = {k: v.clone() for k, v in chat.state_dict().items()}
    model = RewardModel(chat)
    assert all(torch.equal(v, body[k]) for k, v in model.llama.state_dict().items()) and model.llama is chat


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 300), st.integers(0, 99))
def test_score_does_not_depend_on_padding(tok, sizes, extra, filler, seed):  # trap 32
    model, g = new_model(tok), torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 3, (n,), generator=g).tolist() for n in sizes]  # full of BOS and EOS, also inside
    tokens, lengths = pad_rows(rows)
    wide = torch.full((len(rows), tokens.shape[1] + extra), filler)
    for w, row in zip(wide, rows): w[:len(row)] = torch.tensor(row)
    with torch.no_grad():
        together, alone = model(wide, lengths), torch.cat([model(torch.tensor([r]), torch.tensor([len(r)])) for r in rows])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.values(tokens)[range(len(rows)), lengths - 1], alone, atol=1e-5, rtol=0)


def test_score_is_read_at_the_last_eos_of_many(tok):  # trap 32: neither the first EOS nor the token before the padding
    model = new_model(tok)
    dialog = [Message("user", "Hi"), Message("assistant", "In Oslo."), Message("user", "No?"), Message("assistant", "No.")]
    ids = encode_dialog(tok, dialog)[0]
    assert ids.count(tok.eos_id) == 2
    with torch.no_grad(): values = model.values(torch.tensor([ids]))[0]
    score = score_answers(model, tok, [dialog[:3]], ["No."])[0]
    torch.testing.assert_close(score, values[-1], atol=1e-5, rtol=0)
    assert abs(score - values[ids.index(tok.eos_id)]) > 1e-3 and abs(score - values[-2]) > 1e-3


def test_one_score_a_sequence(tok):  # trap 36: scores at other positions do not enter the loss
    class Spy(RewardModel):
        def values(self, tokens): return super().values(tokens) + torch.rand(tokens.shape) * (torch.arange(tokens.shape[1]) < 5)
    batch = PairBatches(tok, pairs(4), 4)[0]
    losses = [pair_loss()(cls(llama(tok)), batch)[0].item() for cls in (RewardModel, Spy)]
    assert losses[0] == pytest.approx(losses[1])


def test_scores_are_fp32_under_autocast(tok):
    model, (tokens, lengths) = new_model(tok), pad_rows([[1, 5, 6, 2]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): score = model(tokens, lengths)
    assert score.dtype == torch.float32 and score.item() != score.bfloat16().float().item()


def test_tied_embeddings_are_no_obstacle(tok, tmp_path):
    model = new_model(tok, tie_embeddings=True)
    save_reward(model, tok, tmp_path)
    again, _ = load_reward(tmp_path)
    assert torch.equal(score_pairs(again, tok, pairs(3)), score_pairs(model, tok, pairs(3)))


# --- pairs in batches ----------------------------------------------------------------------------------------------------

def test_encoding_keeps_answer_and_system_message(tok):
    dialog = [{"role": "system", "content": "Be kind."}, user("Where? " * 9), {"role": "assistant", "content": "No."}, user("Who?")]
    whole = encode_answer(tok, dialog, " In Oslo. ", 500)
    assert whole == encode_dialog(tok, [*dialog, {"role": "assistant", "content": "In Oslo."}])[0] and whole[-1] == tok.eos_id
    short = encode_answer(tok, dialog, "In Oslo.", len(whole) - 1)
    assert short == encode_dialog(tok, [dialog[0], dialog[3], {"role": "assistant", "content": "In Oslo."}])[0]
    assert encode_answer(tok, dialog, "In Oslo.", 5) == short[-5:]
    assert encode_answer(tok, [Message(**m) for m in dialog], "", 500)[-1] == tok.eos_id


@pytest.mark.parametrize("n, size", [(1, 4), (7, 3), (40, 8), (41, 8), (3, 100)])
def test_an_epoch_has_every_pair_once_and_never_parts_one(tok, n, size):  # trap 35
    rows = pairs(n)
    batches = PairBatches(tok, rows, size, epochs=2)
    assert len(batches) == 2 * math.ceil(n / size)
    wanted = sorted(tuple(encode_answer(tok, r["messages"], r[k], 512) for k in ("chosen", "rejected")) for r in rows)
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            b = batches[step]
            assert b["tokens"].shape[:2] == b["lengths"].shape == b["unsafe"].shape and len(b["margin"]) <= size
            seen += [tuple(t[:k].tolist() for t, k in zip(*two)) for two in zip(b["tokens"], b["lengths"])]
        assert sorted(seen) == wanted
    with pytest.raises(IndexError): batches[len(batches)]


def test_batches_are_a_function_of_seed_and_step(tok):
    a, b, other = (PairBatches(tok, pairs(30), 4, seed=s, epochs=2) for s in (0, 0, 1))
    jumped = {i: b[i] for i in torch.randperm(len(a)).tolist()}
    assert all(torch.equal(a[i][k], jumped[i][k]) for i in range(len(a)) for k in a[i])
    same = lambda x, y: x["tokens"].shape == y["tokens"].shape and torch.equal(x["tokens"], y["tokens"])
    assert not all(same(a[i], other[i]) for i in range(len(a))) and not all(same(a[i], a[i + 8]) for i in range(8))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_whole_pairs(tok, world):  # trap 35
    batches = PairBatches(tok, pairs(10), 4)
    for step in range(len(batches)):
        parts = [batches.slice(r, world)[step] for r in range(world)]
        for key in ("lengths", "margin", "unsafe"): assert torch.equal(torch.cat([p[key] for p in parts]), batches[step][key])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=300), st.integers(1, 40))
def test_similar_lengths_share_a_batch(lengths, size):
    import numpy as np
    steps = -(-len(lengths) // size)
    batches = epoch_batches(np.array(lengths), steps, np.random.default_rng(0))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths))) and len(batches) == steps
    most, least = max(map(len, batches)), min(map(len, batches))
    assert most - least <= 1 and most <= size and (least >= size // 2 or len(lengths) < size)  # every rank has a pair


def test_margins_and_labels_reach_the_batch(tok):
    rows = [r | {"messages": [user("Hi" * (i + 1))]} for i, r in enumerate(pairs(12))]
    del rows[0]["grade"], rows[1]["safety"]
    b = PairBatches(tok, rows, 12, MARGIN_LARGE)[0]
    order = [next(i for i, r in enumerate(rows) if encode_answer(tok, r["messages"], r["chosen"], 512) == t[0, :n[0]].tolist())
             for t, n in zip(b["tokens"], b["lengths"])]
    assert b["margin"].tolist() == [MARGIN_LARGE.get(rows[i].get("grade"), 0.) for i in order]
    expected = {"chosen safe": [0, 1], "both safe": [0, 0], "both unsafe": [1, 1], None: [-1, -1]}
    assert b["unsafe"].tolist() == [expected[rows[i].get("safety")] for i in order]
    with pytest.raises(UserError, match="no preference pairs"): PairBatches(tok, [], 4)


def test_gradient_does_not_depend_on_the_split(tok):  # traps 18 and 35
    batch, grads = PairBatches(tok, pairs(7), 7)[0], []
    for micro in (None, 1, 3):
        model = new_model(tok)
        set_gradients(model, batch, pair_loss(1.), micro_batch=micro)
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]: assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(grads[0], other))


def test_safety_term(tok):  # A.3.4
    scores = torch.tensor([2., -1., .5, .3])
    model = lambda tokens, lengths: scores
    batch = {"tokens": torch.zeros(2, 2, 1), "lengths": torch.ones(2, 2), "margin": torch.tensor([1., 0.]), "unsafe": torch.tensor([[0., 1.], [-1., -1.]])}
    (plain, n), (both, _) = pair_loss(0.)(model, batch), pair_loss(2.)(model, batch)
    assert n == 2 and plain.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-.2)))
    term = (-math.log(torch.sigmoid(torch.tensor(2.)).item()) - math.log(1 - torch.sigmoid(torch.tensor(-1.)).item())) / 2
    assert (both - plain).item() == pytest.approx(2 * term, rel=1e-5)  # safe means a high score; the unlabelled pair has no term


# --- training and measuring ----------------------------------------------------------------------------------------------

def test_schedule_of_the_paper(tok):  # trap 35
    assert RewardConfig().epochs == 1 and RewardConfig().margin == "small" and RewardConfig().auxiliary == 0
    lrs = [h["lr"] for h in train_reward(new_model(tok), tok, pairs(20), replace(QUICK, batch_size=1))]
    assert len(lrs) == 20 and lrs.index(max(lrs)) == 4 and lrs[-1] == pytest.approx(3e-4)  # 5 steps up, a tenth at the end
    seen = {}
    def record(model, batches, loss, cfg, **kw): seen[len(batches)] = cfg.warmup; return []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "fit", record)
        for n in (1, 40, 400): train_reward(None, tok, pairs(n), replace(QUICK, batch_size=1))
    assert seen == {1: 1, 40: 5, 400: 12}
    with pytest.raises(UserError, match="none, small, large"): RewardConfig(margin="big")


def test_it_learns_a_preference(tok):
    model = new_model(tok)
    history = train_reward(model, tok, pairs(48), replace(QUICK, epochs=6))
    test = [r | {"messages": [user("Where does Zoe live?")]} for r in pairs(8)]
    assert history[-1]["loss"] < history[0]["loss"] and accuracy(model.eval(), tok, test).mean == 1


def test_accuracy_has_no_margin_and_counts_prompts(tok):  # trap 34
    model, rows = new_model(tok), pairs(40)
    scores, found = score_pairs(model, tok, rows), accuracy(model, tok, rows)
    assert found.mean == pytest.approx((scores[:, 0] > scores[:, 1]).float().mean().item()) and found.n == 40
    by = accuracy_by_grade(model, tok, rows[:-1] + [rows[-1] | {"grade": None}])
    assert list(by) == GRADES and sum(i.n for i in by.values()) == 39
    twice = accuracy(model, tok, rows[:10] * 2), accuracy(model, tok, rows[:10])
    assert twice[0].low == pytest.approx(twice[1].low, abs=.03)  # copies of a pair teach nothing new


def test_scores_keep_the_order_of_the_answers(tok):
    model, rows = new_model(tok), pairs(9)
    answers = [r["chosen"] * (i % 4 + 1) for i, r in enumerate(rows)]
    prompts = [r["messages"] for r in rows]
    one, many = (score_answers(model, tok, prompts, answers, batch_size=n) for n in (1, 4))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
    assert score_answers(model, tok, [], []).shape == (0,)


def test_files(tok, tmp_path):
    model = new_model(tok)
    save_reward(model, tok, tmp_path / "rm")
    again, its_tok = load_reward(tmp_path / "rm")
    assert torch.equal(score_pairs(again, its_tok, pairs(4)), score_pairs(model, tok, pairs(4))) and not again.training
    save(llama(tok), tok, tmp_path / "chat")
    (tmp_path / "chat" / "model.safetensors").rename(tmp_path / "chat" / reward.REWARD_FILE)
    for wrong in ("chat", "nowhere"):
        with pytest.raises(UserError, match=f"{wrong} holds no reward model"): load_reward(tmp_path / wrong)


# --- data mixes and the stage --------------------------------------------------------------------------------------------

def kinds(rows): return [sum((r["origin"], r["kind"]) == k for r in rows) for k in (("own", "helpful"), ("own", "safety"), ("open", "helpful"), ("open", "safety"))]


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 4), st.integers(0, 5))
def test_data_mixes(sizes, seed):  # Section 3.2.2
    parts = [pairs(n, kind, origin) for n, (origin, kind) in zip(sizes, (("own", "helpful"), ("own", "safety"), ("open", "helpful"), ("open", "safety")))]
    rows = [r for p in parts for r in p]
    own_helpful, own_safe, open_helpful, open_safe = sizes
    mixed = helpfulness_mix(rows, seed)
    assert len({id(r) for r in mixed}) == len(mixed)
    if own_helpful:
        assert kinds(mixed)[0] == own_helpful and len(mixed) == own_helpful + min(own_helpful, sum(sizes) - own_helpful)
    mixed = safety_mix(rows, seed)
    assert kinds(mixed)[1::2] == [own_safe, open_safe] and len({id(r) for r in mixed}) == len(mixed)
    assert len(mixed) - own_safe - open_safe == min(own_helpful + open_helpful, round((own_safe + open_safe) / 9))
    assert helpfulness_mix(rows, seed) == helpfulness_mix(rows, seed)


def test_open_data_alone_is_enough():
    rows = pairs(12, "helpful", "open") + pairs(12, "safety", "open")
    assert kinds(helpfulness_mix(rows)) == [0, 0, 12, 12]
    assert draw(rows, 99, 0) != rows and sorted(map(id, draw(rows, 99, 0))) == sorted(map(id, rows)) and len(draw(rows, 5, 0)) == 5


@pytest.fixture
def world(tok, tmp_path):
    rows = pairs(24) + [r | {"messages": [user(f"Is it safe, {i}?")]} for i, r in enumerate(pairs(12, "safety"))] + pairs(6, "safety", "open")
    for name in ("data", "preferences", "out"): (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "data" / "preferences.jsonl", rows)
    write_jsonl(tmp_path / "preferences" / "pairs.jsonl", [r | {"messages": [user(f"Anew, {i}?")], "batch": 15} for i, r in enumerate(pairs(8))])
    save(llama(tok), tok, tmp_path / "sft")
    return tmp_path


STAGE = RewardStageConfig(helpfulness=QUICK, safety=replace(QUICK, auxiliary=1.))


def weights(folder): return {n: load_reward(folder / n)[0].state_dict() for n in ("helpfulness", "safety")}


@pytest.mark.parametrize("name, limit", [("helpfulness", 3), ("safety", 2)])
def test_stage_resumes_in_either_model(world, tok, monkeypatch, name, limit):  # trap 29
    inputs, (whole, killed) = {n: world / n for n in ("sft", "preferences", "data")}, (world / "whole", world / "killed")
    whole.mkdir(); killed.mkdir()
    summary = train_rewards(STAGE, whole, inputs)
    original, calls = reward.pair_loss, {"n": 0, "at": limit + (summary["helpfulness"]["steps"] if name == "safety" else 0)}

    class Killed(BaseException): pass
    def dying(auxiliary):
        inner = original(auxiliary)
        def loss(model, batch):
            calls["n"] += 1
            if calls["n"] > calls["at"]: raise Killed
            return inner(model, batch)
        return loss
    monkeypatch.setattr(reward, "pair_loss", dying)
    with pytest.raises(Killed): train_rewards(STAGE, killed, inputs)
    calls |= {"n": 0, "at": math.inf}
    assert json.dumps(train_rewards(STAGE, killed, inputs)) == json.dumps(summary)
    assert 0 < calls["n"] < sum(s["steps"] for s in summary.values())  # it went on
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def test_stage_holds_out_every_batch_and_leaves_the_chat_model_alone(world, tok):
    rows, chat = read_jsonl(world / "data" / "preferences.jsonl"), llama(tok)
    before = {k: v.clone() for k, v in chat.state_dict().items()}
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "train_reward", lambda model, tok, rows, cfg, out, desc: seen.update({out.name: (rows, cfg)}) or [{"step": 1, "loss": 0.}])
        summary = train_pair_of_rewards(chat, tok, rows, STAGE, world / "out")
    held = read_jsonl(world / "out" / "held_out.jsonl")
    assert {r["batch"] for r in held} == {r["batch"] for r in rows}
    asked = {str(r["messages"]) for some, _ in seen.values() for r in some}
    assert not asked & {str(r["messages"]) for r in held}
    assert (seen["helpfulness"][1].auxiliary, seen["safety"][1].auxiliary) == (0, 1)
    assert all(torch.equal(v, before[k]) for k, v in chat.state_dict().items()) and chat.output.weight.shape[0] == tok.vocab_size
    assert summary["safety"]["accuracy"]["all"]["n"] == sum(r["kind"] == "safety" and r["origin"] == "own" for r in held)
    assert RewardStageConfig().safety.auxiliary == 1 and RewardStageConfig().helpfulness.auxiliary == 0
    with pytest.raises(UserError, match="'safety'"): train_pair_of_rewards(chat, tok, pairs(9), STAGE, world / "out")


def test_real_pairs(real_data, tok, tmp_path):
    "Anthropic's pairs on a small random model: they are read, encoded, trained on and scored."
    from llama2_nbdev.finetuning.preferences import read_preferences
    with pytest.warns(): rows = read_preferences(real_data / "hh_rlhf" / "harmless-base-test.jsonl.gz", skip_bad=True)[:24]
    model = new_model(tok)
    history = train_reward(model, tok, rows, replace(QUICK, max_len=96))
    assert len(history) == 6 and all(math.isfinite(h["loss"]) for h in history)
    found = accuracy(model.eval(), tok, [r for r in rows if len(str(r)) < 600])
    assert 0 <= found.mean <= 1 and accuracy_by_grade(model, tok, rows[:2]) == {}
