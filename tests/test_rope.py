"Rotary position embeddings: property tests, the traps 1, 2, 3, and transformers as an independent oracle."
import math
from unittest.mock import patch

import pytest
import torch

from llama2_nbdev.model.rope import (apply_rope, apply_rope_half, half_to_interleaved, interleaved_to_half,
                                     rope_frequencies, rope_table)

D, T = 16, 64
COS, SIN = rope_table(D, T)

def at(v, m, cos=COS, sin=SIN): return apply_rope(v.view(1, 1, 1, -1), cos[m:m+1], sin[m:m+1]).flatten()

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def test_table_equals_float64():
    cos, sin = rope_table(128, 4096)
    angles = torch.outer(torch.arange(4096).double(), 10000. ** (-torch.arange(0, 128, 2).double() / 128))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (4096, 64)
    torch.testing.assert_close(cos.double(), angles.cos(), atol=5e-4, rtol=0)
    torch.testing.assert_close(sin.double(), angles.sin(), atol=5e-4, rtol=0)

def test_theta_and_odd_heads():
    assert rope_frequencies(8, theta=16.).tolist() == pytest.approx([1, .5, .25, .125])
    with pytest.raises(ValueError, match="even, got 7"): rope_table(7, 4)

def test_equals_a_rotation_matrix():
    x, m = torch.randn(D), 13
    R = torch.zeros(D, D)
    for i, w in enumerate(rope_frequencies(D).tolist()):
        R[2*i:2*i+2, 2*i:2*i+2] = torch.tensor([[math.cos(m*w), -math.sin(m*w)], [math.sin(m*w), math.cos(m*w)]])
    torch.testing.assert_close(at(x, m), R @ x)

