"""Generation: the right distribution, private random streams, and a cache that changes nothing."""
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2_nbdev.core import UserError
from llama2_nbdev.model.attention import KVCache
from llama2_nbdev.model.generate import OneToken, Sampler, draw, generate, prefill, sampling_logprobs, stream, uniforms
from llama2_nbdev.model.llama import PRESETS, Block, Llama

CFG = replace(PRESETS["nano"], vocab_size=61, max_seq_len=48)
PROMPTS = [[1, 5, 9], [1], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [7, 7, 7], [1, 30, 31, 32, 33]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Llama(CFG)
    model.init_weights(std=.15)  # large enough for clear preferences
    return model


@torch.no_grad()
def plain(model, prompt, n, sampler, u, stop=()):
    "Decoding without a cache and without a batch."
    ids = list(prompt)
    for step in range(n):
        ids.append(sampler(model(torch.tensor([ids]))[:, -1], u[:, step])[0].item())
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


def test_top_p_keeps_the_token_that_crosses():  # trap 12
    logits = torch.tensor([[.5, .25, .15, .07, .03]]).log()
    for p, n in ((.1, 1), (.49, 1), (.51, 2), (.76, 3), (.8, 3), (.91, 4), (1., 5)):
        kept = sampling_logprobs(logits, top_p=p) > -torch.inf
        assert kept.sum() == n and kept[0, :n].all(), p


@pytest.mark.parametrize("T, p, k", [(1., 1., None), (.6, .9, None), (1.7, .5, 7), (1., 0., None), (.8, 1., 3), (1., .9, 1000)])
def test_distribution_is_normalised_and_ordered(T, p, k):
    logits = torch.randn(16, 61, generator=torch.Generator().manual_seed(0)) * 3
    probs = sampling_logprobs(logits, T, p, k).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(16))
    full = (logits / T).softmax(-1)
    kept = probs > 0
    assert ((full * kept).amax(-1) == full.amax(-1)).all()  # the favourite stays
    assert ((full.masked_fill(~kept, 2.).amin(-1) >= full.masked_fill(kept, 0.).amax(-1))).all()  # no kept token below a cut one
    assert (kept.sum(-1) <= (k or 61)).all()
    torch.testing.assert_close(probs / full * kept, kept / (full * kept).sum(-1, keepdim=True))  # ratios unchanged


def test_draw_follows_the_probabilities_and_never_hits_zero():
    probs = torch.tensor([0., .2, 0., .5, .3, 0.])
    n = 50_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hits = draw(probs.log().expand(n, -1), u).bincount(minlength=6) / n
    torch.testing.assert_close(hits, probs, atol=.01, rtol=0)
    edges = torch.tensor([0., .2, .7, 1.], dtype=torch.float64)
    assert set(draw(probs.log().expand(4, -1), edges).tolist()) <= {1, 3, 4}


def test_streams_depend_on_seed_and_index_only():
    a = uniforms(3, [0, 1, 2], 8)
    assert torch.equal(uniforms(3, [2, 0], 20)[:, :8], a[[2, 0]])
    assert len({*a.flatten().tolist(), *uniforms(4, [0, 1, 2], 8).flatten().tolist()}) == 48


@pytest.mark.parametrize("shape", [dict(), dict(n_kv_heads=4), dict(n_kv_heads=1), dict(tie_embeddings=True), dict(norm_eps=.1, rope_theta=100.)])
@torch.inference_mode()
def test_one_token_is_the_models_forward_pass(shape):
    "Gains, epsilon, rotation, groups of heads, rows of any lengths: logits and cache are those of the model."
    torch.manual_seed(1)
    wide = Llama(replace(CFG, **shape))
    wide.init_weights(std=.15)
    for p in wide.parameters():
        if p.dim() == 1:
            p.uniform_(.5, 2.)
    quick, lengths = OneToken(wide), [len(p) for p in PROMPTS]
    caches = [KVCache(CFG.n_layers, len(PROMPTS), 20, wide.cfg.n_kv_heads, CFG.head_dim) for _ in "ab"]
    for cache in caches:
        prefill(wide, PROMPTS, cache)
    for step in range(4):
        tokens, at = torch.randint(61, (len(PROMPTS),)), [n + step for n in lengths]
        got = quick(tokens, at, caches[0])
        want = wide(tokens[:, None], torch.tensor(at)[:, None], cache=caches[1])[:, 0]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        for row, n in enumerate(at):
            torch.testing.assert_close(caches[0].kv[:, :, row, :, :n+1], caches[1].kv[:, :, row, :, :n+1], atol=2e-5, rtol=1e-5)


