"Fair win rates, verdicts read strictly, calibration, and a round that remembers earlier rounds and its own half-done work."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning import rounds
from llama2_nbdev.finetuning.preferences import read_preferences
from llama2_nbdev.finetuning.rounds import (
    BiasedJudge, CallableJudge, ORDERS, RewardJudge, RoundSteps, TruthJudge, Version, calibration, pairwise_preference, parse_verdict,
    read_version, run_round, select_model, win_rate)


def prompts(n):
    return [{"id": f"p{i}", "messages": [{"role": "user", "content": f"Question {i}?"}]} for i in range(n)]


class Numbers:
    "Answers are numbers; the larger one is better, and `side` is added to what stands first."
    def __init__(self, side=0.): self.side = side
    def compare(self, rows, first, second):
        return 1 / (1 + np.exp(-(np.array(first, float) + self.side - np.array(second, float))))


numbers = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)


@settings(max_examples=50, deadline=None)
@given(pairs=numbers, side=st.sampled_from([-9., -.7, 0., .7, 9.]))
def test_both_orders_remove_any_side_bias(pairs, side):  # trap 59
    a, b = zip(*pairs)
    rows, share = prompts(len(a)), np.mean([1. if x > y else .5 if x == y else 0. for x, y in pairs])
    assert win_rate(Numbers(side), rows, a, b).mean == pytest.approx(share)
    assert win_rate(Numbers(side), rows, b, a).mean == pytest.approx(1 - share)  # a tie counts one half on both sides


def test_a_judge_who_always_says_first():  # trap 59
    rows, a, b = prompts(400), ["1"] * 400, ["0"] * 400
    rates = {o: win_rate(Numbers(1e3), rows, a, b, o, seed=3) for o in ORDERS}
    assert rates["both"].mean == .5 and rates["given"].mean == 1
    assert rates["random"].low < .5 < rates["random"].high and rates["random"] == win_rate(Numbers(1e3), rows, a, b, "random", seed=3)
    assert rates["random"].mean != win_rate(Numbers(1e3), rows, a, b, "random", seed=4).mean


def test_the_coins_do_not_change_what_a_fair_judge_says():
    a, b = np.random.default_rng(0).integers(0, 5, (2, 60)).tolist()
    fair = [pairwise_preference(Numbers(), prompts(60), a, b, o) for o in ORDERS]
    assert np.allclose(fair[0], fair[1]) and np.allclose(fair[0], fair[2])


def test_only_the_winner_counts_and_repeated_prompts_are_one_cluster():
    rows = prompts(40)
    a, b = ["9"] * 30 + ["0"] * 10, ["0"] * 30 + [".01"] * 10  # three quarters clear wins, one quarter narrow losses
    once = win_rate(Numbers(), rows, a, b)
    assert once.mean == .75
    copied = win_rate(Numbers(), rows * 5, a * 5, b * 5)
    assert copied.mean == .75 and copied.high - copied.low == pytest.approx(once.high - once.low, rel=.1)


def test_inputs_are_checked():
    with pytest.raises(UserError, match="orders='twice' is unknown"): win_rate(Numbers(), prompts(1), ["1"], ["0"], orders="twice")
    with pytest.raises(UserError, match="2 prompts, 2 and 1 answers"): win_rate(Numbers(), prompts(2), ["1", "2"], ["0"])


ROW = {"id": "r", "kind": "helpful", "messages": [{"role": "user", "content": "Where does Mira live?"}],
       "truth": {"type": "answer", "answers": ["Mira lives in Oslo."], "value": "Oslo", "others": ["Lima"]}}


def test_truth_judge():
    right, other_words, wrong = "Mira lives in Oslo.", "It is Oslo, I think.", "Mira lives in Lima."
    assert TruthJudge().compare([ROW] * 4, [right, wrong, right, other_words], [wrong, right, right, right]).tolist() == [1, 0, .5, 0]
    assert TruthJudge(tie=.3).compare([ROW], [right], [other_words]).tolist() == [.5]
    rows = [ROW | {"id": i} for i in range(100)]
    masters, novices = (TruthJudge(skill).compare(rows, [right] * 100, [wrong] * 100).mean() for skill in (1., 0.))
    assert masters == 1 and novices < 1


