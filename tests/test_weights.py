"""Checkpoints: four containers, one set of numbers; other libraries agree; damage is an error, never a surprise."""
import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llama2_nbdev.core import UserError
from llama2_nbdev.model import formats, weights
from llama2_nbdev.model.formats import ffn_settings, from_hf_config, read_hf, to_hf_config
from llama2_nbdev.model.generate import generate
from llama2_nbdev.model.layers import swiglu_width
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer, llama2c_tokenizer
from llama2_nbdev.model.weights import load, save, save_hf, save_llama2c, save_meta

GQA = ModelConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=320, multiple_of=32, max_seq_len=64)
TINY = replace(GQA, dim=16, n_layers=1, n_heads=4, n_kv_heads=2)
SHAPES = {"gqa": GQA, "mha": replace(GQA, n_kv_heads=8), "mqa": replace(GQA, n_kv_heads=1), "tied": replace(GQA, tie_embeddings=True)}
ODD = {"theta": replace(GQA, rope_theta=500.), "eps": replace(GQA, norm_eps=1e-3), "width": replace(GQA, multiple_of=4, ffn_dim_multiplier=1.1)}
TOKENS = torch.arange(40).view(2, 20) * 7 % 320


def random_model(cfg: ModelConfig, seed: int = 0) -> Llama:
    "Random weights, norms included, large enough for a mistake to show."
    torch.manual_seed(seed)
    model = Llama(cfg).eval()
    for p in model.parameters():
        p.data += .1 * torch.randn_like(p)
    return model


@torch.no_grad()
def logits(model: Llama) -> torch.Tensor:
    return model(TOKENS)


@pytest.fixture(scope="session")
def tok(tmp_path_factory) -> Tokenizer:
    texts = [f"The {a} met the {b} at {n}. Was it late?" for n in range(20) for a in ("fox", "hen", "cat") for b in ("dog", "owl", "cow")]
    return Tokenizer.train(texts, 320, tmp_path_factory.mktemp("tok") / "tokenizer.model")


SAVERS = {"own": save, "hf": save_hf, "hf sharded": lambda m, t, p: save_hf(m, t, p, max_shard_bytes=200_000), "meta": save_meta,
          "meta 2": lambda m, t, p: save_meta(m, t, p, n_shards=2), "meta 4": lambda m, t, p: save_meta(m, t, p, n_shards=4),
          "llama2c": lambda m, t, p: save_llama2c(m, t, p / "model.bin")}


def place(path: Path, how: str) -> Path:
    return path / "model.bin" if how == "llama2c" else path


@pytest.mark.parametrize("how", SAVERS)
@pytest.mark.parametrize("shape", [*SHAPES, *ODD])
def test_round_trip(how, shape, tok, tmp_path):
    cfg = {**SHAPES, **ODD}[shape]
    if (how, shape) in {("meta 2", "mqa"), ("meta 4", "mqa")} or shape in ("theta", "eps") and how == "llama2c":
        with pytest.raises(UserError, match="cannot cut|fixes"):
            SAVERS[how](random_model(cfg), tok, tmp_path)
        return
    model = random_model(cfg)
    SAVERS[how](model, tok, tmp_path)
    twin, its_tok = load(place(tmp_path, how))
    assert torch.equal(logits(twin), logits(model)), "bit for bit"
    assert its_tok.encode("The fox met the owl at 7.") == tok.encode("The fox met the owl at 7.")
    got, want = twin.cfg, model.cfg
    assert (got.hidden_dim, got.n_kv_heads, got.rope_theta, got.norm_eps) == (want.hidden_dim, want.n_kv_heads, want.rope_theta, want.norm_eps)
    assert got.tie_embeddings == (want.tie_embeddings and "meta" not in how)  # Meta's files know no ties
    assert got.max_seq_len == (4096 if "meta" in how else want.max_seq_len)
    assert not twin.training and all(p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("how", [h for h in SAVERS if h != "llama2c"])
def test_dtype_is_kept_or_asked_for(how, tmp_path):
    SAVERS[how](random_model(GQA).bfloat16(), None, tmp_path)
    kept, no_tok = load(tmp_path)
    assert no_tok is None and {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in kept.buffers()} == {torch.float32}, "RoPE tables stay fp32"  # trap 3
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32)[0].parameters()} == {torch.float32}


def test_tables_are_rebuilt_not_stored(tmp_path):
    for how in SAVERS:
        model = random_model(GQA)
        SAVERS[how](model, None, tmp_path / how)
        twin, _ = load(place(tmp_path / how, how))
        n = GQA.max_seq_len
        for name in ("rope_cos", "rope_sin"):
            assert torch.equal(getattr(twin, name)[:n], getattr(model, name)), how  # trap 3
    assert not [k for k in load_file(tmp_path / "own" / "model.safetensors") if "rope" in k]


