"Contamination (A.6): matching against a naive search, planted copies, Z, Table 51."
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.pretraining.contamination import (SUBSETS, TABLE_51, ContaminationConfig, SuffixIndex, affected, contaminated, contamination,
                                                    contamination_test, find_spans, index_shards, largest_affected, recomputed, z_score)
from llama2_nbdev.pretraining.data import TokenData, tokenize_corpus

pytest.importorskip("pydivsufsort")

def index_of(*docs, dtype=np.uint16): return SuffixIndex(np.array([t for d in docs for t in d], dtype), np.cumsum([len(d) for d in docs]))

def naive(sample, docs, longer_than, seed, budget):
    "The definition, word for word: every start against every start."
    found = np.zeros(len(sample), bool)
    for doc in docs:
        for i in range(len(sample)):
            for j in range(len(doc)):
                for length in range(longer_than + 1, min(len(sample) - i, len(doc) - j) + 1):
                    wrong = [k for k in range(length) if sample[i + k] != doc[j + k]]
                    if len(wrong) <= budget and length >= seed and all(seed <= k < length - 1 for k in wrong): found[i:i + length] = True
    return found.tolist()

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=18)

@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 3), st.integers(0, 4), st.sampled_from([0, 255, 70_000]))
@settings(max_examples=100, deadline=None)
def test_equals_the_naive_search(sample, docs, seed, budget, more, shift):
    "Also for ids above one byte and above two: the order of suffixes must be that of the tokens."
    sample, docs = [t * 200 + shift for t in sample], [[t * 200 + shift for t in d] for d in docs]
    cfg = ContaminationConfig(seed, budget, (seed + more,))
    index = index_of(*docs, dtype=np.uint16 if shift < 60_000 else np.uint32)
    assert contaminated([index], sample, cfg)[0].tolist() == naive(sample, docs, seed + more, seed, budget)

@given(st.lists(TOKENS, min_size=2, max_size=4), TOKENS)
@settings(max_examples=40, deadline=None)
def test_parts_of_a_corpus_add_up(docs, sample):
    cfg = ContaminationConfig(2, 1, (2, 3))
    assert (contaminated([index_of(*docs)], sample, cfg) == contaminated([index_of(d) for d in docs], sample, cfg)).all()

@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_find_gives_every_place(tokens, k):
    index = index_of(tokens)
    queries = np.array([tokens[i:i + k] for i in range(len(tokens) - k + 1)] + [[301] * k, [7] * k])
    for q, a, b in zip(queries, *index.find(queries)):
        assert sorted(index.suffixes[a:b].tolist()) == [i for i in range(len(tokens) - k + 1) if tokens[i:i + k] == q.tolist()]

# ---- planted questions with the paper's numbers

