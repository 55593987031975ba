"RMSNorm and SwiGLU: properties, the traps 4 and 7, and PyTorch and transformers as independent oracles."
import pytest
import torch
import torch.nn.functional as F

from llama2_nbdev.model.layers import RMSNorm, SwiGLU, swiglu_width

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def norm_with_gain(dim, eps=1e-5, dtype=torch.float32):
    norm = RMSNorm(dim, eps)
    with torch.no_grad(): norm.weight.copy_(torch.rand(dim) + .5)
    return norm.to(dtype)

def test_rms_norm_equals_float64():
    norm, x = norm_with_gain(48), 5 * torch.randn(3, 7, 48)
    d = x.double()
    want = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (48,), norm.weight, 1e-5))

def test_rms_norm_ignores_scale_but_not_mean():
    norm, x = norm_with_gain(48), torch.randn(3, 48)
    torch.testing.assert_close(norm(100 * x), norm(x), atol=1e-4, rtol=1e-4)
    assert (norm(x + 1) - norm(x)).abs().max() > .1

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_then_cast_then_gain(dtype):  # trap 4
    norm, x = norm_with_gain(512, dtype=dtype), (3 * torch.randn(64, 512)).to(dtype)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    y = norm(x)
    assert y.dtype == dtype and torch.equal(y, normed.to(dtype) * norm.weight)
    assert not torch.equal(y, (normed * norm.weight.float()).to(dtype))     # gain first would differ
    assert not torch.equal(y, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm.weight)

def test_no_overflow_in_half():  # trap 4
    assert torch.equal(RMSNorm(8).half()(torch.full((1, 8), 300.).half()), torch.ones(1, 8).half())

def test_autocast_keeps_fp32_inside():  # trap 4
    norm, x = norm_with_gain(512), 3 * torch.randn(64, 512)
    with torch.autocast("cpu", torch.bfloat16): inside = norm(x)
    assert torch.equal(inside, norm(x))

def test_epsilon():  # trap 4: 1e-5, inside the root
    assert RMSNorm(4).eps == 1e-5
    torch.testing.assert_close(RMSNorm(4)(torch.full((4,), 1e-5**.5)), torch.full((4,), .5**.5))
    assert torch.equal(RMSNorm(4)(torch.zeros(4)), torch.zeros(4))

def test_gradient_is_orthogonal_to_the_input():
    norm, x = norm_with_gain(16), torch.randn(5, 16, requires_grad=True)
    norm(x).pow(3).sum().backward()
    assert ((x * x.grad).sum(-1).abs() < 1e-3 * x.norm(dim=-1) * x.grad.norm(dim=-1)).all()

@pytest.mark.parametrize("args, width", [((4096,), 11008), ((5120,), 13824), ((8192, 256, 1.), 22016), ((8192, 4096, 1.3), 28672),
                                         ((288, 32), 768), ((64, 4), 172), ((3, 1), 8), ((96, 256), 256), ((96, 128), 256)])
def test_width(args, width): assert swiglu_width(*args) == width  # trap 7

def test_width_costs_what_two_plain_matrices_cost():
    for dim in range(64, 4096, 64):
        assert 0 <= 3*dim*swiglu_width(dim, 1) + 3*dim - 8*dim*dim <= 3*dim
        assert swiglu_width(dim, 256) % 256 == 0 and 0 <= swiglu_width(dim, 256) - swiglu_width(dim, 1) < 256

def test_swiglu_equals_its_formula():
    ffn, x = SwiGLU(8, 24), torch.randn(2, 5, 8)
    gate, content = x @ ffn.w1.weight.T, x @ ffn.w3.weight.T
    torch.testing.assert_close(ffn(x), (gate / (1 + (-gate).exp()) * content) @ ffn.w2.weight.T)
    swapped = (content / (1 + (-content).exp()) * gate) @ ffn.w2.weight.T
    assert (ffn(x) - swapped).abs().max() > 1e-3
    assert {n: tuple(p.shape) for n, p in ffn.named_parameters()} == {
        "w1.weight": (24, 8), "w2.weight": (8, 24), "w3.weight": (24, 8)}

def test_swiglu_can_multiply():
    ffn, x = SwiGLU(2, 2), torch.randn(50, 2)
    with torch.no_grad():
        ffn.w1.weight.copy_(torch.tensor([[1., 0.], [-1., 0.]]))
        ffn.w3.weight.copy_(torch.tensor([[0., 1.], [0., 1.]]))
        ffn.w2.weight.copy_(torch.tensor([[1., -1.], [0., 0.]]))
    torch.testing.assert_close(ffn(x)[:, 0], x[:, 0] * x[:, 1], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig
    x = torch.randn(2, 5, 32).to(dtype)
    norm, theirs = norm_with_gain(32, dtype=dtype), llama.LlamaRMSNorm(32, eps=1e-5).to(dtype)
    theirs.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), theirs(x), atol=1e-6 if dtype == torch.float32 else 0, rtol=0)
    mlp, ffn = llama.LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=96)).to(dtype), SwiGLU(32, 96).to(dtype)
    with torch.no_grad():
        for ours, theirs in ((ffn.w1, mlp.gate_proj), (ffn.w2, mlp.down_proj), (ffn.w3, mlp.up_proj)): ours.weight.copy_(theirs.weight)
    torch.testing.assert_close(ffn(x), mlp(x))
