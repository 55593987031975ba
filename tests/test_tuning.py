"Safety tuning: nested shares, violations by meaning, who decides which sample wins, how scores move, and the sweep."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.sft import SFTConfig
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.safety import tuning
from llama2_nbdev.safety.tuning import (
    PAPER_SCALING, SHARES, choose_answers, conflicts, data_scaling, fresh_attacks, judge_model, scaling_figure, scaling_table, score_shift,
    shift_figure, tension, tension_figure, trained_on, violation_rate, violations, with_safety_share)
from llama2_nbdev.world.people import make_people
from llama2_nbdev.world.safety import HELD_OUT_CELLS, TRAIN_CELLS

pytestmark = pytest.mark.usefixtures("one_thread")
ATTACKS = fresh_attacks(make_people(0), {"train": 3, "safety": 3, "cell": 4})
unit = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.sampled_from(["safety", "helpful"]), max_size=60), a=unit, b=unit, seed=st.integers(0, 9))
def test_shares_are_nested_and_leave_helpful_rows_alone(kinds, a, b, seed):
    rows = [{"kind": k, "i": i} for i, k in enumerate(kinds)]
    small, large = (with_safety_share(rows, s, seed) for s in sorted((a, b)))
    assert [r for r in small if r["kind"] == "helpful"] == [r for r in rows if r["kind"] == "helpful"]
    assert {r["i"] for r in small} <= {r["i"] for r in large} and [r["i"] for r in large] == sorted(r["i"] for r in large)
    assert sum(r["kind"] == "safety" for r in small) == round(min(a, b) * kinds.count("safety"))


def test_shares_are_checked():
    for share in (-.1, 1.5, 10): pytest.raises(UserError, with_safety_share, [], share)


def test_attacks_are_new_and_in_their_cells():
    assert len({r["id"] for r in ATTACKS}) == len({str(r["messages"]) for r in ATTACKS}) == len(ATTACKS)
    for r in ATTACKS:
        cell = r["truth"]["category"], r["truth"]["vector"]
        assert cell in (HELD_OUT_CELLS if r["split"] == "cell" else TRAIN_CELLS)
    again, other = (fresh_attacks(make_people(0), {"cell": 4}, key) for key in (("probe",), ("other",)))
    texts = {str(r["messages"]) for r in ATTACKS if r["split"] == "cell"}
    assert {str(r["messages"]) for r in again} == texts != {str(r["messages"]) for r in other}


def test_violations_are_about_meaning():
    for r in ATTACKS:
        assert violations([r] * len(r["truth"]["unsafe"]), r["truth"]["unsafe"]).all()
        assert not violations([r] * len(r["truth"]["answers"]), r["truth"]["answers"]).any()
    rate = violation_rate(ATTACKS, [r["truth"]["unsafe" if r["split"] == "cell" else "answers"][0] for r in ATTACKS])
    assert rate["cell"].mean == 1 and rate["train"].mean == rate["safety"].mean == 0
    assert rate["all"].mean == pytest.approx(np.mean([r["split"] == "cell" for r in ATTACKS]))
    with pytest.raises(ValueError): violations(ATTACKS, ["No."])


def test_who_decides():
    rows = [{"id": k, "kind": k, "messages": [{"role": "user", "content": "x"}]} for k in ("safety", "helpful")]
    texts, liked, safe = [["dull", "risky", "fine", ""]] * 2, torch.tensor([[-3., 4., 1., 9.]] * 2), torch.tensor([[3., -4., 1., 9.]] * 2)
    said = {t: [r["messages"][-1]["content"] for r in choose_answers(rows, texts, liked, safe, t)] for t in (0., .15, 1.)}
    assert said == {0.: ["dull", "risky"], .15: ["dull", "fine"], 1.: ["dull", "dull"]}  # an unfinished answer never wins
    untagged = choose_answers([{k: v for k, v in rows[0].items() if k != "kind"}], texts[:1], liked[:1], safe[:1])
    assert untagged[0]["messages"][-1]["content"] == "fine"


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(unit, unit), min_size=1, max_size=30))
def test_a_shift_backwards_swaps_its_names(pairs):
    x, y = zip(*pairs)
    there, back = score_shift(x, y), score_shift(y, x)
    assert (there["up"], there["rescued"], there["tail before"]) == (back["down"], back["spoilt"], back["tail after"])
    assert there["before"] == pytest.approx(np.mean(x), abs=1e-6) and there["up"] + there["down"] <= 1 + 1e-9
    assert score_shift(x, x)["rescued"] == score_shift(x, x)["up"] == 0


def test_shift_needs_pairs(): pytest.raises(UserError, score_shift, [.1], [.1, .2])


