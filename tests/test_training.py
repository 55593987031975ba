"Training: loss, gradients, schedule, optimiser, loop, checkpoints; traps 15 to 20 and 28 to 31."
import copy
import json
import math
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load
from llama2_nbdev.pretraining import longrun
from llama2_nbdev.pretraining.data import tokenize_corpus
from llama2_nbdev.pretraining.longrun import Speedometer, derive_seed, load_checkpoint, save_checkpoint
from llama2_nbdev.pretraining.training import (Copies, PretrainConfig, Run, TrainConfig, cosine_lr, evaluate_loss, fit, make_optimizer,
                                               next_token_loss, pretrain, set_gradients, split_rows, train_step, update)

SMALL = ModelConfig(16, 2, 2, 1, vocab_size=32, multiple_of=16, max_seq_len=32)
TRAIN = TrainConfig(steps=8, lr=1e-2, warmup=2, dtype="float32", checkpoint_every=3)

pytestmark = pytest.mark.usefixtures("one_thread")

def new_model(seed=0):
    torch.manual_seed(seed)
    return Llama(SMALL)

class Toy:
    "Six rows of random tokens with uneven masks; a function of the step."
    batch_size = 6
    def __init__(self, part=slice(None)): self.part = part
    def __getitem__(self, step):
        ids = torch.randint(1, 32, (6, 13), generator=torch.Generator().manual_seed(step))
        counts = torch.tensor([12, 1, 5, 0, 9, 2]).roll(step)
        batch = dict(tokens=ids[:, :-1], targets=ids[:, 1:], mask=torch.arange(12) < counts[:, None])
        return {k: v[self.part] for k, v in batch.items()}
    def slice(self, rank, world): return Toy(slice(6 * rank // world, 6 * (rank + 1) // world))

def trained(out=None, cfg=TRAIN, batches=None, loss_fn=next_token_loss, **kw):
    model = new_model()
    return model, fit(model, batches or Toy(), loss_fn, cfg, out, **kw)

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

def gradient(model, batch, **kw):
    set_gradients(model, batch, next_token_loss, **kw)
    return torch.cat([p.grad.flatten() for p in model.parameters()])

# ---- loss and gradients

def test_the_loss_is_cross_entropy_and_nothing_else():  # trap 31: a z-loss would see a shift of all logits
    batch = Toy()[0]
    logits = torch.randn(6, 12, 32)
    plain = lambda shift: next_token_loss(lambda tokens: logits + shift, batch)
    total, n = plain(0.)
    by_hand = sum(-torch.log_softmax(logits[r, t].double(), -1)[batch["targets"][r, t]] for r in range(6) for t in range(12) if batch["mask"][r, t])
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-5) and n == batch["mask"].sum()
    assert plain(3.)[0].item() == pytest.approx(total.item(), rel=1e-5)

@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5, 6, 100])
def test_gradients_do_not_depend_on_the_split(micro_batch):  # traps 18, 19: with 4 the last window is partial
    model, batch = new_model(), Toy()[1]
    whole, loss = gradient(model, batch), set_gradients(model, batch, next_token_loss)
    torch.testing.assert_close(gradient(model, batch, micro_batch=micro_batch), whole, atol=1e-7, rtol=1e-4)
    assert set_gradients(model, batch, next_token_loss, micro_batch) == pytest.approx(loss)

def test_gradients_equal_autograd_of_the_mean():  # trap 18
    model, batch = new_model(), Toy()[2]
    total, n = next_token_loss(model, batch)
    wanted = torch.autograd.grad(total / n, list(model.parameters()))
    torch.testing.assert_close(gradient(model, batch, micro_batch=2), torch.cat([g.flatten() for g in wanted]), atol=1e-7, rtol=1e-4)

def test_gradients_do_not_depend_on_padding():  # trap 18
    model, batch = new_model(), Toy()[1]
    wider = {k: torch.cat([v, torch.zeros(6, 5, dtype=v.dtype)], 1) for k, v in batch.items()}
    taller = {k: torch.cat([v, torch.zeros(3, 12, dtype=v.dtype)]) for k, v in batch.items()}
    for padded in (wider, taller): torch.testing.assert_close(gradient(model, padded), gradient(model, batch), atol=1e-7, rtol=1e-4)

