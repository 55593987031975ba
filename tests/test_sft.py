"Supervised fine-tuning: packing, the mask in the gradient, order of the data, resume, answers."
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.finetuning import sft
from llama2_nbdev.finetuning.chat import Message, encode_dialog, reply
from llama2_nbdev.finetuning.sft import (
    DialogBatches, SFTConfig, answer_prompts, pack_dialogs, read_dialogs, train_on_dialogs, train_sft, whole_turns)
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load, save, save_hf
from llama2_nbdev.pretraining.training import TrainConfig, next_token_loss, set_gradients

NAMES = "Mira Otto Lena Paul Nora Emil Ada Hugo".split()
TOWNS = "Oslo Lima Bern Rome Cork Graz Nice Kyiv".split()
DIALOGS = [[Message("user", f"Where does {n} live?"), Message("assistant", f"{n} lives in {t}."),
            Message("user", "Are you sure?"), Message("assistant", "Yes." if i % 2 else "Yes, I am.")][:2 + 2 * (i % 3 == 0)]
           for i, (n, t) in enumerate(zip(NAMES, TOWNS))]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [m.content for d in DIALOGS for m in d] * 3 + ["[INST] [/INST] <<SYS>> <</SYS>>"]
    return Tokenizer.train(texts, 340, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def new_model(tok, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)
    return Llama(ModelConfig(**shape | changes))


def token_losses(model, batch):
    "Loss of every trained target, keyed by (ids of its document up to it)."
    logits = model(batch["tokens"], positions=batch.get("positions"), doc_ids=batch.get("doc_ids"))
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")
    losses = {}
    for r, t in batch["mask"].nonzero().tolist():
        start = t - int(batch["positions"][r, t])
        losses[tuple(batch["tokens"][r, start:t + 1].tolist()), int(batch["targets"][r, t])] = float(nll[r, t])
    return losses


def test_packed_and_unpacked_give_the_same_loss(tok):  # trap 21
    model = new_model(tok).eval()
    with torch.no_grad():
        packed = token_losses(model, pack_dialogs(tok, DIALOGS, 128).rows)
        alone = {}
        for d in DIALOGS: alone |= token_losses(model, pack_dialogs(tok, [d], 128).rows)
    assert packed.keys() == alone.keys() and len(packed) == sum(sum(encode_dialog(tok, d)[1]) for d in DIALOGS)
    assert max(abs(packed[k] - alone[k]) for k in packed) < 1e-5


def test_prompt_gets_no_gradient_and_answers_do(tok):  # trap 27
    batch, model = pack_dialogs(tok, DIALOGS, 128).rows, new_model(tok)
    logits = model(batch["tokens"], positions=batch["positions"], doc_ids=batch["doc_ids"]).detach().requires_grad_()
    loss, n = next_token_loss(lambda tokens, **kw: logits, batch)
    loss.backward()
    size = logits.grad.abs().sum(-1)
    assert (size[~batch["mask"]] == 0).all() and (size[batch["mask"]] > 0).all() and n == batch["mask"].sum()


def test_answer_tokens_and_eos_are_the_targets(tok):  # traps 24 and 26
    batch = pack_dialogs(tok, DIALOGS, 128).rows
    trained = batch["targets"][batch["mask"]].tolist()
    answers = [m.content for d in DIALOGS for m in d if m.role == "assistant"]
    assert sorted(tok.decode(trained).replace("  ", " ").split()) == sorted(" ".join(answers).split())
    assert trained.count(tok.eos_id) == len(answers) and tok.bos_id not in trained


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5), limit=st.integers(1, 120), last=st.booleans())
def test_truncation_keeps_whole_turns(tok, turns, limit, last):  # trap 26
    dialog = []
    for u, a in turns: dialog += [Message("user", "Lima " * u), Message("assistant", "Oslo " * a)]
    ids, mask = encode_dialog(tok, dialog, last)
    short, short_mask = whole_turns(ids, mask, tok.eos_id, limit)
    assert short == ids[:len(short)] and short_mask == mask[:len(short)] and len(short) <= max(limit, 0)
    if short: assert short[-1] == tok.eos_id and any(short_mask)  # a real EOS, never a made-up one
    if len(short) < len(ids):  # as many turns as fit
        following = len(short) + ids[len(short):].index(tok.eos_id) + 1
        assert following > limit or not any(mask[:following])


