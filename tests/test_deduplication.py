"Copies: exact by hash, near by MinHash, memory, log."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.pretraining.deduplication import (DedupConfig, Deduplicator, candidate_probability, empty_minhash, exact_key, jaccard, minhash, shingles,
                                                    words_of)

pytest.importorskip("datasketch")
WORDS = st.lists(st.sampled_from("one two three four five six".split()), min_size=1, max_size=30)

@given(WORDS, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_shingles_are_the_set_of_runs(words, size):
    runs = {tuple(words[i:i + size]) for i in range(max(len(words) - size, 0) + 1)}
    assert len(shingles(words, size)) == len(runs)

def test_every_word_of_a_run_counts():
    "The number of a run depends on each of its words, the last one included."
    base = "a b c d e".split()
    changed = [[w if k != i else "x" for k, w in enumerate(base)] for i in range(5)]
    assert len({int(shingles(w)[0]) for w in [base, *changed, base[::-1]]}) == 7

@given(WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_jaccard_is_that_of_the_sets(a, b):
    x, y = ({tuple(w[i:i + 2]) for i in range(max(len(w) - 2, 0) + 1)} for w in (a, b))
    assert jaccard(shingles(a, 2), shingles(b, 2)) == pytest.approx(len(x & y) / len(x | y))

@pytest.mark.parametrize("n", [5, 20, 50])
def test_signatures_estimate_jaccard(n):
    empty, found = empty_minhash(DedupConfig()), []
    for t in range(40):
        a, b = ([f"{t} {i if i < 100 - cut else -i}" for i in range(100)] for cut in (0, n))
        found.append(np.mean(minhash(shingles(a, 1), empty).hashvalues == minhash(shingles(b, 1), empty).hashvalues))
    assert np.mean(found) == pytest.approx((100 - n) / (100 + n), abs=.03)

def test_curve():
    s = np.linspace(0, 1, 50)
    p = candidate_probability(s, 16, 7)
    assert p[0] == 0 and p[-1] == 1 and (np.diff(p) >= 0).all()
    assert (candidate_probability(s, 20, 7) >= p).all() and (candidate_probability(s, 16, 8) <= p).all()

def test_exact_ignores_case_and_marks_only():
    assert exact_key(words_of("The dog,\n THE cat!")) == exact_key(words_of("the dog the cat"))
    assert exact_key(words_of("the dogthe cat")) != exact_key(words_of("the dog the cat"))
    assert exact_key(words_of("+++")) != exact_key(words_of("---"))
    assert exact_key(words_of("x = a + b")) != exact_key(words_of("x = a - b"))

@pytest.mark.parametrize("near", [True, False])
def test_first_copy_stays(near):
    dedup = Deduplicator(DedupConfig(near=near))
    text = " ".join(f"word{i}" for i in range(60))
    assert dedup.add("something else") is None and dedup.add(text) is None
    assert dedup.add(text.upper())[:2] == ("exact", 1)
    edited = dedup.add(text + " more")
    assert edited[:2] == ("near", 1) if near else edited is None
    assert dedup.add(" ".join(f"other{i}" for i in range(60))) is None

@given(st.lists(st.text(max_size=30), max_size=20))
@settings(max_examples=30, deadline=None)
def test_any_text_and_no_copy_of_a_copy(texts):
    dedup, kept = Deduplicator(), []
    for t in texts:
        copy = dedup.add(t)
        if copy is None: kept.append(t)
        elif copy.kind == "exact": assert words_of(kept[copy.of]) == words_of(t)
    assert len(dedup) == len(kept) == len({exact_key(words_of(t)) for t in kept})

@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 7, 39])
def test_log_brings_the_tables_back(tmp_path, cut, near):
    texts = [f"text {i % 25} has {i % 25} words and {'more' * (i % 3)} to say about {i % 25} things of the world" for i in range(80)]
    cfg, whole = DedupConfig(near=near), Deduplicator(DedupConfig(near=near))
    wanted = [whole.add(t) for t in texts]
    with Deduplicator(cfg, tmp_path / "log") as first:
        found = [first.add(t) for t in texts[:cut]]
        n = first.sync()
        for t in texts[cut:cut + 10]: first.add(t)
    with Deduplicator(cfg, tmp_path / "log", n) as second: found += [second.add(t) for t in texts[cut:]]
    assert found == wanted and len(second) == len(whole)
    with Deduplicator(cfg, tmp_path / "log", len(whole)) as third: assert [third.add(t) for t in texts] == [whole.add(t) for t in texts]

def test_more_documents_than_the_first_table_holds():
    dedup = Deduplicator()
    for i in range(1100): assert dedup.add(" ".join(f"{i} {k}" for k in range(8))) is None
    assert dedup.add("0 0 0 1 0 2 0 3 0 4 0 5 0 6 0 7")[:2] == ("exact", 0) and len(dedup) == 1100

def test_errors(tmp_path):
    for bad in (dict(threshold=0.), dict(threshold=1.5), dict(bands=1), dict(rows=0), dict(shingle=0)):
        with pytest.raises(UserError, match="bands >= 2"): DedupConfig(**bad)
    (tmp_path / "log").write_bytes(b"x" * 10)
    with pytest.raises(UserError, match="fewer than 3 whole records"): Deduplicator(log=tmp_path / "log", documents=3)
