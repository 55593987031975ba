"Writers, judges and the gain of a tail."
import numpy as np
import pytest

from llama2_nbdev.core import UserError, project_root, read_jsonl
from llama2_nbdev.discussion.supervision import SKILLS, percentiles, pick_by_comparing, reward_figure, tail_gain, utilities, written_mix
from llama2_nbdev.world.annotators import Annotator, Judge

ROWS = [r for r in read_jsonl(project_root()/"data_samples"/"prompts.jsonl") if r["kind"] == "helpful"][:300]
CROWD = [Annotator(SKILLS[-1], seed=i) for i in range(5)]
NORMAL = np.random.default_rng(0).standard_normal(300)


def test_writers_take_turns_and_skill_pays():
    mix = written_mix(ROWS, CROWD[:2])
    assert mix[:2] == [CROWD[0].write(ROWS[0]), CROWD[1].write(ROWS[1])] and len(mix) == len(ROWS)
    worth = [utilities(ROWS, written_mix(ROWS, [Annotator(s)])).mean() for s in SKILLS]
    assert worth == sorted(worth, reverse=True) and worth[0] > worth[-1] + .1
    with pytest.raises(UserError, match="no writer"): written_mix(ROWS, [])


def test_a_careless_judge_beats_a_careless_writer():
    drafts = [written_mix(ROWS, [w]) for w in CROWD[:4]]
    assert pick_by_comparing(ROWS, drafts[:1], CROWD[4]) == drafts[0]
    picked = pick_by_comparing(ROWS, drafts, CROWD[4])
    assert all(a in some for a, some in zip(picked, zip(*drafts)))
    u, best = utilities(ROWS, drafts[0]), utilities(ROWS, picked)
    assert best.mean() > u.mean() + .1 and (best < .5).mean() < (u < .5).mean() / 2
    perfect = np.max([utilities(ROWS, d) for d in drafts], axis=0)
    assert (best <= perfect).all() and utilities(ROWS, pick_by_comparing(ROWS, drafts, Judge(1.))).mean() > best.mean() - .02


@pytest.mark.parametrize("after, says", [
    (np.maximum(NORMAL, -.5), "better"), (NORMAL + .2, "no difference shown"), (np.where(NORMAL > 0, 2 * NORMAL, NORMAL), "worse")])
def test_the_verdict_on_the_tail(after, says):
    found = tail_gain(NORMAL, after, resamples=300)
    assert found["verdict"] == says
    assert np.isclose(found["extra"].mean, found["low"].mean - found["high"].mean)


def test_several_seeds():
    before = np.stack([NORMAL + e for e in (0, .1, .2)])
    found = tail_gain(before, np.maximum(before, -.5), resamples=200)
    assert found["verdict"] == "better" and found["extra"].n == before.size
    with pytest.raises(UserError, match="answer the same prompts"): tail_gain(before, NORMAL)


def test_percentiles_and_figure():
    assert percentiles({"a": np.arange(101)}, (10, 90)) == {"a": {10: 10., 90: 90.}}
    fig = reward_figure({"a": NORMAL, "b": NORMAL + 1})
    x, y = fig.axes[0].lines[0].get_data()
    assert np.isclose(np.trapezoid(y, x), 1, atol=.03), "a density has area 1"