def test_old_gradients_are_not_added_to():
    model, batch = new_model(), Toy()[1]
    first = gradient(model, batch)
    assert torch.equal(gradient(model, batch), first)

def test_the_tests_above_see_a_mean_of_means():  # trap 18: the planted bug
    def wrong(model, part):
        s, n = next_token_loss(model, part)
        return s / n.clamp(min=1), 1
    model, batch = new_model(), Toy()[1]
    set_gradients(model, batch, wrong, micro_batch=1)
    bad = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (bad - gradient(model, batch)).norm() > .05 * gradient(model, batch).norm()

def test_validation_is_token_weighted():  # trap 20
    model, batch = new_model(), Toy()[0]
    rows = [r for r in split_rows(batch, 1)]
    whole = evaluate_loss(model, [batch], 1)
    assert evaluate_loss(model, rows, 6) == pytest.approx(whole, rel=1e-5)
    means = [evaluate_loss(model, [r], 1) for r in rows if r["mask"].any()]
    assert abs(sum(means) / len(means) - whole) > 1e-4, "this batch would not show the bug"
    assert model.training and all(p.grad is None for p in model.parameters())

def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    a, b = trained(cfg=TRAIN), trained(cfg=replace(TRAIN, dtype="bfloat16"))
    assert all(p.dtype == torch.float32 for p in b[0].parameters())
    assert a[1][-1]["loss"] != b[1][-1]["loss"] and a[1][-1]["loss"] == pytest.approx(b[1][-1]["loss"], abs=.05)

# ---- schedule and optimiser

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 5000), st.floats(1e-6, 1.), st.floats(0, 1), st.integers(0, 20_000))
def test_schedule(total, warmup, peak, floor, step):  # trap 17
    warmup = min(warmup, total)
    lr = lambda s: cosine_lr(s, peak=peak, warmup=warmup, total=total, floor=floor)
    assert lr(warmup) == peak
    assert 0 <= lr(step) <= peak * (1 + 1e-12)
    if step >= warmup:
        assert lr(step) >= floor * peak * (1 - 1e-12) and lr(step + 1) <= lr(step) * (1 + 1e-12)
        if total > warmup and step >= total: assert lr(step) == pytest.approx(floor * peak)
    else: assert lr(step) == pytest.approx(peak * step / warmup)

def test_fit_follows_the_schedule_in_updates():  # trap 17: not in micro-batches
    rows = trained(cfg=replace(TRAIN, micro_batch=1))[1]
    assert [r["lr"] for r in rows] == [cosine_lr(s, peak=1e-2, warmup=2, total=8) for s in range(1, 9)]
    assert rows[0]["lr"] == 5e-3 and rows[1]["lr"] == 1e-2 and rows[-1]["lr"] == pytest.approx(1e-3)

def test_paper_defaults():  # trap 15
    cfg = TrainConfig(steps=1, lr=1., warmup=0)
    assert (cfg.betas, cfg.eps, cfg.weight_decay, cfg.clip, cfg.floor) == ((.9, .95), 1e-5, .1, 1., .1)
    for group in make_optimizer(new_model(), cfg).param_groups: assert group["eps"] == 1e-5 and group["betas"] == (.9, .95)

def test_decay_pulls_matrices_but_not_gains():  # trap 16
    model = new_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    update(model, make_optimizer(model, TRAIN), lr=.5, clip=1.)
    for n, p in model.named_parameters(): torch.testing.assert_close(p.detach(), before[n] * (1. if "norm" in n else .95))

def test_updates_equal_the_textbook():  # traps 15, 16
    model, cfg = new_model(), TRAIN
    x = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    m, v = {n: torch.zeros_like(p) for n, p in x.items()}, {n: torch.zeros_like(p) for n, p in x.items()}
    opt = make_optimizer(model, cfg)
    for i in range(1, 5):
        set_gradients(model, Toy()[i], next_token_loss)
        g = {n: p.grad.double().clone() * (3 if i == 2 else 1) for n, p in model.named_parameters()}
        if i == 2: [p.grad.mul_(3) for p in model.parameters()]
        norm = math.sqrt(sum(float((y**2).sum()) for y in g.values()))
        assert update(model, opt, lr=1e-2, clip=1.) == pytest.approx(norm, rel=1e-4)
        for n in x:
            y = g[n] * min(1., 1. / (norm + 1e-6))
            m[n], v[n] = .9 * m[n] + .1 * y, .95 * v[n] + .05 * y * y
            x[n] = x[n] * (1 - 1e-2 * (0 if "norm" in n else .1)) - 1e-2 * (m[n] / (1 - .9**i)) / ((v[n] / (1 - .95**i)).sqrt() + 1e-5)
    for n, p in model.named_parameters(): torch.testing.assert_close(p.detach().double(), x[n], atol=2e-6, rtol=1e-4)