def test_reward_judge_is_the_sigmoid_of_the_difference_and_ties_on_equal_texts():
    torch.manual_seed(0)
    noisy = RewardJudge(lambda rows, answers: torch.tensor([float(len(a)) for a in answers]) + 1e-5 * torch.randn(len(answers)))
    p = noisy.compare(prompts(3), ["aaa", "a", "aa"], ["a", "aaa", "aa"])
    assert p == pytest.approx([.8808, .1192, .5], abs=1e-4) and p[2] == .5  # exactly: the last digits of a batch decide nothing


def test_biased_judge():
    rows, a, b = prompts(300), ["0"] * 300, ["9"] * 300
    assert BiasedJudge(Numbers(), 0.).compare(rows, a, b) == pytest.approx(Numbers().compare(rows, a, b))
    assert (BiasedJudge(Numbers(), 1.).compare(rows, a, b) == 1).all()
    assert np.mean(BiasedJudge(Numbers(), .3).compare(rows, a, b) == 1) == pytest.approx(.3, abs=.08)


@pytest.mark.parametrize("text, verdict", [
    ("A", 1), (" b ", 0), ("tie", .5), ("A tie", .5), ("It is a tie.", .5), ("[[B]]", 0), ("**A**", 1), ("Answer: A", 1), ("The better answer is B.", 0),
    ("A is longer, B is right.\n\nVerdict: B", 0), ("A or B", None), ("a lovely question", None), ("Both", None), ("Neither", None), ("AB", None), ("", None),
    ("Verdict: A\nHave a nice day!", None)])
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


def test_callable_judge_shows_both_answers_asks_again_and_gives_up_clearly():
    seen, replies = [], iter(["Hm.", "B", "A"])
    judge = CallableJudge(lambda text: seen.append(text) or next(replies))
    said = judge.compare(prompts(3), ["one {second}", "same", "{x}"], ["two", "same", "four"])
    assert said.tolist() == [0, .5, 1] and len(seen) == 3  # asked again once; equal answers are not asked
    assert "user: Question 0?" in seen[0] and "Answer A: one {second}\n" in seen[0] and "Answer B: two\n" in seen[0]
    with pytest.raises(UserError, match="said 'Who knows' about prompt 'p0'.*last line must be A, B or tie"):
        CallableJudge(lambda text: "Who knows", tries=3).compare(prompts(1), ["a"], ["b"])
    with pytest.raises(UserError, match="lacks {second}"):
        CallableJudge(lambda text: "A", prompt="{dialog} {first}").compare(prompts(1), ["a"], ["b"])