@given(st.data())
@settings(max_examples=60, deadline=None)
def test_planted_copies(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n = data.draw(st.integers(16, 60))
    edits = sorted(data.draw(st.sets(st.integers(10, n - 2), max_size=5)))
    question, other = rng.integers(3, 1000, n), rng.integers(3, 1000, 200)
    copy = question.copy(); copy[edits] += 1000
    index = index_of(other.tolist(), copy.tolist(), other.tolist())
    marks = contaminated([index], question)[0]
    if len(edits) <= 4: assert marks.all()                                  # an exact beginning, at most four edits, an exact end
    elif max(np.diff(edits)) <= 10:                                         # no new seed between the edits: the span ends before the fifth
        end = max(k for k in range(edits[4]) if k not in edits) + 1
        assert marks[:end].all() == marks[:end].any() == (end > 10) and not marks[edits[4]]
    assert not contaminated([index_of(other.tolist())], question).any()

def test_a_fifth_edit_and_an_early_edit_are_missed():
    question = np.arange(100, 140)
    def found(*edits, n=10):
        copy = question.copy(); copy[list(edits)] += 1000
        return contamination([index_of(range(50), copy)], [question])[n][0]
    assert found() == found(12, 18, 24, 30) == 1 and found(12, 17, 22, 27, 32) == 32 / 40
    assert found(4) == 35 / 40 and found(8, 17, 26, 35) == 0 and found(39) == 39 / 40
    assert found(n=30) == 1 and found(n=40) == 0                            # longer than 40 means at least 41

@pytest.mark.parametrize("length, marked", [(10, False), (11, True)])
def test_longer_than_ten(length, marked):
    assert contaminated([index_of([1] + list(range(100, 100 + length)) + [2])], [*range(100, 100 + length), 7])[0].any() == marked

def test_no_span_crosses_documents():
    a, b = list(range(10, 20)), list(range(20, 30))
    assert not contaminated([index_of(a, b)], a + b)[0].any() and contaminated([index_of(a + b)], a + b)[0].all()
    assert find_spans(index_of(a, b), [1, 2]).shape == (0, 3)
    assert find_spans(index_of(a, b), range(15, 25)).shape == (0, 3) and find_spans(index_of(a + b), range(15, 25)).tolist() == [[0, 10, 5]]

def test_shards_can_be_searched(tmp_path):
    class Bytes:
        vocab_size = 259
        def encode(self, text, bos=True, eos=False): return [1] * bos + [b + 3 for b in text.encode()] + [2] * eos
    (tmp_path / "c.jsonl").write_text('{"text": "the answer to the riddle is a red kite"}\n{"text": "nothing here", "source": "b"}')
    tokenize_corpus(Bytes(), tmp_path / "c.jsonl", tmp_path / "s", 0)
    shares = contamination(index_shards(TokenData(tmp_path / "s")), [Bytes().encode(t, bos=False) for t in ("to the riddle is a red kite", "quite another line")])
    assert shares[10].tolist() == [1, 0] and shares[30].tolist() == [0, 0]

# ---- the statistic

def test_table_51():
    rows = recomputed()
    assert len(rows) == 20 and max(abs(r["printed"] - r["recomputed"]) for r in rows) < .2
    z = {(r["dataset"], r["model"], r["subset"]): r["recomputed"] for r in rows}
    assert z["HellaSwag", "70B", "dirty"] == pytest.approx(7.43, abs=.005) and z["MMLU-Humanities", "70B", "dirty"] == pytest.approx(9.82, abs=.005)
    for four in TABLE_51.values(): assert four[0][1] + four[1][1] == four[2][1] + four[3][1]
    assert TABLE_51["MMLU-Humanities", 50, "70B"][1][0] != TABLE_51["MMLU-Humanities", 50, "7B"][1][0]     # as printed

def test_all_four_and_the_right_sign():
    shares, scores = np.repeat([0., .5, .9], [60, 20, 20]), np.repeat([0, 1, 0, 1, 1], [40, 20, 10, 10, 20])
    rows = contamination_test(shares, scores)
    assert affected(rows) and [r["n"] for r in rows.values()] == [60, 40, 80, 20]
    for name in SUBSETS: assert not affected({**rows, name: {**rows[name], "z": 1.99 * SUBSETS[name][1]}})
    assert not affected(contamination_test(shares, 1 - scores))
    assert largest_affected({10: shares, 30: shares, 50: shares * 0}, scores) == 30

def test_limits_of_the_subsets():
    rows = contamination_test(np.array([.2, .8, .1999, .7999]), np.array([0, 1, 0, 1]))
    assert [r["n"] for r in rows.values()] == [1, 3, 3, 1]

def test_nothing_to_compare_is_not_affected():
    for shares, scores in (([0, 0, 0], [0, 1, 1]), ([0, .5, 1], [1, 1, 1]), ([1, 1], [0, 1])):
        rows = contamination_test(np.array(shares, float), np.array(scores))
        assert not affected(rows) and any(math.isnan(r["z"]) for r in rows.values())
    assert z_score(.6, .5, 100) == pytest.approx(2.) and math.isnan(z_score(1., 1., 5))

def test_chance_alone_is_rarely_affected():
    rng = np.random.default_rng(0)
    hits = [affected(contamination_test(rng.choice([0., .5, 1.], 300), rng.integers(0, 2, 300))) for _ in range(300)]
    assert np.mean(hits) < .02

def test_errors():
    with pytest.raises(UserError, match="must agree"): SuffixIndex(np.array([1, 2], np.uint16), np.array([1]))
    with pytest.raises(UserError, match="must agree"): SuffixIndex(np.array([], np.uint16), np.array([], np.int64))
    with pytest.raises(UserError, match="sample 1 has no tokens"): contamination([index_of([1, 2])], [[1], []])
    with pytest.raises(UserError, match="2 shares and 1 scores"): contamination_test([0, 1], [1])
