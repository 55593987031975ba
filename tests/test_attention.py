"""Attention: grouped queries, masks, and the cache, by properties."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llama2_nbdev.core import UserError
from llama2_nbdev.model.attention import (Attention, KVCache, attend, cache_bytes, causal_mask, document_mask,
                                          visible_mask)
from llama2_nbdev.model.rope import rope_table

COS, SIN = rope_table(8, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference(q, k, v, mask):
    "Plain attention in fp64 with heads spread by repeat_interleave."
    q, k, v = (a.double() for a in (q, k, v))
    k, v = (a.repeat_interleave(q.shape[1] // k.shape[1], 1) for a in (k, v))
    s = (q @ k.mT / q.shape[-1]**.5).masked_fill(~mask, -torch.inf)
    return s.softmax(-1) @ v


def heads(g, t=9, h=4, d=8, b=2):
    return torch.randn(b, h, t, d), torch.randn(b, g, t, d), torch.randn(b, g, t, d)


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("t", [1, 4, 9])
def test_attend_equals_the_formula_for_any_number_of_queries(g, t):  # traps 6 and 11
    q, k, v = heads(g)
    got = attend(q[:, :, -t:], k, v)
    torch.testing.assert_close(got.double(), reference(q, k, v, causal_mask(9))[:, :, -t:], atol=2e-6, rtol=0)


def test_heads_of_a_group_are_neighbours():  # trap 6
    q, k, v = heads(2)
    tiled = attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    assert (tiled - attend(q, k, v)).abs().max() > .1


def test_gqa_with_all_heads_is_mha_bit_for_bit():
    q, k, v = heads(4)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def test_grouped_layer_equals_mha_layer_with_copied_heads():
    gqa, mha = Attention(32, 4, 2), Attention(32, 4, 4)
    with torch.no_grad():
        for name in ("wq", "wo"):
            getattr(mha, name).weight.copy_(getattr(gqa, name).weight)
        for name in ("wk", "wv"):
            w = getattr(gqa, name).weight.view(2, 8, 32)
            getattr(mha, name).weight.copy_(w.repeat_interleave(2, 0).reshape(32, 32))
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(gqa(x, COS[:9], SIN[:9]), mha(x, COS[:9], SIN[:9]), atol=1e-6, rtol=0)


def test_softmax_is_accumulated_in_fp32():  # trap 5
    q, k, v = (torch.randn(1, 1, n, 64).bfloat16() for n in (64, 2048, 2048))
    everything = torch.ones(64, 2048, dtype=torch.bool)
    exact = reference(q, k, v, everything)
    s = q @ k.mT / 8
    w = (s - s.amax(-1, keepdim=True)).exp()
    low = (w / w.cumsum(-1)[..., -1:]) @ v
    error = [(out.double() - exact).norm().item() for out in (attend(q, k, v, everything), low)]
    assert error[0] < error[1] / 2


def test_no_gradient_from_the_future():
    x = torch.randn(1, 9, 32, requires_grad=True)
    Attention(32, 4, 2)(x, COS[:9], SIN[:9])[:, 5].sum().backward()
    reach = x.grad.abs().sum((0, 2))
    assert (reach[:6] > 0).all() and (reach[6:] == 0).all()


def test_documents_are_isolated_by_the_mask_and_not_by_positions():  # trap 21
    layer, ids, restart = Attention(32, 4, 2), torch.tensor([[3]*4 + [8]*5]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    x = torch.randn(1, 9, 32, requires_grad=True)
    grad = torch.autograd.grad(layer(x, COS[:9], SIN[:9], document_mask(ids))[:, 4:].sum(), x)[0].abs().sum((0, 2))
    assert (grad[:4] == 0).all() and (grad[4:] > 0).all()
    alone = layer(x[:, 4:], COS[:5], SIN[:5])
    masked = layer(x, COS[:9], SIN[:9], document_mask(ids))[:, 4:]
    only_restarted = layer(x, COS[restart], SIN[restart])[:, 4:]
    torch.testing.assert_close(masked, alone, atol=1e-6, rtol=0)
    assert (only_restarted - alone).abs().max() > 1e-2
    assert torch.autograd.grad(only_restarted.sum(), x)[0][:, :4].abs().max() > 0


def run_cached(layer, x, sizes):
    cache, out = KVCache(1, len(x), 16, 2, 8), []
    for piece in x.split(sizes, 1):
        start, t = cache.length, piece.shape[1]
        mask = cache.place(t)
        out.append(layer(piece, COS[start:start+t], SIN[start:start+t], mask, cache[0]))
    return torch.cat(out, 1)


@pytest.mark.parametrize("sizes", [[9], [8, 1], [4, 3, 2], [1]*9, [1, 8]])
def test_prefill_chunks_and_decode_equal_one_pass(sizes):  # trap 11
    layer, x = Attention(32, 4, 2), torch.randn(2, 9, 32)
    torch.testing.assert_close(run_cached(layer, x, sizes), layer(x, COS[:9], SIN[:9]), atol=1e-6, rtol=0)


@torch.no_grad()
def test_unequal_rows_never_see_padding_and_never_get_nan():  # traps 11 and 48
    layer, lengths, new = Attention(32, 4, 2), [7, 1, 4], torch.randn(3, 3, 32)
    x = torch.full((3, 7, 32), 1e4)
    for row, n in enumerate(lengths):
        x[row, :n] = torch.randn(n, 32)
    cache = KVCache(1, 3, 16, 2, 8)
    layer(x, COS[:7], SIN[:7], cache.place(7), cache[0])
    for step in range(3):
        positions = torch.tensor(lengths)[:, None] + step
        mask = cache.place(1, positions)
        got = layer(new[:, step:step+1], COS[positions], SIN[positions], mask, cache[0])
        assert got.isfinite().all()
        for row, n in enumerate(lengths):
            whole = torch.cat([x[row:row+1, :n], new[row:row+1, :step+1]], 1)
            want = layer(whole, COS[:n+step+1], SIN[:n+step+1])[0, -1]
            torch.testing.assert_close(got[row, 0], want, atol=1e-5, rtol=0)


def test_masks():
    assert torch.equal(causal_mask(3, 7), causal_mask(7)[-3:])
    assert torch.equal(visible_mask(torch.arange(4, 7)[None], 7)[0, 0], causal_mask(3, 7))
    assert visible_mask(torch.zeros(2, 1).long(), 9).any(-1).all()


def test_cache_starts_finite_and_keeps_rows():
    cache = KVCache(2, 3, 5, 2, 8)
    assert cache.k.isfinite().all() and cache.v.isfinite().all()
    cache.k[:] = torch.arange(3)[None, :, None, None, None]
    cache.keep([2, 0])
    assert cache.k[0, :, 0, 0, 0].tolist() == [2, 0]
    with pytest.raises(UserError, match="room for 5 positions, but position 5"):
        cache.place(1, torch.tensor([[5], [0]]))


def test_cache_bytes_of_the_family():
    kib = [cache_bytes(SimpleNamespace(n_layers=n, n_kv_heads=g, head_dim=128)) / 1024
           for n, g in ((32, 32), (40, 40), (48, 8), (80, 8))]
    assert kib == [512, 800, 192, 320]
    cache = KVCache(3, 4, 10, 2, 8, torch.bfloat16)
    assert cache.k.nbytes + cache.v.nbytes == cache_bytes(SimpleNamespace(n_layers=3, n_kv_heads=2, head_dim=8), 4, 10)


def test_heads_that_do_not_fit():
    with pytest.raises(UserError, match="n_kv_heads 3"):
        Attention(32, 4, 3)


def test_bf16_on_the_cpu_is_computed_in_fp32_and_rounded_once():
    q, k, v = (x.bfloat16().requires_grad_() for x in heads(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, k, v)
    exact = attend(q.float(), k.float(), v.float())
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())
    grads = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (got, exact)]
    for a, b in zip(*grads):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=.1, rtol=.05)