def test_what_does_not_fit_is_counted(tok):
    long = [Message("user", "Hi"), Message("assistant", "Oslo."), Message("user", "Lima " * 60), Message("assistant", "Bern.")]
    hopeless = [Message("user", "Lima " * 60), Message("assistant", "Bern.")]
    packed = pack_dialogs(tok, [*(d[:2] for d in DIALOGS), long, hopeless], 64)
    assert (packed.shortened, packed.dropped) == (1, 1)  # of the two added ones
    assert 0 < packed.trained < packed.filled <= 1
    with pytest.raises(UserError, match="none of the 1 dialogs"): pack_dialogs(tok, [hopeless], 32)


def test_a_row_holds_exactly_seq_len_predictions(tok):
    dialog = [Message("user", "Hi"), Message("assistant", "Oslo.")]
    n = len(encode_dialog(tok, dialog)[0]) - 1
    batch = pack_dialogs(tok, [dialog], n).rows
    assert batch["tokens"].shape == (1, n) and batch["targets"][0, -1] == tok.eos_id and batch["mask"][0, -1]
    with pytest.raises(UserError): pack_dialogs(tok, [dialog], n - 1)


def test_last_turn_only_reaches_the_rows(tok):  # trap 53
    two = next(d for d in DIALOGS if len(d) == 4)
    batch = pack_dialogs(tok, [two], 128, last_turn_only=True).rows
    assert tok.decode(batch["targets"][batch["mask"]].tolist()) == two[3].content + " "


def test_batches_are_a_function_of_seed_and_step(tok):
    a, b, other = (DialogBatches(tok, DIALOGS, 2, 48, seed=s, epochs=3) for s in (0, 0, 1))
    order = torch.randperm(len(a)).tolist()
    jumped = {i: b[i] for i in order}  # read in any order
    assert all(torch.equal(a[i][k], jumped[i][k]) for i in range(len(a)) for k in a[i])
    assert any(not torch.equal(a[i]["tokens"], other[i]["tokens"]) for i in range(min(len(a), len(other))))
    assert any(not torch.equal(a[i]["tokens"], a[i + a.steps_per_epoch]["tokens"]) for i in range(a.steps_per_epoch))
    with pytest.raises(IndexError): a[len(a)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_epoch_trains_every_target_once(tok, batch_size):
    batches = DialogBatches(tok, DIALOGS, batch_size, 80, epochs=2)
    assert batches.packed.shortened == batches.packed.dropped == 0
    assert len(batches) == 2 * batches.steps_per_epoch
    expected = sorted(t for d in DIALOGS for t, m in zip(*encode_dialog(tok, d)) if m)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [t for i in steps for t in batches[i]["targets"][batches[i]["mask"]].tolist()]
        assert sorted(seen) == expected
        assert all(batches[i]["tokens"].shape == (batch_size, 80) for i in steps)


def test_partial_last_batch_has_the_gradient_of_its_rows(tok):  # traps 18 and 19
    batches = DialogBatches(tok, DIALOGS, 100, 48)
    full = batches[0]
    real = {k: v[:batches.n_rows] for k, v in full.items()}
    grads = []
    for batch, micro in ((full, None), (real, None), (full, 3)):
        model = new_model(tok)
        set_gradients(model, batch, next_token_loss, micro_batch=micro)
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]: assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(grads[0], other))


def test_ranks_share_a_batch(tok):  # trap 28
    batches = DialogBatches(tok, DIALOGS, 4, 48)
    for i in range(len(batches)):
        parts = [batches.slice(r, 2)[i]["tokens"] for r in range(2)]
        assert torch.equal(torch.cat(parts), batches[i]["tokens"])


def test_read_dialogs_names_file_and_row(tmp_path):
    good, file = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}, tmp_path / "sft.jsonl"
    write_jsonl(file, [good, good])
    assert len(read_dialogs(file)) == 2
    for bad, says in (({"messages": good["messages"][:1]}, ":2: the dialog ends without an answer"),
                      ({"messages": []}, ":2: the dialog has no user message"),
                      ({"messages": [{"role": "user", "content": "[INST]"}]}, ":2: message 1 .*special tag"),
                      ({"text": "Hi"}, "sft.jsonl:2.*messages")):
        write_jsonl(file, [good, bad])
        with pytest.raises(UserError, match=says): read_dialogs(file)


