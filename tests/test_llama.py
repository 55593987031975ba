"""The model: exact sizes, precision, initialisation, moves, and clear errors."""
import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llama2_nbdev.core import UserError
from llama2_nbdev.model.attention import KVCache
from llama2_nbdev.model.llama import PRESETS, Llama, ModelConfig

SIZES = {"7b": 6_738_415_616, "13b": 13_015_864_320, "34b": 33_743_970_304, "70b": 68_976_648_192}
CFG = replace(PRESETS["nano"], vocab_size=97, max_seq_len=64)
SHAPES = [CFG, replace(CFG, n_kv_heads=4), replace(CFG, n_kv_heads=1), replace(CFG, tie_embeddings=True)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Llama(CFG)


@pytest.fixture
def tokens():
    return torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = Llama(ModelConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == ModelConfig.preset(name).n_params() == SIZES[name]


def test_feed_forward_widths():  # trap 7
    assert [ModelConfig.preset(n).hidden_dim for n in SIZES] == [11008, 13824, 22016, 28672]
    assert ModelConfig.preset("stories260k").hidden_dim == 172


@pytest.mark.parametrize("cfg", SHAPES + [PRESETS["tiny"], PRESETS["small"]])
def test_counted_equals_analytic(cfg):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(cfg).parameters()) == cfg.n_params()


@pytest.mark.parametrize("cfg", SHAPES)
def test_flops_equal_what_a_counter_sees(cfg):  # trap 30
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Llama(cfg)(tokens).sum().backward()
    assert counter.get_total_flops() / 32 == cfg.flops_per_token(16, causal=False)
    attention = cfg.flops_per_token(16, causal=False) - cfg.flops_per_token(0)
    assert cfg.flops_per_token(16) - cfg.flops_per_token(0) == attention / 2 == 6 * cfg.n_layers * 16 * cfg.dim


def test_embeddings_are_untied_unless_asked(model):  # trap 8
    assert model.output.weight.data_ptr() != model.tok_embeddings.weight.data_ptr()
    tied = Llama(replace(CFG, tie_embeddings=True))
    state = {n: p for n, p in tied.state_dict().items() if n != "output.weight"}
    with torch.device("meta"):
        other = Llama(tied.cfg)
    other.load_state_dict(state, assign=True)
    for m in (tied, other, other.to(torch.bfloat16), copy.deepcopy(tied)):
        assert m.output.weight is m.tok_embeddings.weight
    with pytest.raises(RuntimeError, match="output.weight"):
        model.load_state_dict({n: p for n, p in model.state_dict().items() if n != "output.weight"})


def test_init_is_depth_scaled_on_the_writers_only():  # traps 9 and 10
    torch.manual_seed(0)
    model = Llama(replace(CFG, dim=128, n_layers=8))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            writes = name.split(".")[-2] in ("wo", "w2")
            assert p.std().item() == pytest.approx(.02 / math.sqrt(16) if writes else .02, rel=.05), name
            z = p / p.std()  # a plain normal, as documented: its tails are there
            assert (z.abs() > 2).float().mean().item() == pytest.approx(.0455, abs=.01), name


def test_initial_loss_is_ln_vocabulary(model):
    tokens = torch.randint(0, 97, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(97), abs=.05)


def test_logits_are_fp32_in_any_dtype(model, tokens):  # trap 5
    assert model(tokens).dtype == torch.float32
    assert copy.deepcopy(model).to(torch.bfloat16)(tokens).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.float32


def test_rotary_tables_survive_every_move(model, tokens):  # trap 3
    want, logits = model.rope_cos.clone(), model(tokens)
    for moved in (copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).half().float()):
        assert moved.rope_cos.dtype == torch.float32 and torch.equal(moved.rope_cos, want)
    with torch.device("meta"):
        a, b = Llama(CFG), Llama(CFG)
    a.to_empty(device="cpu").load_state_dict(model.state_dict())
    b.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(a(tokens), logits) and torch.equal(b(tokens), logits)
    assert not [n for n in model.state_dict() if "rope" in n]


