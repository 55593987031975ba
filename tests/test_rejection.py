"Rejection sampling: expected maxima, private random streams, resume, selection, and the samples of all rounds."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning import rejection
from llama2_nbdev.finetuning.chat import encode_dialog, encode_prompt
from llama2_nbdev.finetuning.rejection import (
    RejectionConfig, anchored_scorer, answer_likelihood, best_of, keep_best, max_median_curve, rank_weights, rescore, reward_scorer,
    sample_answers, score_samples, tune_temperature)
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import save

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"id": f"p{i}", "messages": [{"role": "user", "content": f"Where does {n} live?" * (1 + i % 3)}], "task": "fact", "kind": "helpful"}
        for i, n in enumerate("Mira Otto Lena Paul Nora Emil Ada".split())]
CFG = RejectionConfig(k=3, max_new_tokens=6, batch_size=6)


def length(rows, answers): return torch.tensor([float(len(a)) for a in answers])


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [m["content"] for r in ROWS for m in r["messages"]] * 3 + ["[INST] [/INST] <<SYS>> <</SYS>> She lives in Oslo."]
    return Tokenizer.train(texts, 330, tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=128)).eval()
    with torch.no_grad(): model.output.weight[tok.eos_id] *= 8  # some answers end, others do not
    return model


# ---- curves

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=7), st.integers(1, 7))
def test_the_curve_is_the_mean_over_all_draws(scores, n):
    n = min(n, len(scores))
    found = max_median_curve(torch.tensor([scores]), [n])
    draws = torch.tensor(list(combinations(scores, n)), dtype=torch.float64)
    assert found["max"].item() == pytest.approx(draws.amax(1).mean().item(), abs=1e-9)
    assert found["median"].item() == pytest.approx(draws.quantile(.5, 1).mean().item(), abs=1e-6)
    assert found["random"].item() == pytest.approx(draws.mean().item(), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.data())
def test_rank_weights_are_probabilities_and_every_sample_is_as_likely(k, data):
    n = data.draw(st.integers(1, k))
    weights = torch.stack([rank_weights(k, n, r) for r in range(1, n + 1)])
    assert (weights >= 0).all() and torch.allclose(weights.sum(1), torch.ones(n, dtype=torch.float64))
    assert torch.allclose(weights.sum(0), torch.full((k,), n / k, dtype=torch.float64))  # each of k is drawn with probability n/k


def test_the_best_of_normal_numbers():
    x = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    means = max_median_curve(x, [1, 2, 4, 8, 16])["max"].mean(0)
    assert (means - torch.tensor([0, .5642, 1.0294, 1.4236, 1.7660])).abs().max() < .02


def test_true_follows_the_sample_that_the_reward_chose():  # trap 52: the maximum alone does not show whether the truth follows
    reward, truth = torch.tensor([[1., 3., 2.]]), torch.tensor([[.2, .9, .5]])
    found = max_median_curve(reward, [1, 2, 3], truth)["true"][0]
    assert found.tolist() == pytest.approx([(.2 + .9 + .5) / 3, (.9 + .5 + .9) / 3, .9])
    with pytest.raises(UserError, match="3 samples"): max_median_curve(reward, [4])


# ---- samples

def test_each_sample_has_its_own_stream(model, tok):  # trap 28
    cfg = replace(CFG, k=6, max_new_tokens=40)
    answers = sample_answers(model, tok, ROWS, cfg)
    assert [len(a) for a in answers] == [6] * len(ROWS)
    assert max(len(set(a)) for a in answers) > 3
    assert answers != sample_answers(model, tok, ROWS, replace(cfg, seed=1))


def test_neighbours_do_not_change_a_sample(model, tok):  # trap 28
    six = sample_answers(model, tok, ROWS, replace(CFG, k=6))
    some = sample_answers(model, tok, ROWS[::-2], replace(CFG, k=2, batch_size=1))
    assert some == [a[:2] for a in six[::-2]]


