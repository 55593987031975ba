"""Intervals keep their promise; verdicts follow from intervals alone."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_nbdev.stats import Interval, bootstrap, compare, draw_weights, judge, spread, t_quantile

rng = np.random.default_rng(0)


def inside(x: float, iv: Interval) -> bool:
    return iv.low <= x <= iv.high


@pytest.mark.parametrize("p, df, want", [(.975, 1, 12.7062), (.975, 2, 4.30265), (.95, 3, 2.35336), (.995, 10, 3.16927), (.975, 120, 1.97993), (.5, 7, 0)])
def test_t_quantile_against_tables(p, df, want):
    assert t_quantile(p, df) == pytest.approx(want, abs=1e-4)
    assert t_quantile(1 - p, df) == pytest.approx(-want, abs=1e-4)


def test_one_way_agrees_with_the_textbook():
    x = rng.normal(3, 2, 400)
    iv = bootstrap(x, resamples=4000)
    half = 1.966 * x.std(ddof=1) / 20
    assert iv.mean == pytest.approx(x.mean()) and iv.n == 400
    assert iv.low == pytest.approx(x.mean() - half, abs=.02) and iv.high == pytest.approx(x.mean() + half, abs=.02)
    small = bootstrap(x[:4], resamples=4000)
    half = 3.182 * x[:4].std(ddof=1) / 2  # Student's t with 3 degrees of freedom
    assert (small.high - small.low) / 2 == pytest.approx(half, rel=.1)


@pytest.mark.parametrize("g", [2, 4, 12])
def test_few_clusters_vary_about_their_own_mean(g):
    x = rng.normal(size=g)
    variance, df = spread(lambda w: (w @ x) / w.sum(1), [np.arange(g)], 20_000, 0)
    assert variance == pytest.approx(x.var(ddof=1) / g, rel=.05) and df == pytest.approx(g - 1)


def test_clusters_widen_and_copies_add_nothing():
    x = rng.normal(size=50)
    once = bootstrap(x, resamples=4000)
    copied = bootstrap(np.repeat(x, 20), np.repeat(np.arange(50), 20), resamples=4000)
    assert copied.low == pytest.approx(once.low, abs=.02) and copied.high == pytest.approx(once.high, abs=.02)
    naive = bootstrap(np.repeat(x, 20))
    assert naive.high - naive.low < (once.high - once.low) / 3


def test_two_ways_count_the_noise_once():
    s, p = 20, 30
    y = np.random.default_rng(1).normal(size=(s, p))  # pure noise: variance 1 / (s p)
    rows, columns = np.indices((s, p)).reshape(2, -1)
    variance, _ = spread(lambda w: (w @ y.ravel()) / w.sum(1), [rows, columns], 4000, 0)
    assert variance < 2 / (s * p), "seed part plus prompt part alone would be about 2 / (s p)"


def test_two_ways_equal_one_when_the_other_is_nested():
    x = rng.normal(size=60)
    seed = np.repeat(np.arange(6), 10)
    nested = bootstrap(x, {"seed": seed, "prompt": np.arange(60)}, resamples=4000)
    outer = bootstrap(x, seed, resamples=4000)
    assert nested.high - nested.low == pytest.approx(outer.high - outer.low, rel=.25)


def test_coverage_of_seeds_and_prompts():
    world, hits, naive, trials = np.random.default_rng(2), 0, 0, 120
    for i in range(trials):
        y = .5 * world.normal(size=(5, 1)) + world.normal(size=(1, 30)) + world.normal(size=(5, 30))
        hits += inside(0, bootstrap(y, resamples=200, seed=i))
        naive += inside(0, bootstrap(y.ravel(), resamples=200, seed=i))
    assert hits / trials > .88 and naive / trials < .7


def test_tables_ids_and_order_agree():
    y = rng.random((3, 40))
    rows, columns = np.indices(y.shape).reshape(2, -1)
    assert bootstrap(y) == bootstrap(y.ravel(), {"seed": rows, "prompt": columns})
    single = bootstrap(y[:1])  # one seed: only prompts vary
    assert single == bootstrap(y[0], np.arange(40))


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-5, 5), scale=st.floats(.1, 5), seed=st.integers(0, 99))
def test_moving_and_stretching_the_values_moves_and_stretches_the_interval(shift, scale, seed):
    x = np.random.default_rng(seed).random(20)
    a, b = bootstrap(x, resamples=200), bootstrap(x * scale + shift, resamples=200)
    assert b.low == pytest.approx(a.low * scale + shift, abs=1e-6) and b.high == pytest.approx(a.high * scale + shift, abs=1e-6)
    assert a.low <= a.mean <= a.high


def test_rates_of_nothing_and_all_are_not_certain():
    assert bootstrap([0] * 500).low == 0 and bootstrap([0] * 500).high == pytest.approx(1 - .025**(1 / 500))
    assert bootstrap(np.ones((3, 50))).low == pytest.approx(.025**(1 / 50)), "50 prompts, not 150 cells"
    assert bootstrap([.7] * 5).low == .7
    one = bootstrap([1.])
    assert np.isnan(one.low) and np.isnan(one.high) and one.mean == 1


def test_other_statistics():
    x = rng.exponential(size=200)
    iv = bootstrap(x, statistic=np.median, resamples=300)
    assert iv.mean == np.median(x) and iv.low < np.log(2) < iv.high
    same = bootstrap(x, statistic=lambda v: v.mean(), resamples=300)
    assert same.low == pytest.approx(bootstrap(x, resamples=300).low)


@pytest.mark.parametrize("values, clusters, says", [([], None, "empty"), ([1, np.nan], None, "1 NaN"), ([1, 2], [1], "1 ids for 2 values"),
                                                    ([1, 2], {"a": [1, 2], "b": [1, 2], "c": [1, 2]}, "Two at most")])
def test_bad_input_is_refused(values, clusters, says):
    with pytest.raises(ValueError, match=says):
        bootstrap(values, clusters)


def test_draws_take_whole_clusters():
    codes = np.array([0, 0, 1, 2, 2, 2])
    w = draw_weights(codes, 500, np.random.default_rng(0))
    assert (w[:, 0] == w[:, 1]).all() and (w[:, 3] == w[:, 5]).all()
    assert (w[:, [0, 2, 3]].sum(1) == 3).all() and w.max() == 3


def test_pairing_is_used():
    hard = rng.normal(size=200)
    a, b = hard + .1 + .1 * rng.normal(size=200), hard + .1 * rng.normal(size=200)
    assert compare(a, b).verdict == "better" and compare(b, a).verdict == "worse"
    assert compare(a, b[:-1]).verdict == "no difference shown"
    order = rng.permutation(200)  # rows in another order, but with ids
    by_id = compare(a, b[order], clusters=np.arange(200), clusters_b=order)
    assert by_id.difference.high - by_id.difference.low < .06


def test_unpaired_samples_agree_with_welch():
    a, b = rng.normal(1, 1, 300), rng.normal(0, 2, 200)
    d = compare(a, b, resamples=4000).difference
    se = np.sqrt(a.var(ddof=1) / 300 + b.var(ddof=1) / 200)
    assert d.mean == pytest.approx(a.mean() - b.mean()) and (d.high - d.low) / 2 == pytest.approx(1.965 * se, rel=.08)


@pytest.mark.parametrize("low, high, margin, lower, want", [
    (.01, .03, 0, False, "better"), (-.03, -.01, 0, False, "worse"), (-.01, .03, 0, False, "no difference shown"),
    (-.01, .03, .02, False, "not inferior"), (-.03, .03, .02, False, "no difference shown"), (-.015, -.005, .02, False, "not inferior"),
    (-.03, -.01, .02, False, "worse"), (.01, .03, .02, False, "better"), (.01, .03, 0, True, "worse"), (-.03, -.01, 0, True, "better"),
    (-.03, .01, .02, True, "not inferior"), (-.02, .01, .02, False, "no difference shown"), (0., .03, 0, False, "no difference shown")])
def test_verdicts(low, high, margin, lower, want):
    assert judge(Interval((low + high) / 2, low, high, 9), margin, lower) == want


def test_false_alarms_are_rare():
    world = np.random.default_rng(5)
    said = [compare(world.random(60), world.random(60), resamples=200, seed=i).verdict for i in range(150)]
    assert np.mean([v != "no difference shown" for v in said]) < .1


def test_printing():
    iv = Interval(.5, .4, .6, 10)
    assert str(iv) == "0.500 [0.400, 0.600] (n=10)" and f"{iv:.0%}" == "50% [40%, 60%] (n=10)"
    assert str(compare([1, 1, 1, 0], [0, 0, 0, 0])).endswith(("better", "shown"))
    assert iv.overlaps(Interval(.6, .6, .7, 3)) and not iv.overlaps(Interval(.7, .61, .8, 3))