def test_direction():  # trap 2
    assert at(torch.tensor([1., 0.] + [0.]*(D-2)), 1)[:2].tolist() == pytest.approx([math.cos(1), math.sin(1)])
    half = apply_rope_half(torch.eye(D)[0].view(1, 1, 1, D), COS[1:2], SIN[1:2]).flatten()
    assert half[[0, D//2]].tolist() == pytest.approx([math.cos(1), math.sin(1)])

@pytest.mark.parametrize("rotate", [apply_rope, apply_rope_half])
def test_only_distance_counts(rotate):
    q, k = torch.randn(2, D)
    everywhere = lambda v: rotate(v.expand(1, T, 1, D), COS, SIN)[0, :, 0]
    s = everywhere(q) @ everywhere(k).T
    for n in range(1 - T, T): assert s.diagonal(n).max() - s.diagonal(n).min() < 1e-4
    assert (s[0, 10] - s[10, 0]).abs() > .1           # the past is not the future

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_shape_length(dtype):
    x = torch.randn(2, T, 3, D).to(dtype)
    y = apply_rope(x, COS, SIN)
    assert y.dtype == dtype and y.shape == x.shape
    torch.testing.assert_close(y[:, 0], x[:, 0])
    exact = apply_rope(x.float(), COS, SIN)
    assert torch.equal(y, exact.to(dtype))            # computed in fp32, rounded once
    torch.testing.assert_close(exact.norm(dim=-1), x.float().norm(dim=-1))

def test_gradient_is_turned_back():
    x, g = torch.randn(2, T, 3, D, requires_grad=True), torch.randn(2, T, 3, D)
    apply_rope(x, COS, SIN).backward(g)
    torch.testing.assert_close(x.grad, apply_rope(g, COS, -SIN))

def test_compiled_branch_equals_eager():
    x = torch.randn(2, T, 3, D)
    with patch("torch.compiler.is_compiling", lambda: True): compiled = apply_rope(x, COS, SIN)
    torch.testing.assert_close(compiled, apply_rope(x, COS, SIN))

@pytest.mark.slow
def test_really_compiled_equals_eager():
    compiled = torch.compile(apply_rope, fullgraph=True)
    for x in (torch.randn(2, T, 3, D), torch.randn(2, T, 3, D).bfloat16()):
        torch.testing.assert_close(compiled(x, COS, SIN), apply_rope(x, COS, SIN))

def test_strided_input():
    fused = torch.randn(2, T, 3, 2*D + 1)
    for x in (fused[..., 1:D+1], fused[..., D:2*D], torch.randn(2, 3, T, D).transpose(1, 2), torch.randn(2, T, D, 3).mT):
        torch.testing.assert_close(apply_rope(x, COS, SIN), apply_rope(x.contiguous(), COS, SIN))

def test_offsets_and_positions():  # trap 11: a cached chunk equals the same rows of the whole
    x = torch.randn(2, 20, 3, D)
    whole = apply_rope(x, COS[:20], SIN[:20])
    chunks = [apply_rope(x[:, a:b], COS[a:b], SIN[a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    torch.testing.assert_close(torch.cat(chunks, 1), whole)
    positions = torch.stack((torch.arange(20), torch.arange(30, 50)))
    both = apply_rope(x, COS[positions], SIN[positions])
    torch.testing.assert_close(both[0], whole[0])
    torch.testing.assert_close(both[1:], apply_rope(x[1:], COS[30:50], SIN[30:50]))

@pytest.mark.parametrize("rotate", [apply_rope, apply_rope_half])
def test_misfits_are_refused(rotate):
    x = torch.randn(2, 5, 3, D)
    for rows in (COS[:1], COS, COS[:5, :1]):          # broadcasting would accept the first and the last
        with pytest.raises(ValueError, match="take the rows"): rotate(x, rows, rows)
    with pytest.raises(ValueError, match="must stay fp32"): rotate(x, COS[:5].bfloat16(), SIN[:5].bfloat16())  # trap 3

def test_bf16_tables_would_move_scores():  # trap 3: the reason for the refusal
    d, t = 128, 4096
    (cos, sin), (q, k) = rope_table(d, t), torch.randn(2, d)
    def spread(cos, sin):
        everywhere = lambda v: apply_rope(v.expand(1, t, 1, d), cos, sin)[0, :, 0]
        return (everywhere(q)[8:] * everywhere(k)[:-8]).sum(-1).std()
    assert spread(cos.bfloat16().float(), sin.bfloat16().float()) > 20 * spread(cos, sin)

@pytest.mark.parametrize("h, g", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_both_layouts_give_the_same_scores(h, g):  # trap 1
    b, t, c = 2, 10, 24
    x, wq, wk = torch.randn(b, t, c), torch.randn(h*D, c) / 5, torch.randn(g*D, c) / 5
    def scores(rotate, wq, wk):
        q, k = (rotate((x @ w.T).view(b, t, -1, D), COS[:t], SIN[:t]) for w in (wq, wk))
        return torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(h//g, 2))
    meta = scores(apply_rope, wq, wk)
    half = scores(apply_rope_half, interleaved_to_half(wq, h), interleaved_to_half(wk, g))
    torch.testing.assert_close(half, meta, atol=1e-5, rtol=1e-5)
    assert (scores(apply_rope_half, wq, wk) - meta).abs().max() > .1
    if g < h and g*D % (2*h) == 0:                    # wk cut into n_heads heads: no error, wrong scores
        miscounted = scores(apply_rope_half, interleaved_to_half(wq, h), interleaved_to_half(wk, h))
        assert (miscounted - meta).abs().max() > .1

@pytest.mark.parametrize("shape", [(4*D, 24), (4*D,)])
def test_permutations_are_inverse(shape):
    w = torch.randn(shape)
    assert torch.equal(half_to_interleaved(interleaved_to_half(w, 4), 4), w)
    assert torch.equal(interleaved_to_half(half_to_interleaved(w, 4), 4), w)
    assert not torch.equal(interleaved_to_half(w, 4), w)
    assert torch.equal(interleaved_to_half(w, 4)[D:2*D], interleaved_to_half(w[D:2*D], 1))
    with pytest.raises(ValueError, match="cut into 3 heads"): interleaved_to_half(w, 3)

def test_half_layout_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig
    config = LlamaConfig(hidden_size=4*D, num_attention_heads=4, max_position_embeddings=T)
    q, k = torch.randn(2, T, 4, D), torch.randn(2, T, 2, D)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, torch.arange(T)[None].expand(2, T))
    q_hf, k_hf = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    torch.testing.assert_close(apply_rope_half(q, COS, SIN), q_hf.transpose(1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(apply_rope_half(k, COS, SIN), k_hf.transpose(1, 2), atol=1e-6, rtol=0)