@settings(max_examples=50, deadline=None)
@given(median=st.lists(st.integers(1, 7), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_calibration_groups_by_the_median(median, seed):
    m, rng = np.array(median), np.random.default_rng(seed)
    ratings = rng.permuted(np.stack([np.clip(m - rng.integers(0, 3, len(m)), 1, 7), m, np.clip(m + rng.integers(0, 3, len(m)), 1, 7)]), axis=0)
    table = calibration(torch.tensor(m) * 1. - 4, ratings)
    assert [r["rating"] for r in table] == sorted(set(median)) and sum(r["n"] for r in table) == len(m)
    for r in table: assert r["mean"] == pytest.approx(1 / (1 + np.exp(4 - r["rating"]))) and r["sd"] == pytest.approx(0, abs=1e-9)


def test_calibration_with_missing_ratings():
    nan = np.nan
    table = calibration([0., 1., 2.], [[3, nan, nan], [4, 6, nan], [nan, 6, nan]])  # medians 3.5, which becomes 4, and 6; one unrated
    assert [(r["rating"], r["n"]) for r in table] == [(4, 1), (6, 1)]
    with pytest.raises(UserError, match="2 scores but ratings of shape"): calibration([0., 1.], [[1, 2, 3]])


def test_select_model():
    assert select_model({"a": -2., "b": -1., "c": -1.}, float) == "b"
    with pytest.raises(UserError, match="candidate 'a' is not a number"): select_model({"a": float("nan"), "b": 1.}, float)
    with pytest.raises(UserError, match="no candidate"): select_model({}, float)


STEPS = ("collect", "train_rewards", "sample", "merge", "fine_tune", "ppo", "evaluate")


def steps_of(name, log, die="", ppo=True):
    "Steps that log their arguments; the step named `die` is killed."
    made = {"collect": lambda: [{"pair": name}], "train_rewards": lambda pairs: ("scorer", len(pairs)), "sample": lambda s: [{"sample": name}],
            "merge": lambda kept, s: [r for rows in kept for r in rows], "fine_tune": lambda rows: [name, len(rows)],
            "ppo": lambda model, s: [*model, "ppo"], "evaluate": lambda model, s: {"score": (1, 2)}}
    def step(what):
        def call(*args):
            if what == die: raise KeyboardInterrupt
            log.append((what, args))
            return made[what](*args)
        return call
    return RoundSteps(**{what: step(what) for what in STEPS if ppo or what != "ppo"})


def test_a_round_goes_in_the_papers_order_and_remembers_all_earlier_rounds():  # trap 52
    log, versions = [], [Version("v0", [{"pair": "v0"}], [])]
    for name in ("v1", "v2", "v3"): versions.append(run_round(name, steps_of(name, log), versions))
    last = dict(log[-len(STEPS):])
    assert tuple(what for what, _ in log) == STEPS * 3
    assert [r["pair"] for r in last["train_rewards"][0]] == ["v0", "v1", "v2", "v3"]
    assert [[r["sample"] for r in rows] for rows in last["merge"][0]] == [[], ["v1"], ["v2"], ["v3"]]
    assert all(last[k][-1] == ("scorer", 4) for k in ("sample", "merge", "ppo", "evaluate"))  # every step asks the newest judge
    assert versions[-1].model == ["v3", 3, "ppo"] and last["evaluate"][0] == versions[-1].model


def test_ppo_is_optional():
    log = []
    assert run_round("v1", steps_of("v1", log, ppo=False)).model == ["v1", 1] and [w for w, _ in log] == [s for s in STEPS if s != "ppo"]


@pytest.mark.parametrize("die", STEPS)
def test_a_killed_round_goes_on(tmp_path, die):
    whole = run_round("v1", steps_of("v1", []), out=tmp_path / "whole")
    first, second = [], []
    with pytest.raises(KeyboardInterrupt): run_round("v1", steps_of("v1", first, die), out=tmp_path / "cut")
    assert run_round("v1", steps_of("v1", second), out=tmp_path / "cut") == whole
    repeated = {w for w, _ in first} & {w for w, _ in second}
    assert not repeated & {"collect", "sample", "evaluate"}  # what the round keeps is not made twice
    assert run_round("v1", steps_of("v1", []), out=tmp_path / "cut") == whole  # and a finished one gives the same again
    assert read_version("v1", tmp_path / "cut") == Version("v1", whole.pairs, whole.samples, None, whole.report)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_round("v1", steps_of("v1", []))
    assert list(tmp_path.iterdir()) == [] and rounds.ORDERS[0] == "both"


@pytest.mark.filterwarnings("ignore:.*rows left out")
def test_a_callable_judge_on_real_pairs(real_data):
    path = next((real_data / "hh_rlhf").rglob("*.jsonl*"))
    pairs = read_preferences(path, skip_bad=True)[:300]
    def longer(text):
        a, b = (text.split(f"\nAnswer {x}: ")[1] for x in "AB")
        return "A" if len(a) - len(b) > len(b) else "B"
    rows = [{"id": i, "messages": r["messages"]} for i, r in enumerate(pairs)]
    rate = win_rate(CallableJudge(longer), rows, [r["chosen"] for r in pairs], [r["rejected"] for r in pairs])
    assert .35 < rate.mean < .75 and rate.n == len(pairs)