def test_unfinished_answers_are_no_candidates(model, tok):  # trap 26: an EOS that the model did not say must not be trained
    cfg = replace(CFG, k=8)
    answers = sample_answers(model, tok, ROWS, cfg)
    longer = sample_answers(model, tok, ROWS, replace(cfg, max_new_tokens=40))
    blank = [(a, b) for x, y in zip(answers, longer) for a, b in zip(x, y)]
    assert any(a == "" and b for a, b in blank) and all(a == b for a, b in blank if a)
    scores = score_samples(ROWS, answers, length)
    finished = torch.tensor([[bool(a) for a in texts] for texts in answers])
    assert (scores[~finished] == scores[finished].min()).all()
    assert all(b["messages"][-1]["content"] for b in best_of(ROWS, answers, torch.zeros(len(ROWS), 8)))


def test_resume_ignores_half_a_line_and_samples_nothing_twice(model, tok, tmp_path, monkeypatch):
    whole = sample_answers(model, tok, ROWS, CFG, out=tmp_path)
    log = tmp_path / "samples.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + -(-len(ROWS) // 2) and whole == sample_answers(model, tok, ROWS, CFG)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    asked = []
    real = rejection._sample_chunk
    monkeypatch.setattr(rejection, "_sample_chunk", lambda m, t, ids, *rest: asked.extend(ids) or real(m, t, ids, *rest))
    assert sample_answers(model, tok, ROWS, CFG, out=tmp_path) == whole
    assert len(asked) == len(ROWS) - 4 and log.read_bytes().splitlines(keepends=True) == lines


@pytest.mark.parametrize("other", ["cfg", "rows", "model"])
def test_samples_of_another_run_are_refused(model, tok, tmp_path, other):
    sample_answers(model, tok, ROWS[:2], CFG, out=tmp_path)
    changed = Llama(model.cfg)
    changed.load_state_dict(model.state_dict())
    changed.norm.weight.data += .01
    args = {"cfg": (model, tok, ROWS[:2], replace(CFG, temperature=.5)), "rows": (model, tok, ROWS[:3], CFG), "model": (changed, tok, ROWS[:2], CFG)}
    with pytest.raises(UserError, match="another model, other prompts or other settings"): sample_answers(*args[other], out=tmp_path)


def test_sampling_survives_sigkill(model, tok, tmp_path):
    save(model, tok, tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    code = ("import json, sys, time, torch; from pathlib import Path; torch.set_num_threads(1)\n"
            "from llama2_nbdev.finetuning import rejection as r; from llama2_nbdev.model.weights import load\n"
            "here = Path(sys.argv[1]); model, tok = load(here/'model'); real = r._sample_chunk\n"
            "r._sample_chunk = lambda *a: (time.sleep(.2), real(*a))[1]\n"
            "r.sample_answers(model.eval(), tok, json.loads((here/'rows.json').read_text()), r.RejectionConfig(k=3, max_new_tokens=6, batch_size=6), out=here)")
    child, log = subprocess.Popen([sys.executable, "-c", code, tmp_path]), tmp_path / "samples.jsonl"
    while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2): time.sleep(.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert 2 < log.read_bytes().count(b"\n") < 5
    assert sample_answers(model, tok, ROWS, CFG, out=tmp_path) == sample_answers(model, tok, ROWS, CFG)


def test_two_rows_with_one_id_are_refused(model, tok):
    with pytest.raises(UserError, match="share an id"): sample_answers(model, tok, ROWS[:1] * 2, CFG)


# ---- scores

def test_equal_answers_are_scored_once():
    asked = []
    scores = score_samples(ROWS[:2], [["ab", "ab", ""], ["ab", "c", "c"]], lambda r, a: asked.append(list(zip((x["id"] for x in r), a))) or length(r, a))
    assert asked == [[("p0", "ab"), ("p1", "ab"), ("p1", "c")]] and scores.tolist() == [[2, 2, 1], [2, 1, 1]]
    with pytest.raises(UserError, match="no answer came to its end"): score_samples(ROWS[:1], [["", " "]], length)


def test_reward_scorer_gives_scores_before_the_sigmoid(model, tok):
    rm = RewardModel(Llama(model.cfg))
    rm.head.weight.data *= 30
    scores = reward_scorer(rm, tok)(ROWS[:3], ["Oslo.", "She lives in Oslo.", "Yes."])
    assert scores.shape == (3,) and (scores.min() < 0 or scores.max() > 1) and len(set(scores.tolist())) == 3


def test_likelihood_is_that_of_sampling(model, tok):  # trap 44: temperature 1, nothing cut, EOS counted, prompt not counted
    for row in ROWS[:3]:
        prompt, ids = encode_prompt(tok, row["messages"]), encode_dialog(tok, [*row["messages"], {"role": "assistant", "content": "Oslo."}])[0]
        assert ids[:len(prompt)] == prompt and ids[-1] == tok.eos_id
        with torch.no_grad(): steps = [model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]].item() for t in range(len(prompt), len(ids))]
        assert answer_likelihood(model, tok, [row], ["Oslo."]).item() == pytest.approx(sum(steps), abs=1e-3)
    said = ["Oslo.", "She lives in Oslo.", "No."]
    together = answer_likelihood(model, tok, ROWS[:3], said, batch_size=2)
    for i in range(3): assert together[i].item() == pytest.approx(answer_likelihood(model, tok, [ROWS[i]], [said[i]]).item(), abs=1e-4)
    anchored = anchored_scorer(length, model, tok, beta=.5)(ROWS[:3], said)
    assert torch.allclose(anchored, length(ROWS[:3], said) + .5 * together)


