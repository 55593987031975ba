"Agreement of raters: loops, published values, missing ratings, the kappa paradox, the standard error."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.agreement import (
    WEIGHTS, agreement, agreement_weights, cohen_kappa, gwet_ac1, gwet_ac2, rating_counts)

NA = np.nan
SIX = np.array([[5, 5, 5], [5, 5, 4], [4, 4, 4], [1, 1, 2], [5, 4, 3], [2, 1, 1]]).T
FOUR = np.array([[1, 1, NA, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
                 [2, 2, 2, 2], [NA, 5, 5, 5], [NA, NA, 1, 1], [NA, NA, 3, NA]]).T
HUNDRED = np.array([[0, 0]] * 95 + [[0, 1]] * 2 + [[1, 0]] * 2 + [[1, 1]]).T


def by_pairs(ratings, w, scale):
    "The definition in loops: pairs of raters within an item, means over items."
    items = [[scale.index(v) for v in column if v == v] for column in np.asarray(ratings, float).T]
    items = [x for x in items if x]
    inside = [np.mean([w[a][b] for i, a in enumerate(x) for j, b in enumerate(x) if i != j]) for x in items if len(x) > 1]
    share = [np.mean([x.count(k) / len(x) for x in items]) for k in range(len(scale))]
    p_e = np.sum(w) / (len(scale) * (len(scale) - 1)) * sum(p * (1 - p) for p in share)
    return (np.mean(inside) - p_e) / (1 - p_e)


tables = st.integers(2, 5).flatmap(lambda r: st.lists(st.lists(st.sampled_from([1., 2., 3., 4., NA]), min_size=r, max_size=r), min_size=2, max_size=12))


@settings(deadline=None, max_examples=100)
@given(tables, st.sampled_from(WEIGHTS))
def test_equal_to_the_definition_in_loops(rows, weights):  # trap 58: chance-corrected, ties and missing ratings
    x, scale = np.array(rows).T, [1., 2., 3., 4.]
    if not ((~np.isnan(x)).sum(0) > 1).any():
        with pytest.raises(UserError, match="no item has two ratings"): agreement(x, weights, scale)
        return
    found = agreement(x, weights, scale)
    assert found.value == pytest.approx(by_pairs(x, agreement_weights(scale, weights), scale))
    assert found.low <= found.value <= found.high <= 1 or np.isnan(found.se)
    for same in (x[::-1], x[:, ::-1], np.hstack([x, np.full((len(x), 1), NA)])):
        assert agreement(same, weights, scale).value == pytest.approx(found.value)


def test_derived_numbers():
    assert gwet_ac1(SIX) == pytest.approx(0.385199, abs=1e-6)
    assert gwet_ac2(SIX) == pytest.approx(0.861004, abs=1e-6)
    assert gwet_ac2(SIX, "ordinal") == pytest.approx(0.813559, abs=1e-6)
    assert gwet_ac2(SIX, "identity") == gwet_ac1(SIX)
    assert isinstance(gwet_ac1(SIX), float)


@pytest.mark.parametrize("weights, value, se, low", [
    ("identity", .77544, .14295, .461), ("linear", .859, .117, .600), ("ordinal", .899, .107, .664), ("quadratic", .914, .104, .685)])
def test_published_values_with_missing_ratings(weights, value, se, low):  # trap 58
    "Gwet (2014), page 120; irrCAC prints AC1 to five digits, the tests of its Python edition the rest to three."
    a = agreement(FOUR, weights)
    digits = 5e-6 if weights == "identity" else 5e-4
    assert (a.value, a.se) == pytest.approx((value, se), abs=digits) and a.low == pytest.approx(low, abs=5e-4)
    assert a.high == 1 and (a.items, a.raters) == (12, 4)
    assert weights != "identity" or (a.observed, a.chance) == pytest.approx((.81818, .19032), abs=5e-6)


def test_published_table_of_two_raters():
    "irrCAC's cont3x3abstractors; for tables it divides the variance by n, for raw ratings by n - 1."
    table = np.array([[13, 0, 0], [0, 20, 7], [0, 4, 56]])
    x = np.repeat(np.indices((3, 3)).reshape(2, 9), table.ravel(), axis=1)
    a = agreement(x)
    assert (a.value, cohen_kappa(x)) == pytest.approx((.8493305, .7964094), abs=5e-8)
    assert a.se * np.sqrt(99 / 100) == pytest.approx(.04321747, abs=5e-9)


def test_the_kappa_paradox():  # trap 58: raw agreement and kappa mislead where a label is rare
    assert gwet_ac1(HUNDRED) == pytest.approx(.9575, abs=5e-5) and cohen_kappa(HUNDRED) == pytest.approx(.3127, abs=5e-5)
    rng = np.random.default_rng(0)
    guesses = rng.integers(1, 8, (3, 3000))
    a = agreement(guesses, "quadratic", range(1, 8))
    assert a.observed > .7 and abs(a.value) < .05 and a.low < 0 < a.high


def test_perfect_agreement_and_a_scale_with_unused_points():
    x = np.array([[1, 2, 3]] * 3)
    assert agreement(x).value == 1 and agreement(x).se == pytest.approx(0)
    assert gwet_ac1([[3, 3], [3, 3]], categories=range(1, 6)) == 1
    assert gwet_ac2(x + [[0, 0, 0], [1, 0, 0], [0, 0, 0]]) != gwet_ac2(x + [[0, 0, 0], [1, 0, 0], [0, 0, 0]], categories=range(1, 8))


def test_weights():
    for kind in WEIGHTS:
        w = agreement_weights([1, 2, 3, 4, 5, 6, 7], kind)
        assert (w == w.T).all() and (w.diagonal() == 1).all() and w[0, -1] == 0 and w.min() >= 0
        assert agreement(SIX, agreement_weights(range(1, 6), kind)) == agreement(SIX, kind)
    assert agreement_weights([1, 2, 3], "ordinal")[0].tolist() == pytest.approx([1, 2 / 3, 0])
    assert agreement_weights([1, 2, 5], "linear")[0].tolist() == [1, .75, 0]


def test_the_standard_error_is_the_jackknifes():
    rng = np.random.default_rng(1)
    truth = rng.integers(1, 6, 150)
    x = np.clip(truth + rng.integers(-1, 2, (3, 150)), 1, 5)
    left_out = np.array([gwet_ac2(np.delete(x, i, 1), categories=range(1, 6)) for i in range(150)])
    assert agreement(x, "quadratic", range(1, 6)).se == pytest.approx(np.sqrt(149 * left_out.var()), rel=.02)


def test_the_interval_covers():
    rng = np.random.default_rng(2)
    truth = rng.integers(1, 6, 20_000)
    x = np.clip(truth + rng.integers(-2, 3, (3, 20_000)), 1, 5)
    value = gwet_ac2(x, categories=range(1, 6))
    found = [agreement(x[:, rng.choice(20_000, 60)], "quadratic", range(1, 6)) for _ in range(400)]
    assert .92 <= np.mean([a.low <= value <= a.high for a in found]) <= .98


def test_one_item_has_no_error():
    a = agreement([[1], [1], [2]], categories=(1, 2, 3))
    assert np.isnan(a.se) and np.isnan(a.low) and a.items == 1


@pytest.mark.parametrize("ratings, categories, message", [
    ([[1, 2, 3]], None, "two or more raters"),
    ([1, 2, 3], None, "two or more raters"),
    ([["good", "bad"], ["bad", "bad"]], None, "table of numbers"),
    ([[1, 2], [1]], None, "table of numbers"),
    ([[NA, NA], [NA, NA]], None, "no item has two ratings"),
    ([[1, None], [None, 2]], None, "no item has two ratings"),
    ([[1, 8], [1, 2]], range(1, 8), "rating 8 is none of the categories"),
    ([[3, 3], [3, 3]], None, "give the points of the scale"),
    ([[1, np.inf], [1, 2]], None, "infinite"),
])
def test_errors(ratings, categories, message):
    with pytest.raises(UserError, match=message): rating_counts(ratings, categories)


def test_errors_of_weights_and_kappa():
    with pytest.raises(UserError, match="choose one of identity"): agreement(SIX, "square")
    with pytest.raises(UserError, match="give a 5 x 5 matrix"): agreement(SIX, np.eye(4))
    for bad in (np.ones((5, 5)), np.eye(5) * 2, np.eye(5) + np.eye(5, k=1) / 2):
        with pytest.raises(UserError, match="symmetric"): agreement(SIX, bad)
    with pytest.raises(UserError, match="takes two raters"): cohen_kappa(SIX)
    with pytest.raises(UserError, match="no item has both"): cohen_kappa([[1, NA], [NA, 1]])
    assert np.isnan(cohen_kappa([[1, 1], [1, 1]]))