def test_weights_are_assigned_not_copied():
    model = random_model(GQA)
    given_to = weights.named_weights(model)
    twin = weights.assemble(GQA, iter(given_to.items()), Path("here"))
    assert all(twin.state_dict()[k].data_ptr() == t.data_ptr() for k, t in given_to.items())


def test_tied_stays_tied(tmp_path):
    for how in SAVERS:
        SAVERS[how](random_model(SHAPES["tied"]), None, tmp_path / how)
        twin, _ = load(place(tmp_path / how, how))
        assert (twin.output.weight is twin.tok_embeddings.weight) == ("meta" not in how), how  # Meta's files know no ties


# --- other libraries --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("shape", [*SHAPES, *ODD])
def test_transformers_reads_ours(shape, transformers, tok, tmp_path):
    model = random_model({**SHAPES, **ODD}[shape])
    save_hf(model, tok, tmp_path, max_shard_bytes=200_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (theirs(TOKENS).logits - logits(model)).abs().max() <= 1e-5  # trap 1
    prompt = tok.encode("The fox met")
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist()
    ours = generate(model, [prompt], 24, temperature=0., stop_ids=[tok.eos_id])[0].tokens
    assert [i for i in text if i != tok.eos_id] == [i for i in ours if i != tok.eos_id]
    assert theirs.generation_config.eos_token_id == tok.eos_id
    words = "The hen, 12 cows:  日\n"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(words).input_ids == tok.encode(words)


@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True},
                                    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.}}, {"intermediate_size": 177}])
def test_we_read_transformers(change, transformers, tmp_path):
    config = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=8, vocab_size=320, max_position_embeddings=64)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, **change})).eval()
    for p in theirs.parameters():
        p.data += .1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    model, _ = load(tmp_path)
    with torch.no_grad():
        assert (theirs(TOKENS).logits - logits(model)).abs().max() <= 1e-5  # trap 1


@pytest.mark.parametrize("heads", [None, 8])
def test_a_wrong_permutation_of_k_is_seen(heads, tmp_path, monkeypatch):
    "Planted: k not permuted, or permuted with the number of query heads. The tolerance above must catch it."
    model = random_model(GQA)
    save_hf(model, None, tmp_path)
    right = formats.permute_rows

    def wrong(name, t, cfg, permutation):
        if name.endswith("wk.weight"):
            return t if heads is None else permutation(t, heads)
        return right(name, t, cfg, permutation)
    monkeypatch.setattr(formats, "permute_rows", wrong)
    assert (logits(load(tmp_path)[0]) - logits(model)).abs().max() > 1e-2  # trap 1


def test_real_weights_speak_as_published(real_data):
    folder = real_data / "stories260K"
    model, tok = load(folder / "stories260K.bin")
    assert replace(model.cfg) == ModelConfig.preset("stories260k")
    answer = generate(model, [[tok.bos_id]], max_new_tokens=200, temperature=0.)[0]
    assert tok.decode(answer.tokens) == (folder / "published_greedy_200steps.txt").read_text()


@pytest.mark.parametrize("how", SAVERS)
def test_real_weights_survive_every_container(how, real_data, tmp_path):
    folder = real_data / "stories260K"
    model, tok = load(folder / "stories260K.bin")
    SAVERS[how](model, tok, tmp_path)
    twin, its_tok = load(place(tmp_path, how))
    assert torch.equal(logits(twin), logits(model)) and its_tok.model == tok.model
    if how == "llama2c":
        kept, made = ((p.read_bytes()) for p in (folder / "stories260K.bin", tmp_path / "model.bin"))
        cut = len(made) - 2 * 512 * 4 * 4  # without the tables of RoPE, which others compute with other rounding
        assert made[:cut] == kept[:cut] and len(made) == len(kept)
        assert (tmp_path / "tokenizer.bin").read_bytes() == (folder / "tok512.bin").read_bytes()


# --- names, settings --------------------------------------------------------------------------------------------------

def test_prefixes_of_wrappers_are_stripped(tmp_path):
    model = random_model(GQA)
    state = {"module._orig_mod." + k: v for k, v in model.state_dict().items()}
    save_meta(model, None, tmp_path)
    torch.save(state, tmp_path / "consolidated.00.pth")
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))  # trap 14
    wrapped = torch.nn.DataParallel(torch.compile(model))
    assert all(k.startswith("module._orig_mod.") for k in wrapped.state_dict())
    save(wrapped, None, tmp_path / "own")
    assert torch.equal(logits(load(tmp_path / "own")[0]), logits(model))  # trap 14


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 9000), st.integers(1, 40000))
def test_every_width_has_settings(dim, hidden):
    assert swiglu_width(dim, *ffn_settings(dim, hidden)) == hidden