def test_state_dict_has_metas_names(model):
    names = {n for n in model.state_dict() if not n.startswith("layers.1.")}
    assert names == {"tok_embeddings.weight", "norm.weight", "output.weight"} | {f"layers.0.{n}.weight" for n in (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3", "attention_norm", "ffn_norm")}


@pytest.mark.parametrize("cfg", SHAPES)
@torch.no_grad()
def test_cached_equals_uncached(cfg, tokens):  # trap 11
    torch.manual_seed(0)
    model = Llama(cfg)
    model.init_weights(std=.2)
    cache = KVCache(cfg.n_layers, 2, 12, cfg.n_kv_heads, cfg.head_dim)
    pieces = [model(piece, cache=cache) for piece in tokens.split([5, 4, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=2e-5, rtol=1e-5)


def test_documents_and_positions(model, tokens):  # trap 21
    model.init_weights(std=.2)
    ids = torch.tensor([[0]*5 + [1]*7]*2)
    restart = torch.tensor([[*range(5), *range(7)]]*2)
    alone = model(tokens[:, 5:])
    for positions in (None, restart):
        torch.testing.assert_close(model(tokens, positions, ids)[:, 5:], alone, atol=2e-5, rtol=1e-5)
    assert (model(tokens, restart)[:, 5:] - alone).abs().max() > 1e-2
    assert torch.equal(model(tokens, torch.arange(12)), model(tokens))
    assert torch.equal(model.output(model.hidden(tokens)), model(tokens))


@pytest.mark.parametrize("bad, words", [
    (lambda m: m(torch.tensor([[1, 97]])), "token id 97 is outside the vocabulary of 97"),
    (lambda m: m(torch.tensor([[1, -1]])), "token id -1"),  # trap 13
    (lambda m: m(torch.zeros(1, 65, dtype=torch.int64)), "65 tokens do not fit into this model's context of 64"),
    (lambda m: m(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[63, 64]])), "position 64 lies beyond"),
    (lambda m: m(torch.zeros(3, dtype=torch.int64)), r"tokens must be \(batch, time\)"),
    (lambda m: ModelConfig(64, 2, 3), "even whole number"), (lambda m: ModelConfig(64, 2, 4, 3), "n_kv_heads 3"),
    (lambda m: ModelConfig(64, 2, 4, vocab_size=-1), "vocab_size must be a positive"),
    (lambda m: ModelConfig.preset("8b"), "no model preset '8b'; choose one of 7b"),
])
def test_clear_errors(model, bad, words):
    with pytest.raises(UserError, match=words):
        bad(model)


def test_logits_equal_transformers(tokens):  # traps 1, 2, 4 and 6
    transformers = pytest.importorskip("transformers")
    from llama2_nbdev.model.rope import interleaved_to_half
    torch.manual_seed(0)
    ours = Llama(CFG)
    ours.init_weights(std=.1)
    hf = transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=97, hidden_size=CFG.dim, intermediate_size=CFG.hidden_dim, num_hidden_layers=CFG.n_layers, rms_norm_eps=1e-5,
        num_attention_heads=CFG.n_heads, num_key_value_heads=CFG.n_kv_heads, max_position_embeddings=64)).eval()
    names = {"embed_tokens.weight": "tok_embeddings.weight", "norm.weight": "norm.weight"}
    for i in range(CFG.n_layers):
        for theirs, mine in (("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"), ("self_attn.v_proj", "attention.wv"),
                             ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
                             ("mlp.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")):
            names[f"layers.{i}.{theirs}.weight"] = f"layers.{i}.{mine}.weight"
    state, rows = ours.state_dict(), {"q_proj": CFG.n_heads, "k_proj": CFG.n_kv_heads}
    hf.load_state_dict({theirs: interleaved_to_half(state[mine], rows[kind]) if (kind := theirs.split(".")[-2]) in rows else state[mine]
                        for theirs, mine in names.items()})
    with torch.no_grad():
        torch.testing.assert_close(ours.hidden(tokens), hf(tokens).last_hidden_state, atol=1e-5, rtol=0)


def test_import_is_cheap():
    "In a fresh process: what our import adds to `import torch`; the best of three, since the machine may be busy."
    code = "import time, torch; t = time.perf_counter(); import llama2_nbdev.model.llama; print(time.perf_counter() - t)"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.) >= .3:
        seconds.append(float(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout))
    assert min(seconds) < .3
