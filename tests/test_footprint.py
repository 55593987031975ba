"""The footprint, the planner, and the models of memory, network and energy they stand on."""
import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from llama2_nbdev.core import UserError
from llama2_nbdev.model import attention
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.pretraining.footprint import GPUS, TABLE2, carbon, carbon_interval, divisors, implied_mfu, plan
from llama2_nbdev.pretraining.memory import CHECKPOINTING, Ledger, block_bytes, memory
from llama2_nbdev.pretraining.meter import Meter, read_rapl
from llama2_nbdev.pretraining.network import INFINIBAND, NVLINK, ROCE, group_seconds, ring_seconds, traffic
from llama2_nbdev.pretraining.training import TrainConfig, make_optimizer, next_token_loss

GIB = 2**30
CFG = ModelConfig(128, 3, 8, 4, vocab_size=512, multiple_of=32, max_seq_len=128)


def test_table_2_to_the_printed_digits():
    "The rows are cut after two digits, the total is that of the exact rows."
    exact = [carbon(row.gpu_hours, row.watts) for row in TABLE2.values()]
    assert [math.floor(100 * x) / 100 for x in exact] == [31.22, 62.44, 153.90, 291.42] == [row.tonnes for row in TABLE2.values()]
    assert round(sum(exact), 2) == 539.00 and sum(row.gpu_hours for row in TABLE2.values()) == 3_311_616


def test_carbon_is_linear_and_the_interval_holds_it():
    assert carbon(0, 400) == 0 and carbon(2, 300) == pytest.approx(2 * carbon(1, 300)) == pytest.approx(carbon(1, 600))
    assert carbon(1e6, 1000, pue=1, kg_per_kwh=1) == pytest.approx(1000), "a GWh at 1 kg is 1000 t"
    low, high = carbon_interval(1e6, 400)
    assert low < carbon(1e6, 400) < high


def test_mfu_counts_causal_attention_and_no_embedding():
    "The convention is stated by the count itself."  # trap 30
    cfg, hours = ModelConfig.preset("7b"), TABLE2["7b"].gpu_hours
    by_hand = (6 * (6_738_415_616 - 65 * 4096 - 32000 * 4096) + 6 * 32 * 4096 * 4096) * 2e12 / (hours * 3600 * 312e12)
    assert implied_mfu(cfg, hours) == pytest.approx(by_hand)
    assert implied_mfu(cfg, 2 * hours) == pytest.approx(by_hand / 2)


def step_bytes(build, rows: int, seq: int, how: str) -> tuple[int, int]:
    "Kept after the forward pass, and peak, beyond weights and gradients."
    model = build(CFG)
    for layer in model.layers:
        if how == "full":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    tokens = torch.zeros(rows, seq, dtype=torch.long)
    batch = dict(tokens=tokens, targets=tokens.clone(), mask=torch.ones_like(tokens, dtype=torch.bool))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Ledger([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *batch.values()]) as ledger:
        before = ledger.live
        loss, _ = next_token_loss(model, batch)
        kept = ledger.live - before
        loss.backward()
    return kept, ledger.peak - before