@pytest.mark.parametrize("name", ["7b", "13b", "34b", "70b"])
def test_released_sizes_survive_hugging_face_config(name):
    cfg = ModelConfig.preset(name)
    back = from_hf_config(to_hf_config(cfg, torch.bfloat16), Path("c"))
    assert (back.n_params(), back.hidden_dim, back.n_kv_heads) == (cfg.n_params(), cfg.hidden_dim, cfg.n_kv_heads)


def test_shards_are_cut_as_meta_cuts_them(tmp_path):
    "A round trip cannot see this: writer and reader could be wrong together. Rank 1 of 2 computes with its files alone."
    model = random_model(GQA)
    save_meta(model, None, tmp_path, n_shards=2)
    ranks = [torch.load(tmp_path / f"consolidated.0{i}.pth", weights_only=True) for i in (0, 1)]
    whole, c, h, v = model.state_dict(), 64, GQA.hidden_dim, 320
    for r, part in enumerate(ranks):
        a = "layers.1.attention."
        assert torch.equal(part["tok_embeddings.weight"], whole["tok_embeddings.weight"][:, c // 2 * r:c // 2 * (r + 1)])
        assert torch.equal(part["output.weight"], whole["output.weight"][v // 2 * r:v // 2 * (r + 1)])
        assert torch.equal(part[a + "wq.weight"], whole[a + "wq.weight"][c // 2 * r:c // 2 * (r + 1)]), "heads 0-3 and 4-7"
        assert torch.equal(part[a + "wk.weight"], whole[a + "wk.weight"][c // 4 * r:c // 4 * (r + 1)]), "kv heads 0-1 and 2-3"
        assert torch.equal(part[a + "wo.weight"], whole[a + "wo.weight"][:, c // 2 * r:c // 2 * (r + 1)])
        assert torch.equal(part["norm.weight"], whole["norm.weight"])
    x, f = torch.randn(5, c), "layers.0.feed_forward."
    sums = [(torch.nn.functional.silu(x @ p[f + "w1.weight"].T) * (x @ p[f + "w3.weight"].T)) @ p[f + "w2.weight"].T for p in ranks]
    torch.testing.assert_close(sums[0] + sums[1], model.layers[0].feed_forward(x))
    assert ranks[0][f + "w1.weight"].shape == (h // 2, c)
    one = tmp_path.joinpath("consolidated.00.pth").stat().st_size
    assert one < .7 * sum(t.nbytes for t in whole.values()), "a shard holds its part, not the storage behind it"


def test_vocabulary_of_minus_one_is_filled_in(tmp_path):
    save_meta(random_model(GQA), None, tmp_path, n_shards=2)
    params = json.loads((tmp_path / "params.json").read_text())
    assert "max_seq_len" not in params, "Meta's code takes it as an argument and would fail"
    (tmp_path / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    assert load(tmp_path)[0].cfg.vocab_size == 320


# --- damage and doubt -------------------------------------------------------------------------------------------------

class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-code-ran",)


def test_a_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_meta(random_model(GQA), None, tmp_path / "m")
    torch.save({"norm.weight": Hostile()}, tmp_path / "m" / "consolidated.00.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load(tmp_path / "m")
    assert not (tmp_path / "hostile-code-ran").exists()  # trap 14


@pytest.mark.parametrize("how", SAVERS)
@pytest.mark.parametrize("keep", [.3, .97])
def test_truncated_files(how, keep, tmp_path):
    SAVERS[how](random_model(GQA), None, tmp_path)
    largest = max(tmp_path.iterdir(), key=lambda f: f.stat().st_size)
    data = largest.read_bytes()
    largest.write_bytes(data[:int(len(data) * keep)])
    with pytest.raises(UserError, match="truncated"):
        load(place(tmp_path, how))


def test_weights_of_another_size(tmp_path):
    save(random_model(GQA), None, tmp_path / "own")
    other = random_model(replace(GQA, dim=32))
    save_file(weights.named_weights(other), tmp_path / "own" / "model.safetensors", metadata=formats.own_header(GQA))
    with pytest.raises(UserError, match=r"has shape \(.*32\), but the configuration wants \(.*64\)"):
        load(tmp_path / "own")
    save_hf(random_model(GQA), None, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value, says in [("num_hidden_layers", 3, "9 of 30 tensors are missing"), ("num_hidden_layers", 1, "no such tensor"),
                             ("vocab_size", 321, r"tok_embeddings.weight|output.weight")]:
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=says):
            load(tmp_path / "hf")


def test_a_tokenizer_with_another_vocabulary(tok, tmp_path):
    small = random_model(replace(GQA, vocab_size=300))
    for saver in (save, save_hf, save_meta):
        with pytest.raises(UserError, match="320 pieces, but the embedding has 300 rows"):
            saver(small, tok, tmp_path / "m")
    save(small, None, tmp_path / "m")
    tok.save(tmp_path / "m" / "tokenizer.model")
    with pytest.raises(UserError, match="320 pieces, but the embedding has 300 rows"):
        load(tmp_path / "m")  # trap 13
    save_llama2c(small, None, tmp_path / "c.bin")
    (tmp_path / "tokenizer.bin").write_bytes(llama2c_tokenizer(tok))
    assert load(tmp_path / "c.bin")[1] is None, "a neighbour that does not fit is not its tokenizer"


def test_formats_are_recognised_by_content(tok, tmp_path):
    save_llama2c(random_model(GQA), tok, tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth")[1].vocab_size == 320
    save(random_model(GQA), None, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"stage": "pretrain"}')  # what a pipeline writes there
    assert load(tmp_path / "run")[0].cfg == GQA
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no model that can be recognised; found config.json"):
        load(tmp_path / "run")


@pytest.mark.parametrize("content, says", [(b"", "is not llama2.c"), (b"PK\x03\x04" + b"\x00" * 90, "give the folder"), (b"\x01\x00\x00\x00" * 7, "not llama2.c")])
def test_unknown_files(content, says, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load(tmp_path / "x.bin")
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "y.bin")


@pytest.mark.parametrize("change, says", [({"model_type": "mistral"}, "not a plain Llama"), ({"attention_bias": True}, "not a plain Llama"),
                                          ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "not a plain Llama"),
                                          ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.}}, "not a plain Llama"),
                                          ({"hidden_size": None}, "lacks hidden_size")])
def test_other_architectures_are_refused(change, says, tmp_path):
    save_hf(random_model(GQA), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=says):
        read_hf(tmp_path)


def test_a_missing_shard(tmp_path):
    SAVERS["hf sharded"](random_model(GQA), None, tmp_path / "hf")
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002-of-.* is missing"):
        load(tmp_path / "hf")
    save_meta(random_model(GQA), None, tmp_path / "meta", n_shards=2)
    (tmp_path / "meta" / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match="has shape"):
        load(tmp_path / "meta")


# --- atomic saving ----------------------------------------------------------------------------------------------------

def test_saving_again_leaves_nothing_behind(tok, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    save_hf(random_model(GQA), tok, tmp_path, max_shard_bytes=200_000)
    save_hf(random_model(GQA, seed=1), None, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "generation_config.json", "metrics.jsonl", "model.safetensors"]
    with pytest.raises(UserError, match="another format"):
        save(random_model(GQA), tok, tmp_path)


@pytest.mark.parametrize("how", ["own", "hf sharded", "meta 2"])
def test_a_killed_save_never_leaves_a_mixture(how, tok, tmp_path, monkeypatch):
    "Stop before each removal and move in turn, until none is stopped: the folder is the old model, the new one, or none."
    old, new = random_model(TINY), random_model(TINY, seed=1)
    SAVERS[how](old, tok, tmp_path / "first")
    states, replace_, unlink = [], os.replace, Path.unlink
    while not states or states[-1] != "new":
        folder, left = shutil.copytree(tmp_path / "first", tmp_path / f"try{len(states)}"), [None] * len(states)

        def stopping(real):
            def step(*args, **kwargs):
                if not left:
                    raise KeyboardInterrupt
                left.pop()
                return real(*args, **kwargs)
            return step
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(weights.os, "replace", stopping(replace_))
            patch.setattr(weights.Path, "unlink", stopping(unlink))
            SAVERS[how](new, tok, folder)
        try:
            found = logits(load(folder)[0])
            states.append("old" if torch.equal(found, logits(old)) else "new" if torch.equal(found, logits(new)) else "mixture")
        except UserError as error:
            assert "no model that can be recognised" in str(error)
            states.append("none")
    assert "mixture" not in states and states.count("none") >= 1 and len(states) < 60


def test_a_failed_save_keeps_the_old_model(tok, tmp_path, monkeypatch):
    old = random_model(GQA)
    save(old, tok, tmp_path)
    monkeypatch.setattr(weights, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save(random_model(GQA, seed=1), tok, tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), logits(old))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", "tokenizer.model"]