def test_frozen_weights_stay():
    model = new_model()
    model.tok_embeddings.weight.requires_grad_(False)
    before = model.tok_embeddings.weight.clone()
    fit(model, Toy(), next_token_loss, TRAIN)
    assert torch.equal(model.tok_embeddings.weight, before)

@pytest.mark.parametrize("bad", [dict(steps=0), dict(warmup=9), dict(warmup=-1), dict(dtype="fp8"), dict(checkpoint_every=0)])
def test_bad_settings(bad):
    with pytest.raises(UserError): replace(TRAIN, **bad)

# ---- the loop

def test_loss_falls_on_one_batch():
    rows = trained(cfg=replace(TRAIN, steps=60), batches=[Toy()[0]] * 60)[1]
    assert rows[0]["loss"] == pytest.approx(math.log(32), abs=.1) and rows[-1]["loss"] < .6 * rows[0]["loss"]

def test_rows_and_extras(tmp_path):
    seen = []
    def on_step(step, row):
        seen.append(step)
        return dict(extra=step * 10) if step == 4 else None
    rows = trained(tmp_path, replace(TRAIN, log_every=3), on_step=on_step)[1]
    assert [r["step"] for r in rows] == [3, 4, 6, 8] and rows[1]["extra"] == 40 and seen == list(range(1, 9))
    assert [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows
    assert {"loss", "lr", "grad_norm", "targets", "tokens_per_s", "mfu", "seconds"} <= rows[0].keys()

def test_nothing_is_written_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained()
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(tmp_path, poison, where):
    class Zero(torch.autograd.Function):
        "A loss that is fine with a gradient that is not."
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g * poison
    calls, kept = [], {}
    def loss_fn(model, batch):
        s, n = next_token_loss(model, batch)
        calls.append(0)
        if len(calls) < 6: return s, n
        kept["weights"] = copy.deepcopy(model)
        return (s + poison, n) if where == "loss" else (Zero.apply(s), n)
    model = new_model()
    with pytest.raises(UserError, match="training broke at step 6.*step 5"): fit(model, Toy(), loss_fn, TRAIN, tmp_path)
    assert same(model, kept["weights"]), "the weights moved"
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.pt")] == ["step-00000003.pt"]
    model, rows = trained(tmp_path)  # with the cause gone, it goes on from there
    assert same(model, trained()[0]) and len(rows) == 8

# ---- resuming

def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    def press(step, row):
        if step == 4: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 8. Saved in .*run the same again"): trained(tmp_path, on_step=press)
    model, rows = trained(tmp_path)
    assert same(model, trained()[0]) and [r["step"] for r in rows] == list(range(1, 9))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def stopped_at(tmp_path, step):
    def stop(s, row):
        if s == step: raise RuntimeError("power cut")
    with pytest.raises(RuntimeError): trained(tmp_path, on_step=stop)

def test_resuming_restores_everything(tmp_path):  # trap 29
    random_loss = lambda model, batch: (next_token_loss(model, batch)[0] * (.5 + torch.rand(())), batch["mask"].sum())
    whole, rows = trained(loss_fn=random_loss)
    model = new_model()
    def stop(s, row):
        if s == 5: raise RuntimeError
    with pytest.raises(RuntimeError): fit(model, Toy(), random_loss, TRAIN, tmp_path, on_step=stop)
    again = fit(model := new_model(seed=9), Toy(), random_loss, TRAIN, tmp_path)
    assert same(model, whole) and [r["loss"] for r in again] == [r["loss"] for r in rows] and [r["lr"] for r in again] == [r["lr"] for r in rows]

def test_a_finished_run_is_only_loaded(tmp_path):
    model, rows = trained(tmp_path)
    again, rows2 = trained(tmp_path, batches=[])
    assert same(model, again) and rows2 == rows

def test_resume_false_begins_again(tmp_path):
    trained(tmp_path, replace(TRAIN, lr=5e-2))
    model, rows = trained(tmp_path, resume=False)
    assert same(model, trained()[0]) and [r["step"] for r in rows] == list(range(1, 9))

@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "note"])
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    stopped_at(tmp_path, 7)
    newest = tmp_path / "checkpoints/step-00000006.pt"
    raw = newest.read_bytes()
    if damage == "cut": newest.write_bytes(raw[:len(raw) // 2])
    if damage == "flip": newest.write_bytes(raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:])
    if damage == "gone": newest.unlink()
    if damage == "note": newest.with_suffix(".json").write_text('{"step": 6, "sha')
    with pytest.warns(UserWarning, match="step-00000006.pt is damaged"): model, rows = trained(tmp_path)
    assert same(model, trained()[0]) and [r["step"] for r in rows] == list(range(1, 9))

def test_all_damaged(tmp_path):
    stopped_at(tmp_path, 7)
    for f in (tmp_path / "checkpoints").glob("*.pt"): f.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="all 2 checkpoints"): trained(tmp_path)