# --- the stage ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def world(tok, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "tokenizer").mkdir(); (tmp_path / "pretrain").mkdir()
    def rows(dialogs): return [{"messages": [{"role": m.role, "content": m.content} for m in d], "task": "t", "vendor": "A", "kind": "helpful"} for d in dialogs]
    write_jsonl(data / "sft_public.jsonl", rows(DIALOGS[::-1]))
    write_jsonl(data / "sft.jsonl", rows(DIALOGS))
    tok.save(tmp_path / "tokenizer" / "tokenizer.model")
    save(new_model(tok), tok, tmp_path / "pretrain")
    return {name: tmp_path / name for name in ("tokenizer", "pretrain", "data")}


QUICK = SFTConfig(batch_size=1, seq_len=64, public_epochs=1, epochs=2, public_lr=3e-3, lr=3e-3, warmup=.1,
                  train=TrainConfig(steps=1, lr=1., warmup=0, dtype="float32", checkpoint_every=2))


def weights(path): return load(path)[0].state_dict()


@pytest.mark.parametrize("phase, step", [("public", 2), ("curated", 3)])
def test_stage_resumes_in_either_phase(world, tmp_path, monkeypatch, phase, step):  # trap 29
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(); killed.mkdir()
    summary = train_sft(QUICK, whole, world)
    assert set(summary) == {"public", "curated"} and summary["curated"]["steps"] == 2 * summary["public"]["steps"]
    original, seen = next_token_loss, {"n": 0}

    class Killed(BaseException): pass
    limit = step if phase == "public" else summary["public"]["steps"] + step
    def dying(model, batch):
        if seen["n"] == limit: raise Killed
        seen["n"] += 1
        return original(model, batch)
    monkeypatch.setattr(sft, "next_token_loss", dying)
    with pytest.raises(Killed): train_sft(QUICK, killed, world)
    again = {"n": 0}
    def counting(model, batch): again["n"] += 1; return original(model, batch)
    monkeypatch.setattr(sft, "next_token_loss", counting)
    assert train_sft(QUICK, killed, world) == summary
    total = summary["public"]["steps"] + summary["curated"]["steps"]
    assert total - limit <= again["n"] <= total - limit + 1  # it went on; at most the step after the last checkpoint was repeated
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stage_without_public_phase(world, tmp_path):
    out = tmp_path / "out"; out.mkdir()
    assert set(train_sft(replace(QUICK, public_epochs=0, epochs=1), out, world)) == {"curated"}


def test_schedule_spans_all_epochs(tok, tmp_path):  # trap 17
    history = train_on_dialogs(new_model(tok), tok, DIALOGS, QUICK, epochs=2, lr=1e-3)
    lrs = [row["lr"] for row in history]
    assert len(lrs) == len(DialogBatches(tok, DIALOGS, 1, 64, epochs=2)) and max(lrs) == pytest.approx(1e-3) and lrs[-1] == pytest.approx(1e-4)


def test_it_learns_and_stops(tok):
    model = new_model(tok, dim=64)
    cfg = replace(QUICK, batch_size=8, seq_len=128)
    train_on_dialogs(model, tok, DIALOGS, cfg, epochs=60, lr=5e-3)
    prompts = [d[:1] for d in DIALOGS]
    answers = answer_prompts(model, tok, prompts, max_new_tokens=40)
    right = sum(a == d[1].content for a, d in zip(answers, DIALOGS))
    assert right >= 6, answers
    assert answers == [reply(model, tok, p, max_new_tokens=40, temperature=0) for p in prompts]


def test_answers_do_not_depend_on_the_batch(tok):
    model = new_model(tok).eval()
    prompts = [d[:1] for d in DIALOGS] + [DIALOGS[0][:3]]
    one, many = (answer_prompts(model, tok, prompts, max_new_tokens=12, temperature=1., seed=5, batch_size=n) for n in (1, 64))
    assert one == many and len(set(one)) > 1
    assert answer_prompts(model, tok, [], max_new_tokens=12) == []


def test_real_format_on_a_tiny_random_model(tok, tmp_path):
    "A model in Hugging Face's format and dialogs as the hub has them go through the same functions."
    save_hf(new_model(tok), tok, tmp_path / "hf")
    model, hub_tok = load(tmp_path / "hf")
    hub_rows = [json.loads(json.dumps({"messages": [vars(m) for m in d]})) for d in DIALOGS]
    history = train_on_dialogs(model, hub_tok, [r["messages"] for r in hub_rows], replace(QUICK, batch_size=4), epochs=8, lr=5e-3)
    assert history[-1]["loss"] < history[0]["loss"]
