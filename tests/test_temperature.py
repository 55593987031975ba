"Self-BLEU agrees with sacrebleu on any texts, and the verdict on temperature follows the curves."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, project_root, read_jsonl
from llama2_nbdev.discussion.temperature import (
    FIGURE_21, KINDS, SMOOTHING, BleuConfig, TemperatureConfig, bleu_against_others, bleu_metric, judge_rescaling, pick_prompts, sample_grid,
    score_grid, self_bleu, slope_table, slopes, temperature_figure)
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("sacrebleu")
TEMPERATURES = (.4, .9, 1.4)
TEXTS = st.lists(st.lists(st.sampled_from(("a", "b", "dog", "dog.", "Oslo,")), max_size=7).map(" ".join), min_size=2, max_size=6)


def naive(texts, cfg):
    "sacrebleu itself, each text against all the others."
    return [bleu_metric(cfg).sentence_score(t, texts[:i] + texts[i + 1:]).score for i, t in enumerate(texts)]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.sampled_from(SMOOTHING), st.integers(1, 4), st.booleans(), st.sampled_from(("13a", "char")))
def test_same_scores_as_sacrebleu(texts, smoothing, order, effective, tokenize):
    cfg = BleuConfig(order, smoothing, effective, tokenize)
    assert np.allclose(bleu_against_others(texts, cfg), naive(texts, cfg))


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.randoms())
def test_the_order_of_the_texts_does_not_matter(texts, rng):
    other = rng.sample(texts, len(texts))
    assert 0 <= self_bleu(texts) <= 100 + 1e-9 and np.isclose(self_bleu(texts), self_bleu(other))


def test_by_hand():
    cfg = BleuConfig(order=3)
    scores = bleu_against_others(["Uma has a dog.", "Uma has a cat.", "Uma has one dog."], cfg)
    assert np.allclose(scores, [100 * x ** (1/3) for x in (3/4 * 1/3, 4/5 * 2/4 * 1/3, 4/5 * 2/4 * 1/6)])


def test_a_text_is_not_its_own_reference():
    assert self_bleu(["one two three four", "five six seven eight"]) == 0
    assert np.isclose(self_bleu(["one two three four"] * 2), 100)


def test_short_answers_need_the_effective_order():
    assert self_bleu(["6"] * 5, BleuConfig(effective_order=False)) == 0
    assert np.isclose(self_bleu(["6"] * 5), 100)


def test_user_errors():
    with pytest.raises(UserError, match="two or more"): self_bleu(["alone"])
    with pytest.raises(UserError, match="choose one of exp"): BleuConfig(smoothing="some")
    with pytest.raises(UserError, match="order=0"): BleuConfig(order=0)
    with pytest.raises(UserError, match="samples=1"): TemperatureConfig(samples=1)
    with pytest.raises(UserError, match="a slope needs"): TemperatureConfig(temperatures=(1.,))
    with pytest.raises(UserError, match="0 factual prompts"): pick_prompts([])


def test_prompts_are_held_out_and_spread():
    rows = read_jsonl(project_root()/"data_samples"/"eval.jsonl")
    found = pick_prompts(rows)
    assert {kind: {r["task"] for r in some} for kind, some in found.items()} == {kind: {task} for kind, task in KINDS.items()}
    assert all(len({r["id"] for r in some}) == 10 for some in found.values())
    assert len({tuple(r["truth"]["answers"]) for r in found["factual"]}) > 5


def test_samples_have_their_places(tmp_path):
    tok = Tokenizer.train(["Where does Uma live? Uma lives in Oslo. Tell me a story!"] * 40, 300, tmp_path / "tokenizer.model")
    model = Llama(ModelConfig(vocab_size=tok.vocab_size, dim=16, n_layers=1, n_heads=2, max_seq_len=128)).eval()
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Where does Uma live?", "Tell me a story!")]
    cfg = TemperatureConfig(samples=3, temperatures=(.5, 1.5), max_new_tokens=6)
    grid = sample_grid(model, tok, rows, cfg)
    assert np.shape(grid) == (2, 2, 3) and grid == sample_grid(model, tok, rows, cfg)
    assert len(set(grid[1][0])) > 1, "samples of one prompt have random numbers of their own"
    seen = []
    score_grid(grid, rows, lambda row, answers: seen.append((row["messages"][0]["content"], answers)) or 0.)
    assert seen == [(r["messages"][0]["content"], line[i]) for line in grid for i, r in enumerate(rows)]


def curves(factual, creative, seed=0):
    "Lines with the given mean slopes after RLHF; -20 before."
    rng, t = np.random.default_rng(seed), np.array([[x] for x in TEMPERATURES])
    def lines(slope): return 95 + (slope + rng.standard_normal(10)) * (t - .4)
    return {"sft": {kind: lines(-20) for kind in KINDS}, "v5": {"factual": lines(factual), "creative": lines(creative)}}


@pytest.mark.parametrize("slope_f, slope_c, says", [
    (-5, -12, ("better", "better", "better")), (-12, -5, ("better", "better", "worse")), (-5, -40, ("better", "worse", "better"))])
@pytest.mark.parametrize("seeds", [1, 3])
def test_verdicts(slope_f, slope_c, says, seeds):
    found = judge_rescaling([curves(slope_f, slope_c, s) for s in range(seeds)], TEMPERATURES)
    assert (found.factual.verdict, found.creative.verdict, found.extra.verdict) == says
    assert np.isclose(found.extra.difference.mean, found.factual.difference.mean - found.creative.difference.mean)


def test_the_null_is_rarely_rejected():
    found = [judge_rescaling([curves(-20, -20, s)], TEMPERATURES).extra.verdict for s in range(30)]
    assert found.count("no difference shown") >= 25


def test_slopes_and_the_papers_lines():
    assert np.allclose(slopes(np.array([[90., 50.], [80., 50.], [70., 50.]]), (.5, 1., 1.5)), [-20, 0])
    table = slope_table(curves(-5, -12), TEMPERATURES)
    for kind in KINDS:
        paper = list(table["paper", kind].values())
        assert paper == sorted(paper) and len(FIGURE_21[kind]) == 4 # each version is flatter than the one before
    assert -6 < table["ours", "factual"]["v5"] < -4


def test_figure():
    fig = temperature_figure(curves(-5, -12), TEMPERATURES)
    assert [ax.get_title() for ax in fig.axes] == list(KINDS) and fig.axes[0].get_ylabel()