def test_a_changed_run_is_refused(tmp_path):  # trap 29
    stopped_at(tmp_path, 4)
    with pytest.raises(UserError, match="lr: 0.01 -> 0.02"): trained(tmp_path, replace(TRAIN, lr=.02))
    with pytest.raises(UserError, match="model: "): fit(Llama(replace(SMALL, dim=32)), Toy(), next_token_loss, TRAIN, tmp_path)
    trained(tmp_path, replace(TRAIN, log_every=2, checkpoint_every=5, keep=1))  # these change no weight

def test_the_precision_of_the_start_is_kept(tmp_path, monkeypatch):
    cfg = replace(TRAIN, dtype="auto")
    monkeypatch.setenv("LLAMA2_DTYPE", "bfloat16")
    whole = trained(cfg=cfg)[0]
    with pytest.raises(KeyboardInterrupt): trained(tmp_path, cfg, on_step=lambda s, r: signal.raise_signal(signal.SIGINT) if s == 4 else None)
    monkeypatch.setenv("LLAMA2_DTYPE", "float32")
    assert same(trained(tmp_path, cfg)[0], whole)

def test_old_checkpoints_go(tmp_path):
    trained(tmp_path, replace(TRAIN, checkpoint_every=1, keep=3))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-0000000{i}.{e}" for i in (6, 7, 8) for e in ("json", "pt")]

def test_checkpoints_hold_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return print, ("code ran",)
    save_checkpoint(tmp_path, 1, dict(x=Evil()), {})
    with pytest.raises(Exception, match="[Ww]eights"): load_checkpoint(tmp_path, {})

# ---- speed, log

def test_mfu_is_what_its_formula_says(monkeypatch):  # trap 30
    monkeypatch.setattr(longrun, "peak_flops", lambda device, dtype: 1e12)
    clock = [0.]
    monkeypatch.setattr(longrun.time, "perf_counter", lambda: clock[0])
    speed = Speedometer(Llama(SMALL), torch.float32, world_size=2)
    speed.add(dict(tokens=torch.zeros(6, 12)))
    clock[0] = 2.
    row = speed.read()
    matrices = sum(p.numel() for n, p in Llama(SMALL).named_parameters() if p.dim() == 2 and "tok_emb" not in n)
    flops = 6 * matrices + 6 * SMALL.n_layers * 12 * SMALL.dim
    assert row["tokens_per_s"] == 2 * 72 / 2 and row["mfu"] == pytest.approx(flops * 72 / 2e12)

def test_peaks_are_those_of_dense_bf16(monkeypatch):  # trap 30
    for name, peak in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        longrun.peak_flops.cache_clear()
        assert longrun.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    longrun.peak_flops.cache_clear()