def bf16(cfg: ModelConfig) -> Llama:
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Llama(cfg)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Attention in the precision that it is given; a CPU computes bf16 in fp32."
    def attend(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    monkeypatch.setattr(attention, "attend", attend)


@pytest.mark.parametrize("how", ("none", "full"))
@pytest.mark.parametrize("build, size", ((Llama, 4), (bf16, 2)))
@pytest.mark.parametrize("rows, seq", ((4, 128), (8, 64)))
def test_memory_agrees_with_allocations(build, size, how, rows, seq, one_thread, as_on_a_gpu):
    kept, peak = step_bytes(build, rows, seq, how)
    m = memory(CFG, rows, seq, how, itemsize=size)
    assert (m.activations + 4 * rows * seq * CFG.vocab_size) / kept == pytest.approx(1, abs=.01)
    assert .98 < (m.activations + m.working) / peak < 1.2


def test_memory_of_weights_gradients_and_adamw_is_exact():
    model = Llama(CFG)
    optimizer = make_optimizer(model, TrainConfig(steps=1, lr=1e-3, warmup=0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    size = lambda tensors: sum(x.untyped_storage().nbytes() for x in tensors)
    m = memory(CFG, 1, 8, itemsize=4)
    assert m.parameters == m.gradients == size(model.parameters())
    assert m.optimizer == size(s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))


def test_memory_at_full_size_with_fake_tensors(as_on_a_gpu):
    "Two layers of 7B at a context of 4096, without a gigabyte."
    cfg = replace(ModelConfig.preset("7b"), n_layers=2)
    with FakeTensorMode():
        model, tokens = bf16(cfg), torch.zeros(1, 4096, dtype=torch.long)
        with Ledger([*model.parameters(), *model.buffers(), tokens]) as ledger:
            before = ledger.live
            loss = next_token_loss(model, dict(tokens=tokens, targets=tokens, mask=tokens == 0))[0]
            kept = ledger.live - before
        del loss
    assert (memory(cfg, 1, 4096).activations + 4 * 4096 * cfg.vocab_size) / kept == pytest.approx(1, abs=.001)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(("7b", "13b", "34b", "70b")), st.sampled_from((1, 2, 4, 8)), st.sampled_from((1, 8, 64)), st.integers(1, 4))
def test_memory_shrinks_with_sharding_and_checkpointing(name, tensor, shard, rows):
    cfg = ModelConfig.preset(name)
    none, selective, full = (memory(cfg, rows, 4096, how, shard, tensor) for how in CHECKPOINTING)
    assert none.activations > selective.activations > full.activations
    assert block_bytes(cfg, 2 * rows, 4096, "full") == 2 * block_bytes(cfg, rows, 4096, "full")
    assert memory(cfg, rows, 4096, shard=2 * shard, tensor=tensor).parameters <= none.parameters / 2 + 4
    assert none.total == sum(asdict(none).values())
    assert none.parameters == -(-4 * cfg.n_params() // (shard * tensor)) and none.optimizer == 2 * none.gradients == 2 * none.parameters


def test_ledger_frees_what_is_gone():
    with Ledger() as ledger:
        x = torch.zeros(100)
        for _ in range(5):
            y = x + 1
        view = y[:10]
        del x, y
    assert (ledger.live, ledger.peak) == (400, 1200), "at the peak: x, the old y and the new one; a view keeps its storage"


def test_rings():
    assert ring_seconds(1e9, 1, ROCE) == 0
    assert ring_seconds(1e9, 64, INFINIBAND) < ring_seconds(1e9, 64, ROCE)
    assert group_seconds(1e9, 4, 8, NVLINK, ROCE) == ring_seconds(1e9, 4, NVLINK)
    free = replace(ROCE, latency=0.)
    assert ring_seconds(8., 8, free) == pytest.approx(7 / free.bandwidth)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(((1, 64, 1), (4, 16, 2), (2, 256, 4), (8, 1, 8))), st.floats(1e-3, 1e3), st.integers(1, 8))
def test_traffic_hides_behind_computation(layout, compute, steps):
    cfg = ModelConfig.preset("13b")
    a, b = (traffic(cfg, 4096, steps, seconds, layout) for seconds in (compute, 2 * compute))
    assert 0 <= b.exposed <= a.exposed + 1e-12 <= a.seconds + 1e-9 and a.sent == b.sent
    assert traffic(cfg, 4096, steps, compute, layout, net=ROCE).seconds >= a.seconds
    assert traffic(cfg, 4096, steps, compute, (1, 1, 1)).seconds == 0


def test_plan_is_arithmetic():
    p = plan("7b", gpus=256, mfu=.4)
    cfg = ModelConfig.preset("7b")
    assert p.checkpointing != "full", "7B on 256 GPUs recomputes no product"
    assert p.compute_seconds == pytest.approx(p.batch_tokens * cfg.flops_per_token(4096) / (256 * 312e12 * .4))
    assert p.tonnes == pytest.approx(carbon(p.gpu_hours, 400)) and p.dollars == pytest.approx(2 * p.gpu_hours)
    assert p.steps == math.ceil(2e12 / p.batch_tokens) and p.gpu_hours == pytest.approx(p.days * 24 * 256)
    assert implied_mfu(cfg, p.gpu_hours) == pytest.approx(p.mfu, rel=1e-4)
    assert json.loads(json.dumps(asdict(p)))["memory"]["parameters"] == p.memory.parameters


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(("7b", "13b", "34b", "70b")), st.sampled_from(("a100-80", "h100-80", "h200")), st.sampled_from((64, 256, 1000, 2048)))
def test_plan_fits_and_keeps_the_batch(model, gpu, gpus):
    p = plan(model, gpu, gpus)
    assert p.memory.total <= p.usable and p.replicate * p.shard * p.tensor == gpus
    assert abs(p.batch_tokens / 2**22 - 1) <= .1 and p.mfu <= .5
    assert p.rows * p.accumulation * p.replicate * p.shard * 4096 == p.batch_tokens