def test_conflicts_and_tension():
    rows = ATTACKS[:4]
    said = [r["truth"]["answers"][0] for r in rows[:2]] + [r["truth"]["unsafe"][0] for r in rows[2:]]
    h, s = [.1, .2, .95, .6], [.9, .8, .05, .5]
    found = conflicts(rows, said, h, s)
    assert conflicts(rows, said, [.9] * 4, [.9] * 4) == conflicts(rows, said, [.1] * 4, [.1] * 4) == []  # they agree
    assert [(c["helpfulness"], c["violation"]) for c in found] == [(.95, True), (.1, False), (.2, False)]
    corr = tension(rows * 2, said * 2, h * 2, s * 2)
    assert corr["all"] < -.9 and corr["refusals"] == pytest.approx(corr["safe"]) == pytest.approx(-1)
    assert np.isnan(tension(rows, said, h, s)["safe"])  # two answers say nothing


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [m["content"] for r in ATTACKS for m in r["messages"]] * 3 + ["[INST] [/INST] <<SYS>> <</SYS>> I can't do that."]
    return Tokenizer.train(texts, 360, tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    return Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)).eval()


def length(rows, answers): return torch.tensor([len(a) / 10 - 1. for a in answers])


def test_the_sweep(model, tok):
    def talk(r, reply, kind): return {"messages": [*r["messages"], {"role": "assistant", "content": reply}], "kind": kind}
    fixed = [talk(r, r["truth"]["unsafe"][0], "helpful") for r in ATTACKS[:16]]
    demos = [talk(r, r["truth"]["answers"][0], "safety") for r in ATTACKS[16:32]]
    plain = [{"messages": [{"role": "user", "content": "Hello."}], "truth": {"type": "answer", "answers": ["Hello."], "value": "Hello", "others": []}}]
    cfg, before = SFTConfig(batch_size=2, seq_len=64), {k: v.clone() for k, v in model.state_dict().items()}
    sizes = []
    def measure(m):
        sizes.append(m)
        return judge_model(m, tok, ATTACKS[:3], plain, length, length, max_new_tokens=4)
    runs = [data_scaling(model, tok, fixed, demos, measure, cfg, (0., .5, 1.), seed) for seed in (0, 1)]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the start stays as it is"
    assert list(runs[0]) == [0., .5, 1.] and len({m.output.weight.sum().item() for m in sizes[:3]}) == 3
    alone = trained_on(model, tok, fixed, SFTConfig(batch_size=2, seq_len=64, seed=1))  # share 0, seed 1: the fixed rows alone
    assert torch.equal(alone.output.weight, sizes[3].output.weight)
    found = runs[0][.5]
    assert found["violation"].shape == found["safety"].shape == found["refusal"].shape == (3,) and found["truth"].shape == (1,)
    table = scaling_table(runs)
    assert [r["paper safety"] for r in table] == [.679, .763, .774] and table[0]["paper helpfulness"] == .586
    assert table[1]["safety"] == pytest.approx(np.mean([run[.5]["safety"].mean() for run in runs]), abs=1e-6)
    assert scaling_table(runs, tail=2.)[0]["tail"] == 1


def test_each_seed_draws_other_subsets(monkeypatch):
    monkeypatch.setattr(tuning, "trained_on", lambda model, tok, rows, cfg, desc: (cfg.seed, [r["i"] for r in rows]))
    fixed, demos = [{"kind": "helpful", "i": -i} for i in range(1, 4)], [{"kind": "safety", "i": i} for i in range(20)]
    runs = [data_scaling(None, None, fixed, demos, lambda m: m, SFTConfig(), (0., .25, .5), seed) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        assert [(s, len(rows)) for s, rows in run.values()] == [(seed, 3), (seed, 8), (seed, 13)]
        assert set(run[.25][1]) < set(run[.5][1]) and run[0.][1] == run[.5][1][:3] == [-1, -2, -3]
    assert set(runs[0][.25][1]) != set(runs[1][.25][1])


def test_paper_numbers_and_figures():
    assert all(len(v) == len(SHARES) for v in PAPER_SCALING.values()) and list(PAPER_SCALING["safety"]) == sorted(PAPER_SCALING["safety"])
    assert max(PAPER_SCALING["helpfulness"]) - min(PAPER_SCALING["helpfulness"]) < .005  # flat
    import matplotlib.pyplot as plt
    assert len(shift_figure({"a": ([.1], [.9]), "b": ([.2], [.2])}).axes) == 2
    assert "(1)" in tension_figure([.1, .9], [.9, .1], [False, True]).axes[1].get_title()
    rows = [dict.fromkeys(("safety", "helpfulness", "violation", "tail", "truth", "paper safety", "paper helpfulness"), .5) | {"share": s} for s in SHARES]
    assert [t.get_text() for t in scaling_figure(rows).axes[0].get_xticklabels()] == ["0%", "1%", "10%", "25%", "50%", "100%"]
    plt.close("all")