def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"): trained(tmp_path, replace(TRAIN, tensorboard=True))
    got = []
    writer = lambda folder, purge_step: SimpleNamespace(add_scalar=lambda k, v, step: got.append((k, step)), close=lambda: got.append("closed"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    trained(tmp_path, replace(TRAIN, tensorboard=True))
    assert ("loss", 8) in got and ("lr", 1) in got and got[-1] == "closed"

def test_seeds_are_independent():  # trap 28
    seeds = {derive_seed(s, p, r) for s in range(20) for p in ("init", "data", "noise") for r in range(4)}
    assert len(seeds) == 240
    model = new_model()
    before = torch.rand(3)
    fit(model, Toy(), next_token_loss, TRAIN); a = torch.rand(3)
    fit(model, Toy(), next_token_loss, replace(TRAIN, seed=1)); b = torch.rand(3)
    assert not torch.equal(a, b) and not torch.equal(a, before)

# ---- two processes

def two_ranks(rank:int, folder:str) -> None:
    "What each of two processes runs: the same training as one process, on its part of the rows."
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = new_model()
    rows = fit(model, Toy(), next_token_loss, TRAIN, Path(folder) / "run", parallel=Copies())
    torch.save(dict(loss=[r["loss"] for r in rows], model=model.state_dict(), noise=torch.rand(3)), f"{folder}/{rank}.pt")
    dist.barrier(); dist.destroy_process_group()

def test_two_processes_train_like_one(tmp_path):  # traps 18, 28
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_training as t; t.two_ranks(int(sys.argv[1]), sys.argv[2])"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(r), str(tmp_path)], stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    errors = [p.communicate(timeout=120)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors
    model, rows = trained()
    got = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    for g in got:
        assert g["loss"] == pytest.approx([r["loss"] for r in rows], rel=1e-5)
        for k, v in model.state_dict().items(): torch.testing.assert_close(g["model"][k], v, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(got[0]["model"][k], got[1]["model"][k]) for k in got[0]["model"])
    assert not torch.equal(got[0]["noise"], got[1]["noise"]), "ranks must not share their noise"
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 8, "only rank 0 writes"
    again, more = trained(tmp_path / "run", replace(TRAIN))  # another world size goes on from the same checkpoint
    assert len(more) == 8

# ---- the stage

@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    rows = [dict(text=f"Document {i} says hello to number {i * 7 % 13}.", source="abc"[i % 3]) for i in range(90)]
    write_jsonl(folder / "pretrain.jsonl", rows)
    tok = Tokenizer.train([r["text"] for r in rows], 290, folder / "tokenizer.model")
    tokenize_corpus(tok, folder, folder / "shards", .1)
    return dict(tokenizer=folder, shards=folder / "shards")

STAGE = PretrainConfig(model="nano", batch_size=4, seq_len=32, weights={"a": .5, "b": .3, "c": .2}, eval_every=2, eval_batches=1,
                       train=TrainConfig(steps=4, lr=3e-3, warmup=1, dtype="float32", checkpoint_every=2))

def test_stage(artefacts, tmp_path):
    summary = pretrain(STAGE, tmp_path, artefacts)
    model, tok = load(tmp_path)
    assert model.cfg.vocab_size == tok.vocab_size == 290 and summary["params"] == model.cfg.n_params() and summary["tokens"] == 4 * 4 * 32
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "valid_loss" in r] == [2, 4] and summary["valid_loss"] == rows[-1]["valid_loss"]

def test_stage_refuses_another_tokenizer(artefacts, tmp_path):
    Tokenizer.train(["some other text with enough letters to learn from"] * 3, 300, tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="vocabulary of 290, the tokenizer has 300"): pretrain(STAGE, tmp_path / "out", artefacts | dict(tokenizer=tmp_path))

def test_stage_refuses_unknown_sources(artefacts, tmp_path):
    with pytest.raises(UserError, match="weights name z"): pretrain(replace(STAGE, weights={"z": 1.}), tmp_path, artefacts)
    with pytest.raises(UserError, match="no model preset 'huge'"): pretrain(replace(STAGE, model="huge"), tmp_path, artefacts)

def test_train_step_counts():
    run = Run(new_model(), TRAIN, None)
    assert train_step(run, Toy()[0], next_token_loss)["targets"] == Toy()[0]["mask"].sum() and run.step == 1
