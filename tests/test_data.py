"Pretraining data: shards, streams, mixtures, batches by number; traps 21, 22, 28, 29."
import json
import os
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.pretraining.data import (Mixture, PretrainBatches, Shard, ShardConfig, Stream, TokenData, is_validation, make_shards,
                                           next_token_batch, pack_documents, read_documents, resolve_data, tokenize_corpus)

BOS, EOS = 1, 2

def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def shard_of(lengths, first=10):
    "Documents BOS, first + i, ..., EOS of the given lengths."
    docs = [[BOS, *[first + i] * (n - 2), EOS] for i, n in enumerate(lengths)]
    return Shard(np.concatenate(docs).astype(np.uint16), np.cumsum([len(d) for d in docs])), docs

class ByteTokenizer:
    "Enough of a tokenizer for these tests: ids are bytes plus 3."
    vocab_size, bos_id, eos_id = 259, BOS, EOS
    def encode(self, text, bos=True, eos=False): return [BOS] * bos + [b + 3 for b in text.encode()] + [EOS] * eos

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows = [dict(text=f"{s} document {i} " + "x" * (i % 40), source=s) for s, n in dict(wiki=30, web=120, code=8).items() for i in range(n)]
    (folder / "pretrain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, rows

@pytest.fixture(scope="module")
def data(corpus): return tokenize_corpus(ByteTokenizer(), corpus[0], corpus[0] / "shards", valid_fraction=0.1)

# ---- shards

def test_every_document_stands_between_bos_and_eos(data, corpus):  # trap 22
    found = []
    for split in data.shards.values():
        for source, shard in split.items():
            for i in range(len(shard)):
                ids = shard.document(i).tolist()
                assert ids[0] == BOS and ids[-1] == EOS and not {BOS, EOS} & set(ids[1:-1])
                found.append((source, bytes(x - 3 for x in ids[1:-1]).decode()))
    assert sorted(found) == sorted((r["source"], r["text"]) for r in corpus[1])

def test_split_is_by_content(data, corpus):
    for split, wanted in (("train", False), ("valid", True)):
        for shard in data.shards[split].values():
            for i in range(len(shard)):
                assert is_validation(bytes(x - 3 for x in shard.document(i)[1:-1].tolist()).decode(), 0.1) == wanted
    assert not is_validation("x", 0.) and is_validation("x", 1.)

@pytest.mark.parametrize("vocab, dtype", [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_ids_fit_their_type(tmp_path, vocab, dtype):
    tok = SimpleNamespace(vocab_size=vocab, encode=lambda text, bos, eos: [BOS, vocab - 1, EOS])
    (tmp_path / "c.jsonl").write_text('{"text": "a"}')
    data = tokenize_corpus(tok, tmp_path / "c.jsonl", tmp_path / "s", valid_fraction=0)
    shard = data.shards["train"]["corpus"]
    assert shard.tokens.dtype == dtype and shard.document(0).tolist() == [BOS, vocab - 1, EOS]

def test_source_names_need_not_be_file_names(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a", "source": "../a b/c"}')
    tokenize_corpus(ByteTokenizer(), tmp_path / "c.jsonl", tmp_path / "s", 0)
    assert TokenData(tmp_path / "s").n_tokens() == {"../a b/c": 3}

@pytest.mark.parametrize("text, message", [
    ('{"text": "a"}\n\n{"text": "b', r"c\.jsonl:3"), ('{"text": "a"}\n\n{"text": " \\n"}', r"c\.jsonl:3.*no text"),
    ('{"text": 7}', r"c\.jsonl:1.*no text"), ('{"txt": "a"}', r"c\.jsonl:1"), ("", r"c\.jsonl has no rows")])
def test_bad_rows_are_named(tmp_path, text, message):
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(UserError, match=message): tokenize_corpus(ByteTokenizer(), tmp_path / "c.jsonl", tmp_path / "s")
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(UserError, match="no finished token shards"): TokenData(tmp_path / "s")

def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="found: nothing"): list(read_documents(tmp_path))
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(UserError, match="found: train.txt"): list(read_documents(tmp_path))
    with pytest.raises(UserError, match="does not exist"): list(read_documents(tmp_path / "no.jsonl"))

def test_damage_is_found(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "abc"}')
    tokenize_corpus(ByteTokenizer(), tmp_path / "c.jsonl", tmp_path / "s", 0)
    file = tmp_path / "s/train/corpus.idx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="corpus.idx has 7 bytes, expected 8"): TokenData(tmp_path / "s")

def test_a_failed_second_run_leaves_no_half_new_shards(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "abc"}'); bad.write_text('{"text": "abcdef"}\n{"text"')
    tokenize_corpus(ByteTokenizer(), good, tmp_path / "s", 0)
    with pytest.raises(UserError): tokenize_corpus(ByteTokenizer(), bad, tmp_path / "s", 0)
    assert (tmp_path / "s/train/corpus.bin").stat().st_size == 2 * 5  # the old file; and unfinished, so not read by accident
    with pytest.raises(UserError, match="no finished"): TokenData(tmp_path / "s")

def test_tokenising_takes_constant_memory(tmp_path):
    def peak(n):
        with open(tmp_path / "c.jsonl", "w") as f:
            for i in range(n): f.write(json.dumps(dict(text=f"{i} " * 200)) + "\n")
        tracemalloc.start()
        tokenize_corpus(ByteTokenizer(), tmp_path / "c.jsonl", tmp_path / "s", 0)
        size = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return size
    assert peak(800) < 1.3 * peak(200) + 100_000

# ---- streams and mixtures

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(0, 300), st.integers(1, 60), st.integers(0, 5))
def test_any_stretch_equals_the_joined_line(lengths, start, n, seed):
    shard, docs = shard_of(lengths)
    line, e = [], 0
    while len(line) < start + n:
        order = np.random.default_rng((seed, 0, e)).permutation(len(docs))
        line += [x for i in order for x in docs[i]]; e += 1
    ids, numbers = Stream(shard, seed).read(start, n)
    assert ids.tolist() == line[start:start + n]
    assert numbers[0] == 0 and (np.diff(numbers) == (ids[:-1] == EOS)).all()

def test_epochs_and_sources_have_different_orders():
    shard, _ = shard_of([3] * 40)
    assert (Stream(shard, 0).read(0, 120)[0] != Stream(shard, 0).read(120, 120)[0]).any()
    assert (Stream(shard, 0, "a").read(0, 120)[0] != Stream(shard, 0, "b").read(0, 120)[0]).any()

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(.01, 10), min_size=1, max_size=7), st.integers(0, 9))
def test_mixture_gives_exact_shares_and_counts(values, seed):
    weights = {f"s{i}": w for i, w in enumerate(values)}
    if min(values) / sum(values) < .002: return
    mixture, seen, total = Mixture(weights, seed), Counter(), sum(values)
    for n in range(2000):
        source, k = mixture[n]
        assert k == seen[source]
        seen[source] += 1
    for s, w in weights.items(): assert abs(seen[s] - 2000 * w / total) <= 2

@pytest.mark.parametrize("weights", [{}, {"a": 0.}, {"a": -1., "b": 2.}, {"a": float("nan")}, {"a": float("inf")}, {"a": 1., "b": 1e-5}])
def test_bad_weights(weights):
    with pytest.raises(UserError, match="mixture weights"): Mixture(weights, 0)

# ---- batches

def test_batches_are_a_pure_function_of_seed_and_step(data):  # trap 29: nothing but the step is needed to go on
    make = lambda seed=0: PretrainBatches(data, {"wiki": .5, "web": .3, "code": .2}, 8, 32, seed)
    used = make()
    for i in range(5): used[i]
    assert equal(used[700], make()[700]) and equal(used[0], make()[0])
    assert not equal(used[0], used[1]) and not equal(make(0)[0], make(1)[0])

@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_any_world_reads_the_same_global_batch(data, world):  # traps 28, 29
    batches = PretrainBatches(data, None, 8, 32)
    parts = [batches.slice(r, world)[3] for r in range(world)]
    assert equal(batches[3], {k: torch.cat([p[k] for p in parts]) for k in parts[0]})
    assert max(len(p["tokens"]) for p in parts) - min(len(p["tokens"]) for p in parts) <= 1

def test_of_many_ranks_some_have_no_row(data):
    assert [len(PretrainBatches(data, None, 8, 32).slice(r, 9)[3]["tokens"]) for r in range(9)] == [0] + [1] * 8

def test_targets_are_the_next_tokens_and_bos_is_never_trained(data):  # trap 22
    b = PretrainBatches(data, None, 16, 64)[2]
    assert torch.equal(b["tokens"][:, 1:], b["targets"][:, :-1])
    assert not (b["targets"][b["mask"]] == BOS).any()
    assert torch.equal(b["mask"], b["tokens"] != EOS)
    assert (b["positions"][b["tokens"] == BOS] == 0).all() and b["tokens"].dtype == torch.int64

def test_one_epoch_by_size_reads_every_token_once(data):
    n = data.n_tokens()["wiki"]
    batches = PretrainBatches(data, {"wiki": 1}, 1, 16)
    read = torch.cat([batches[i]["tokens"][0] for i in range(-(-3 * n // 16))])[:3 * n].numpy()
    assert (np.bincount(read, minlength=259) == 3 * np.bincount(data.shards["train"]["wiki"].tokens, minlength=259)).all()

def test_weights_upsample(data):
    rows = Counter(PretrainBatches(data, {"code": 3, "web": 1}, 4, 16).mixture[n][0] for n in range(1000))
    assert rows == {"code": 750, "web": 250}

def test_validation_never_meets_training(data):
    train, valid = ({tuple(s.document(i)) for s in data.shards[k].values() for i in range(len(s))} for k in ("train", "valid"))
    assert not train & valid
    PretrainBatches(data, {"wiki": 1, "web": 1, "code": 1}, 4, 16, split="valid")[0]  # code has no validation document: it is skipped

def test_bad_sources(data, tmp_path):
    with pytest.raises(UserError, match="weights name wikki, but .* has only"): PretrainBatches(data, {"wikki": 1})
    (tmp_path / "c.jsonl").write_text('{"text": "abc"}')
    alone = tokenize_corpus(ByteTokenizer(), tmp_path / "c.jsonl", tmp_path / "s", 0)
    with pytest.raises(UserError, match="no valid documents"): PretrainBatches(alone, split="valid")

def test_a_source_shorter_than_a_row_is_repeated(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "ab"}')
    b = PretrainBatches(tokenize_corpus(ByteTokenizer(), tmp_path / "c.jsonl", tmp_path / "s", 0), None, 2, 9)[0]
    assert b["tokens"][0].tolist() == [BOS, 100, 101, EOS, BOS, 100, 101, EOS, BOS] and b["doc_ids"][0].tolist() == [0] * 4 + [1] * 4 + [2]

# ---- isolation

def leak(model, batch, keys):
    "Largest gradient from the logits of document 1 to the embeddings of document 0 (row 0)."
    kept = []
    hook = model.tok_embeddings.register_forward_hook(lambda m, i, out: kept.append(out))
    logits = model(batch["tokens"], **{k: batch[k] for k in keys}); hook.remove()
    grad, = torch.autograd.grad(logits[0][batch["doc_ids"][0] == 1].pow(2).sum(), kept[0])
    return grad[0][batch["doc_ids"][0] == 0].abs().max().item()

@pytest.mark.parametrize("packed", [False, True])
def test_documents_are_isolated_by_the_mask_not_by_positions(packed):  # trap 21
    torch.manual_seed(0)
    model = Llama(ModelConfig(16, 2, 2, 1, vocab_size=32, multiple_of=16, max_seq_len=32))
    one, two = [BOS, 5, 6, 7, EOS], [BOS, 8, 9, 10, 11, EOS]
    batch = pack_documents([two, one], 12) if packed else next_token_batch(torch.tensor([one + two]), torch.tensor([[0] * 5 + [1] * 6]))
    assert leak(model, batch, ["positions", "doc_ids"]) == 0
    assert leak(model, batch, ["positions"]) > 0 and leak(model, batch, []) > 0
    here = batch["doc_ids"][0] == 1
    alone = model(batch["tokens"][:, here])[0]
    torch.testing.assert_close(model(batch["tokens"], batch["positions"], batch["doc_ids"])[0][here], alone, atol=1e-5, rtol=0)

# ---- packing

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=25), st.integers(3, 16))
def test_packing_keeps_every_target_once(lengths, seq_len):
    _, docs = shard_of(lengths)
    b = pack_documents(docs, seq_len)
    assert all(v.shape == (len(b["tokens"]), seq_len) for v in b.values())
    pairs = lambda x, y: sorted(zip(x, y))
    assert pairs(b["tokens"][b["mask"]].tolist(), b["targets"][b["mask"]].tolist()) == pairs(
        [x for d in docs for x in d[:-1]], [y for d in docs for y in d[1:]])
    assert torch.equal(b["mask"], b["doc_ids"] >= 0)  # trap 22: nothing of the padding is trained
    assert (b["targets"][b["mask"]] == EOS).sum() == len(docs)
    for row in b["doc_ids"].tolist():  # documents are contiguous, padding is last
        kept = [d for d in row if d >= 0]
        assert row[:len(kept)] == kept and len(set(kept)) == 1 + sum(x != y for x, y in zip(kept, kept[1:])) if kept else False

def test_packing_follows_the_masks_given():
    b = pack_documents([[1, 5, 6, 7, 2], [1, 8, 2]], 6, masks=[[False, False, False, True, True], [False, False, True]])
    assert b["targets"][b["mask"]].tolist() == [7, 2, 2]
    with pytest.raises(ValueError): pack_documents([[1, 2], [1, 2]], 4, masks=[[True, True]])

# ---- stage, hub, real data

def test_stage(corpus, tmp_path):
    tok = Tokenizer.train([r["text"] for r in corpus[1]], 300, tmp_path / "tokenizer.model")
    summary = make_shards(ShardConfig(.1), tmp_path / "out", dict(tokenizer=tmp_path, data=corpus[0]))
    data = TokenData(tmp_path / "out")
    assert data.vocab_size == tok.vocab_size == 300 and summary["train"] == data.n_tokens()

def test_hub(tmp_path, monkeypatch):
    calls = []
    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        if name == "me/bad": return iter([{"body": "x"}])
        return iter([{"text": f"t{i}", "meta": i} for i in range(5)])
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    got = resolve_data("me/stories", tmp_path, limit=3)
    assert [t for _, t in read_documents(got)] == ["t0", "t1", "t2"] and calls == [("me/stories", "train", True)]
    assert resolve_data("me/stories", tmp_path) == got and len(calls) == 1  # kept
    with pytest.raises(UserError, match="me/bad is no folder here"): resolve_data("me/bad", tmp_path)
    assert not list((tmp_path / "me--bad").glob("*.jsonl"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"llama2_nbdev\[hub\]"): resolve_data("me/other", tmp_path)
    assert resolve_data(tmp_path) == tmp_path and str(resolve_data("./missing")) == "missing"

def test_real_text(tmp_path, real_data):
    text = (real_data / "tinyshakespeare/input.txt").read_text() if (real_data / "tinyshakespeare/input.txt").exists() else next(
        p for p in (real_data / "tinyshakespeare").iterdir() if p.suffix == ".txt").read_text()
    scenes = [s for s in text.split("\n\n") if s.strip()]
    (tmp_path / "pretrain.jsonl").write_text("\n".join(json.dumps(dict(text=s, source="plays")) for s in scenes))
    tok = Tokenizer.train(scenes, 600, tmp_path / "tokenizer.model")
    data = tokenize_corpus(tok, tmp_path, tmp_path / "s")
    found = [tok.decode(s.document(i).tolist()) for x in data.shards.values() for s in x.values() for i in range(len(s))]
    assert sorted(found) == sorted(scenes)