@pytest.mark.parametrize("tensor", (1, 2, 4, 8))
def test_tensor_parallelism_leaves_the_batch_as_it_is(tensor):
    assert plan("7b", gpus=64, tensor=tensor).batch_tokens == 2**22


def test_more_rows_than_data_parallel_gpus():
    "2,048 GPUs and 1,024 rows need tensor parallelism."
    assert plan("70b", gpus=2048).tensor >= 2
    with pytest.raises(UserError, match="whole rows.*What would fit: a free choice"):
        plan("70b", gpus=2048, tensor=1)


@pytest.mark.parametrize("wish, words", [
    (dict(model="70b", gpus=8), r"needs [\d.]+ GiB of each GPU.*What would fit: .*GPUs"),
    (dict(model="70b", gpus=512, shard=4, tensor=1), "What would fit: a free choice of the layout"),
    (dict(model="7b", gpu="rtx4090", gpus=1), "the GPU h200"),
    (dict(gpu="a100"), "choose one of v100-32"), (dict(model="8b"), "choose one of 7b"),
    (dict(mfu=1.2), "mfu=1.2"), (dict(gpus=0), "1 or more"), (dict(checkpointing="some"), "none, selective, full")])
def test_a_plan_that_does_not_fit_says_what_would(wish, words):
    with pytest.raises(UserError, match=words) as e:
        plan(**wish)
    assert "\n" not in str(e.value)


def test_what_would_fit_does_fit():
    "The advice is tried: the number of GPUs it names is enough, half of it is not."
    with pytest.raises(UserError) as e:
        plan("70b", gpus=8)
    n = int(str(e.value).split("What would fit: ")[1].split(" GPUs")[0])
    assert plan("70b", gpus=n).memory.total <= 72 * GIB
    with pytest.raises(UserError):
        plan("70b", gpus=n // 2)


def test_plan_prints_every_part():
    text = str(plan("13b", gpu="h100-80", gpus=64))
    for word in ("13b on 64 x h100-80", "replicate", "parameters", "gathered", "days", "MWh", "t CO2eq", "dollars"):
        assert word in text
    assert divisors(2048) == [2**k for k in range(12)] and set(GPUS) >= {"a100-80", "h100-80", "h200", "v100-32", "rtx4090"}


def test_meter_reads_counters_that_wrap(tmp_path: Path):
    folder = tmp_path / "intel-rapl:0"
    folder.mkdir()
    (folder / "max_energy_range_uj").write_text("1000000")
    values = iter([900_000, 100_000])

    def read():
        (folder / "energy_uj").write_text(str(next(values)))
        return read_rapl(tmp_path)
    with Meter(every=100, rapl=read, gpu=lambda: None) as m:
        pass
    assert m.joules == pytest.approx(.2) and m.source.startswith("measured: the processor")


def test_meter_says_when_it_estimates(tmp_path: Path):
    with Meter(watts=50, rapl=lambda: read_rapl(tmp_path), gpu=lambda: None) as m:
        pass
    assert m.joules == pytest.approx(50 * m.seconds) and m.source == "estimated: seconds x 50 W, since neither processor nor GPU tells"