def test_another_block_is_decoded_by_its_own_forward_pass():
    "The shortcut knows one kind of block; a model with another one must not be decoded as if it were plain."
    class Parallel(Block):
        def forward(self, x, cos, sin, mask=None, cache=None):
            return x + self.attention(self.attention_norm(x), cos, sin, mask, cache) + self.feed_forward(self.ffn_norm(x))
    torch.manual_seed(0)
    odd = Llama(CFG)
    odd.layers = torch.nn.ModuleList(Parallel(CFG) for _ in range(CFG.n_layers))
    odd.init_weights(std=.15)
    for p, c in zip(PROMPTS, generate(odd, PROMPTS, 12, temperature=0.)):
        assert c.tokens == plain(odd, p, 12, Sampler(0.), uniforms(0, [0], 12))


@pytest.mark.parametrize("settings", [dict(temperature=0.), dict(temperature=1.), dict(temperature=1.3, top_p=.9), dict(temperature=.9, top_k=9)])
def test_cached_batch_equals_plain_decoding(model, settings):  # trap 11
    got = [c.tokens for c in generate(model, PROMPTS, 20, seed=5, **settings)]
    assert got == [plain(model, p, 20, Sampler(**settings), uniforms(5, [i], 20)) for i, p in enumerate(PROMPTS)]


def test_a_batch_does_not_change_an_answer(model):
    settings = dict(max_new_tokens=25, temperature=1.2, top_p=.95, stop_ids=range(0, 61, 7), seed=11)
    together = generate(model, PROMPTS, **settings)
    assert len({len(c.tokens) for c in together}) > 2  # rows really end at different steps
    back = [4, 2, 0, 3, 1]
    others = [[generate(model, [p], indices=[i], **settings)[0] for i, p in enumerate(PROMPTS)],
              sorted(generate(model, [PROMPTS[i] for i in back], indices=back, **settings), key=lambda c: [x.tokens for x in together].index(c.tokens)),
              generate(model, PROMPTS, batch_size=2, **settings), generate(model, PROMPTS, batch_size=1, **settings)]
    for other in others:
        for a, b in zip(together, other, strict=True):
            assert (a.tokens, a.finish_reason) == (b.tokens, b.finish_reason)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    same = generate(model, [PROMPTS[0]]*6, 12, temperature=1.5, seed=0)
    assert len({tuple(c.tokens) for c in same}) == 6  # equal prompts, different streams


def test_logprobs_are_those_of_the_sampled_distribution(model):  # trap 44
    settings = dict(temperature=.7, top_p=.8, top_k=20)
    cut, raw = (generate(model, PROMPTS, 15, seed=2, raw_logprobs=r, **settings) for r in (False, True))
    for p, c, r in zip(PROMPTS, cut, raw):
        assert c.tokens == r.tokens
        with torch.no_grad():
            logits = model(torch.tensor([p + c.tokens]))[0, len(p)-1:-1]
        pick = (range(len(c.tokens)), c.tokens)
        assert c.logprobs == pytest.approx(sampling_logprobs(logits, **settings)[pick].tolist(), abs=1e-4)
        assert r.logprobs == pytest.approx(logits.log_softmax(-1)[pick].tolist(), abs=1e-4)
        assert c.logprobs != pytest.approx(r.logprobs, abs=1e-2)
    assert generate(model, [[1]], 4, temperature=0.)[0].logprobs == [0.]*4