# ---- selection

def test_best_of_takes_the_highest_reward_of_each_prompt():
    best = best_of(ROWS[:3], [["a", "b"], ["", "c"], ["", ""]], torch.tensor([[1., 2.], [9., -1.], [0., 0.]]), "v3")
    assert [(b["id"], b["messages"][-1], b["reward"], b["version"]) for b in best] == [
        ("p0", {"role": "assistant", "content": "b"}, 2., "v3"), ("p1", {"role": "assistant", "content": "c"}, -1., "v3")]
    assert all(b["messages"][:-1] == r["messages"] and set(b) == {"id", "messages", "reward", "version", "task", "kind"} for b, r in zip(best, ROWS))


def chosen(id, answer, reward, version):
    return {"id": id, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}], "reward": reward,
            "version": version, "task": "t", "kind": "helpful"}


def test_earlier_rounds_are_kept():  # trap 52
    v1, v2 = [chosen("a", "long answer", 5., "v1"), chosen("rare", "rhyme", 1., "v1")], [chosen("a", "short", 3., "v2"), chosen("b", "new", 0., "v2")]
    assert [(r["id"], r["version"]) for r in keep_best([v1, v2])] == [("a", "v1"), ("rare", "v1"), ("b", "v2")]
    assert [r["reward"] for r in keep_best([v1, v2], per_prompt=2)] == [5., 3., 1., 0.]
    assert keep_best([v1, v1]) == keep_best([v1]) and keep_best([]) == []


def test_rounds_are_compared_by_one_reward_model():  # trap 52: score with the current reward model
    v1, v2 = [chosen("a", "same", 5., "v1")], [chosen("a", "same", -3., "v2")]
    with pytest.raises(UserError, match="`rescore` all rounds first"): keep_best([v1, v2])
    now = [rescore(r, length) for r in (v1, v2)]
    assert [r["version"] for r in keep_best(now)] == ["v1"] and now[1][0]["reward"] == 4.
    assert v2[0]["reward"] == -3. and rescore([], length) == []
    seen = []
    rescore(v1, lambda rows, answers: seen.append((rows[0]["messages"][-1]["role"], answers)) or length(rows, answers))
    assert seen == [("user", ["same"])]


def test_the_temperature_is_the_one_with_the_best_maximum(model, tok):  # trap 52: tuned for each model
    def colder(rows, answers): return -length(rows, answers)
    best, table = tune_temperature(model, tok, ROWS, colder, (.3, 1., 2.), replace(CFG, max_new_tokens=20))
    assert [t["temperature"] for t in table] == [.3, 1., 2.] and all(t["max"] >= t["mean"] and 0 <= t["unfinished"] <= 1 for t in table)
    assert best == max(table, key=lambda t: t["max"])["temperature"]