def test_padding_is_never_seen_and_never_embedded(model):  # traps 13 and 48
    def read(filler):
        return prefill(model, PROMPTS, KVCache(CFG.n_layers, len(PROMPTS), 48, CFG.n_kv_heads, CFG.head_dim), filler)
    with torch.inference_mode():
        assert torch.equal(read(0), read(60)) and read(0).isfinite().all()
        with pytest.raises(UserError, match="token id -1"):  # -1 is no row of the embedding; nobody passes it by default
            read(-1)
    with pytest.raises(UserError, match="prompt 1 holds token id -1"):
        generate(model, [[1], [-1, 1]], 3)


def test_stop_and_length(model):
    free = generate(model, PROMPTS, 12, seed=1)
    assert {c.finish_reason for c in free} == {"length"} and {len(c.tokens) for c in free} == {12}
    stop = free[2].tokens[4]
    for c, f in zip(generate(model, PROMPTS, 12, seed=1, stop_ids=[stop]), free):
        n = f.tokens.index(stop) + 1 if stop in f.tokens else 12
        assert c.tokens == f.tokens[:n] and c.logprobs == pytest.approx(f.logprobs[:n], abs=1e-4)
        assert c.finish_reason == ("stop" if stop in f.tokens else "length")


def test_the_context_ends_an_answer(model):
    full, short = generate(model, [[1]*45, [1, 2]], 10, seed=0)
    assert (len(full.tokens), full.finish_reason, len(short.tokens)) == (3, "length", 10)
    assert short.tokens == generate(model, [[1, 2]], 10, seed=0, indices=[1])[0].tokens


def test_stream_is_generate_one_by_one(model):
    settings = dict(max_new_tokens=15, temperature=1.1, top_p=.9, seed=4, stop_ids=[3, 4, 5])
    tokens = []
    for token in stream(model, PROMPTS[0], **settings):
        tokens.append(token)
        assert not torch.is_inference_mode_enabled()  # the caller may train between two tokens
    assert tokens == generate(model, [PROMPTS[0]], **settings)[0].tokens


def test_without_a_seed_torchs_seed_decides(model):
    def one():
        return generate(model, [[1]], 12, temperature=1.5)[0].tokens
    torch.manual_seed(0)
    a, b = one(), one()
    torch.manual_seed(0)
    assert one() == a != b


def test_generation_leaves_the_model_trainable(model):
    generate(model, [[1]], 3, seed=0)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_bf16(model):
    import copy
    got = generate(copy.deepcopy(model).to(torch.bfloat16), PROMPTS, 8, seed=0)
    assert all(len(c.tokens) == 8 and all(x <= 0 for x in c.logprobs) for c in got)


@pytest.mark.parametrize("prompts, settings, words", [
    ([[1], []], {}, "prompt 1 is empty"), ([[1]*48], {}, "48 tokens, which leaves no room"), ([[61]], {}, "token id 61, outside"),
    ([[1]], dict(temperature=-1), "temperature"), ([[1]], dict(temperature=float("nan")), "temperature"),
    ([[1]], dict(top_p=1.1), "top_p"), ([[1]], dict(top_k=0), "top_k"), ([[1]], dict(max_new_tokens=0), "max_new_tokens"),
])
def test_clear_errors(model, prompts, settings, words):
    with pytest.raises(UserError, match=words):
        generate(model, prompts, **{"max_new_tokens": 3, **settings})
    with pytest.raises(UserError, match=words.replace("prompt 1", "prompt 0")):
        next(stream(model, prompts[-1], **{"max_new_tokens": 3, **settings}))


def test_no_prompts(model):
    assert generate(model, [], 5) == []


def test_greedy_text_of_real_weights():
    "stories260K of llama2.c: a cached batch writes the published text in every row."
    folder = os.environ.get("LLAMA2_REAL_DATA")
    if not folder:
        pytest.skip("set LLAMA2_REAL_DATA to the folder of real data")
    from llama2_nbdev.model.weights import load
    folder = Path(folder) / "stories260K"
    model, tok = load(folder / "stories260K.bin")
    published = (folder / "published_greedy_200steps.txt").read_text()
    start = [tok.bos_id]
    batch = generate(model, [start, [*start, 400, 401], start], 60, temperature=0.)
    assert batch[0].tokens == batch[2].tokens
    assert published.startswith(tok.decode(batch[0].tokens).strip()) and len(tok.decode(batch[0].tokens)) > 60
