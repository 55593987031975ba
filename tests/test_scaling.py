"Several processes: the same losses, checkpoints that change hands, weights read in slices, generation that gathers once."
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.model.generate import generate
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.weights import load, save, save_hf, save_meta
from llama2_nbdev.pretraining.scaling import (ParallelConfig, Ranks, distributed, gathered, make_mesh, parallelize, recompute,
                                              split_products, torchrun)
from llama2_nbdev.pretraining.sharded import SavingRanks, consolidate, is_whole, load_sharded, local_slices, new_sharded, open_weights
from llama2_nbdev.pretraining.training import Run, TrainConfig, evaluate_loss, fit, next_token_loss, set_gradients

SMALL = ModelConfig(32, 2, 4, 2, vocab_size=64, multiple_of=16, max_seq_len=32)
TRAIN = TrainConfig(steps=20, lr=1e-2, warmup=2, dtype="float32", checkpoint_every=4)
RELAY = replace(TRAIN, steps=9)
LAYOUTS = {2: {"selective": dict(checkpointing="selective")},
           4: {"fsdp": {}, "two_by_two": dict(tensor=2, checkpointing="full"), "replicas": dict(replicate=2)}}

class Toy:
    "Eight rows of random tokens with very uneven masks; a function of the step."
    batch_size = 8
    def __init__(self, part=slice(None)): self.part = part
    def __getitem__(self, step):
        ids = torch.randint(1, 64, (8, 13), generator=torch.Generator().manual_seed(step))
        counts = torch.tensor([12, 1, 5, 0, 9, 2, 12, 3]).roll(step)
        batch = dict(tokens=ids[:, :-1], targets=ids[:, 1:], mask=torch.arange(12) < counts[:, None])
        return {k: v[self.part] for k, v in batch.items()}
    def slice(self, rank, world): return Toy(slice(8 * rank // world, 8 * (rank + 1) // world))

class Gathers(TorchDispatchMode):
    "Counts messages that gather weights."
    n = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += str(op).startswith(("c10d.allgather", "c10d._allgather", "_c10d_functional.all_gather"))
        return op(*args, **(kwargs or {}))

def new_model(seed=0):
    torch.manual_seed(seed)
    return Llama(SMALL)

def trained(layout, steps=TRAIN.steps, change=lambda model: None, cfg=TRAIN, validate=False):
    "With `validate`, passes without gradients come before and between the steps."
    mesh = make_mesh(layout)
    change(model := parallelize(new_model(), mesh, layout))
    look = lambda step=0, row=None: {"valid": evaluate_loss(model, Toy(), 1)} if validate else None
    look()
    return model, fit(model, Toy(), next_token_loss, replace(cfg, steps=steps), parallel=Ranks(mesh), on_step=look)

def restored(layout, out, seed=5):
    mesh = make_mesh(layout)
    return Run(new_sharded(SMALL, mesh, layout, seed), RELAY, out, parallel=SavingRanks(mesh))

def digest(run):
    "Step, and a digest of every weight and average."
    averages = [run.optimizer.state[p][k] for p in run.model.parameters() for k in ("exp_avg", "exp_avg_sq")]
    raw = b"".join(t.detach().full_tensor().numpy().tobytes() for t in (*run.model.parameters(), *averages))
    return [run.step, hashlib.sha256(raw).hexdigest()]

# ---- what the processes do; each function is called on all of them and returns JSON values

def losses(folder, world):
    keys = ("loss", "grad_norm", "targets")
    rows = {name: trained(ParallelConfig(**layout))[1] for name, layout in LAYOUTS[world].items()}
    if world == 2: rows["micro"] = trained(ParallelConfig(), cfg=replace(TRAIN, micro_batch=2), validate=True)[1]
    return {name: [[r[k] for k in keys] for r in curve] for name, curve in rows.items()}

def default_mean(folder, world):
    def change(model):
        for m in model.modules():
            if isinstance(m, FSDPModule): m.set_gradient_divide_factor(float(world))
    return [r["grad_norm"] for r in trained(ParallelConfig(), 2, change)[1]]

def uneven(folder, world):
    "Five rows and three, two at a time."
    class Uneven(Toy):
        def slice(self, rank, world): return Toy([slice(5), slice(5, 8)][rank])
    mesh = make_mesh(layout := ParallelConfig())
    try: fit(parallelize(new_model(), mesh, layout), Uneven(), next_token_loss, replace(TRAIN, micro_batch=2), parallel=Ranks(mesh))
    except UserError as e: return str(e)

def bf16(folder, world):
    model, rows = trained(ParallelConfig(dtype="bfloat16", tensor=world // 2), 5, cfg=replace(TRAIN, dtype="bfloat16"))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return [r["loss"] for r in rows]

def sampling(folder, world):
    layout = ParallelConfig(tensor=world // 2)
    mesh = make_mesh(layout)
    model = parallelize(new_model(), mesh, layout)
    found = []
    for _ in range(2):  # after an update, the new weights are gathered
        with Gathers() as once, gathered(model) as plain: answers = generate(plain, [[1, 2, 3], [4, 5]], 9, seed=0)
        assert plain.output.weight.is_meta and all(isinstance(p, DTensor) for p in model.parameters())
        found.append([once.n, [[a.tokens, a.logprobs] for a in answers]])
        fit(model, Toy(), next_token_loss, replace(TRAIN, steps=1, warmup=0), parallel=Ranks(mesh))
    with Gathers() as each, torch.no_grad():
        for n in range(9): model(torch.ones(1, 3 + n, dtype=torch.long))
    return found + [each.n]

def policy_loss(model, batch):
    "As PPO reads a policy: activations first, then logits of some of them."
    logits = model.output(model.hidden(batch["tokens"])[batch["mask"]]).float()
    return -logits.log_softmax(-1).gather(-1, batch["targets"][batch["mask"]][:, None]).sum(), batch["mask"].sum()

def value_loss(model, batch):
    return (model.values(batch["tokens"])[batch["mask"]] - 1).square().sum(), batch["mask"].sum()

def new_critic():
    torch.manual_seed(1)
    return RewardModel(Llama(SMALL))

def other_methods(folder, world):
    cfg, mesh = replace(TRAIN, steps=4), make_mesh(layout := ParallelConfig())
    pairs = (new_model, policy_loss, "hidden"), (new_critic, value_loss, "values")
    return [[r["loss"] for r in fit(parallelize(make(), mesh, layout, (name,)), Toy(), loss, cfg, parallel=Ranks(mesh))] for make, loss, name in pairs]

def compiled(folder, world):
    "Slow: each process compiles."
    return [r["loss"] for r in trained(ParallelConfig(compile=True, checkpointing="selective"), 4)[1]]

def begin(folder, world):
    "Train until one process is asked to stop; say what was saved."
    def press(step, row):
        if step == 6 and dist.get_rank() == 1: os.kill(os.getpid(), signal.SIGTERM)
    run = restored(ParallelConfig(), folder / "run", seed=0)
    try: fit(run.model, Toy(), next_token_loss, RELAY, folder / "run", on_step=press, parallel=run.parallel)
    except KeyboardInterrupt as e: message = str(e)
    return [message, digest(restored(ParallelConfig(), folder / "run"))]

def go_on(folder, world):
    run = restored(layout := ParallelConfig(tensor=2), folder / "run")
    read = digest(run)
    fit(run.model, Toy(), next_token_loss, RELAY, folder / "run", parallel=run.parallel)
    return [read, digest(restored(layout, folder / "run"))]

def slices(folder, world):
    "Which weights differ from those that `load` gives?"
    wrong = []
    for layout in (ParallelConfig(), ParallelConfig(tensor=2)):
        for kind in ("own", "hf", "meta"):
            model, plain = load_sharded(folder / kind, make_mesh(layout), layout), load(folder / kind)[0]
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                if not torch.equal(p.full_tensor(), q) or not torch.equal(p.to_local(), q[local_slices(p)]): wrong.append([kind, str(layout), name])
    born = new_sharded(SMALL, make_mesh(layout := ParallelConfig(tensor=2)), layout, seed=3)
    alone = Llama(SMALL)
    alone.init_weights(generator=torch.Generator().manual_seed(3))
    return wrong + [name for (name, p), q in zip(born.named_parameters(), alone.parameters()) if not torch.equal(p.full_tensor(), q)]

# ---- starting them

def forked(world, folder, names):
    "Fork `world` processes, which import nothing again; each does the named work, and the first writes what came out."
    torch.set_num_threads(1)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(world))
    children = []
    for rank in range(world):
        if not (pid := os.fork()):
            try:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
                warnings.filterwarnings("ignore", "FSDP2-wrapped module")
                with distributed(minutes=1):
                    for name in names:
                        found = globals()[name](Path(folder), world)
                        if rank == 0: (Path(folder) / f"{name}-{world}.json").write_text(json.dumps(found))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(pid)
    while children:  # one that fails ends all
        pid, status = os.wait()
        children.remove(pid)
        if status:
            for other in children: os.kill(other, signal.SIGKILL)
            sys.exit(1)

def on_ranks(world, folder, *names, timeout=100):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_scaling as t; t.forked({world}, {str(folder)!r}, {names!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: printed = child.communicate(timeout=timeout)[0]
    finally:
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    assert child.returncode == 0, printed[-4000:]
    return {name: json.loads((folder / f"{name}-{world}.json").read_text()) for name in names}

@pytest.fixture(scope="module")
def done(tmp_path_factory, one_thread):
    "What two, then four processes found; the second read what the first wrote."
    folder = tmp_path_factory.mktemp("ranks")
    model = new_model()
    save(model, None, folder / "own"); save_hf(model, None, folder / "hf", max_shard_bytes=20_000); save_meta(model, None, folder / "meta", n_shards=2)
    two = on_ranks(2, folder, "losses", "default_mean", "uneven", "sampling", "other_methods", "begin")
    return {"folder": folder, 2: two, 4: on_ranks(4, folder, "losses", "bf16", "sampling", "go_on", "slices")}

@pytest.fixture(scope="module")
def alone():
    "A world of one, in this process."
    with distributed() as device: yield device

@pytest.fixture(scope="module")
def plain(one_thread):
    model = new_model()
    return model, fit(model, Toy(), next_token_loss, TRAIN)

# ---- the same training

@pytest.mark.parametrize("world", [2, 4])
def test_losses_are_those_of_one_process(done, plain, world):  # trap 18: 20 steps, fp32, within 1e-5
    for name, curve in done[world]["losses"].items():
        for (loss, norm, targets), row in zip(curve, plain[1], strict=True):
            assert abs(loss - row["loss"]) < 1e-5 and abs(norm - row["grad_norm"]) < 1e-4 and targets == row["targets"], (name, row["step"])

def test_the_world_of_one_changes_nothing(alone, plain):
    model, rows = trained(ParallelConfig(), 6, cfg=replace(TRAIN))
    assert [r["loss"] for r in rows][:1] == [r["loss"] for r in plain[1]][:1]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain[0].named_parameters()]

def test_the_default_mean_would_be_seen(done, plain):  # trap 18: the planted bug
    assert done[2]["default_mean"][0] == pytest.approx(plain[1][0]["grad_norm"] / 2, rel=1e-4)

def test_uneven_micro_batches_are_refused_before_anybody_waits(done):
    assert "would make [3, 2] forward passes" in done[2]["uneven"]

def test_bf16_follows_fp32(done):  # two by two
    rows = fit(new_model(), Toy(), next_token_loss, replace(TRAIN, steps=5))
    assert 0 < max(abs(a - b["loss"]) for a, b in zip(done[4]["bf16"], rows, strict=True)) < .05

@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputing_changes_no_bit(how, one_thread):
    a, b = new_model(), new_model()
    for block in b.layers: recompute(block, how)
    for model in (a, b): set_gradients(model, Toy()[0], next_token_loss)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters()))

def test_policies_and_critics_train_the_same(done):  # they are not asked for `forward`
    cfg = replace(TRAIN, steps=4)
    for found, make, loss in zip(done[2]["other_methods"], (new_model, new_critic), (policy_loss, value_loss)):
        assert found == pytest.approx([r["loss"] for r in fit(make(), Toy(), loss, cfg)], abs=1e-5)

def test_all_blocks_share_one_compilation(alone, one_thread, monkeypatch):
    compilations, compile = [], torch.compile
    def backend(graph, _): return compilations.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=backend))
    torch._dynamo.reset()
    mesh = make_mesh(layout := ParallelConfig(checkpointing="selective", compile=True))
    parallelize(Llama(replace(SMALL, n_layers=10)), mesh, layout)(torch.ones(2, 8, dtype=torch.long)).sum().backward()
    assert len(compilations) == 1

@pytest.mark.slow
def test_compiled_blocks(tmp_path, one_thread):  # sharded, with recomputation
    rows = fit(new_model(), Toy(), next_token_loss, replace(TRAIN, steps=4))
    assert on_ranks(2, tmp_path, "compiled", timeout=300)["compiled"] == pytest.approx([r["loss"] for r in rows], abs=1e-4)

@pytest.mark.parametrize("bad", [dict(tensor=0), dict(shard=0), dict(shard=-2), dict(checkpointing="half"), dict(dtype="fp8"), dict(tensor=2, compile=True)])
def test_bad_layouts(bad):
    with pytest.raises(UserError): ParallelConfig(**bad)

def test_layouts_that_do_not_fit(alone):
    for bad in (dict(tensor=2), dict(replicate=3), dict(shard=4)):
        with pytest.raises(UserError, match="does not make 1 processes"): make_mesh(ParallelConfig(**bad))
    class Three:
        def size(self): return 3
    with pytest.raises(UserError, match=r"key-value heads \(2\)"): split_products(new_model(), Three())
    with pytest.raises(UserError, match="tied"): split_products(Llama(replace(SMALL, tie_embeddings=True)), make_mesh(ParallelConfig())["tensor"])

# ---- generation

@pytest.mark.parametrize("world", [2, 4])
def test_generation_gathers_once_and_is_that_of_one_process(done, world):  # trap 56
    first, second, each = done[world]["sampling"]
    # with tensor parallel the embeddings and the seven matrices of each block are gathered over its processes, too
    assert first[0] == second[0] == SMALL.n_layers + 2 + (0 if world == 2 else 2 + 7 * SMALL.n_layers)
    assert each >= 9 * SMALL.n_layers
    model = new_model()
    for (_, answers) in (first, second):
        wanted = generate(model, [[1, 2, 3], [4, 5]], 9, seed=0)
        assert [a[0] for a in answers] == [w.tokens for w in wanted]
        for a, w in zip(answers, wanted): assert a[1] == pytest.approx(w.logprobs, abs=1e-4)
        fit(model, Toy(), next_token_loss, replace(TRAIN, steps=1, warmup=0))

def test_after_the_phase_the_plain_model_is_empty(alone):
    layout = ParallelConfig()
    model = parallelize(new_model(), make_mesh(layout), layout)
    with gathered(model) as inside: before = inside(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(Exception): inside(torch.ones(1, 3, dtype=torch.long)).sum().item()
    assert torch.equal(model(torch.ones(1, 3, dtype=torch.long)), before)

# ---- checkpoints

def test_everyone_stops_at_the_same_step(done):  # SIGTERM came to one of two
    message, (step, _) = done[2]["begin"]
    assert message.startswith("stopped after step 6 of 9. Saved in") and step == 6

def test_checkpoints_change_hands(done, alone, plain):  # written on 2, read on 4 (two by two), then on 1
    read, wrote = done[4]["go_on"]
    assert read == done[2]["begin"][1]
    run = restored(ParallelConfig(), done["folder"] / "run")
    assert digest(run) == wrote and run.step == 9
    rows = [json.loads(line) for line in (done["folder"] / "run/metrics.jsonl").read_text().splitlines()]
    mesh = make_mesh(layout := ParallelConfig())
    whole = fit(new_sharded(SMALL, mesh, layout, 0), Toy(), next_token_loss, RELAY)
    assert [r["step"] for r in rows] == list(range(1, 10)), "one process wrote the log, each step once"
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in whole], abs=1e-5)
    assert len(list((done["folder"] / "run/checkpoints").iterdir())) == 2, "old ones go"

def test_one_file(done, alone, tmp_path):
    newest = sorted((done["folder"] / "run/checkpoints").iterdir())[-1]
    consolidate(newest, tmp_path / "one")
    run, (model, _) = restored(ParallelConfig(), done["folder"] / "run"), load(tmp_path / "one")
    assert model.cfg == SMALL and all(torch.equal(p.full_tensor(), q) for p, q in zip(run.model.parameters(), model.parameters(), strict=True))

def alone_run(out, steps=9, stop=None):
    cfg = replace(TRAIN, steps=9, checkpoint_every=3)
    mesh = make_mesh(layout := ParallelConfig())
    model, ranks = new_sharded(SMALL, mesh, layout, 0), SavingRanks(mesh)
    def cut(step, row):
        if step == stop: raise RuntimeError("power cut")
    try: fit(model, Toy(), next_token_loss, cfg, out, on_step=cut, parallel=ranks)
    except RuntimeError: ranks.pending.result()
    return model

def same(a, b): return all(torch.equal(p.full_tensor(), q.full_tensor()) for p, q in zip(a.parameters(), b.parameters(), strict=True))

@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "note", "no note"])
def test_a_damaged_checkpoint_is_skipped(alone, one_thread, tmp_path, damage):
    whole = alone_run(tmp_path / "whole")
    alone_run(tmp_path / "run", stop=8)
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    data, note = next(newest.glob("__0_*")), next(newest.glob("sealed-*"))
    raw = data.read_bytes()
    if damage == "cut": data.write_bytes(raw[:len(raw) // 2])
    if damage == "flip": data.write_bytes(raw[:3000] + bytes([raw[3000] ^ 1]) + raw[3001:])
    if damage == "gone": data.unlink()
    if damage == "note": note.write_text('{"files": {"__0')
    if damage == "no note": note.unlink()
    with pytest.warns(UserWarning, match="step-00000006 is damaged"): assert same(alone_run(tmp_path / "run"), whole)
    assert all(map(is_whole, (tmp_path / "run/checkpoints").glob("step-*"))), "it was written again"

def test_all_damaged_and_changed_runs(alone, one_thread, tmp_path):
    alone_run(tmp_path, stop=8)
    mesh = make_mesh(layout := ParallelConfig())
    model = new_sharded(SMALL, mesh, layout, 0)
    with pytest.raises(UserError, match="lr: 0.01 -> 0.02"): Run(model, replace(TRAIN, steps=9, lr=.02), tmp_path, parallel=SavingRanks(mesh))
    for note in tmp_path.glob("checkpoints/*/sealed-*"): note.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="all 2 checkpoints"): alone_run(tmp_path)

def test_plain_and_sharded_runs_are_not_mixed(alone, one_thread, tmp_path):
    cfg = replace(TRAIN, steps=3, checkpoint_every=3)
    mesh = make_mesh(layout := ParallelConfig())
    sharded = lambda out: fit(new_sharded(SMALL, mesh, layout, 0), Toy(), next_token_loss, cfg, out, parallel=SavingRanks(mesh))
    plain = lambda out: fit(new_model(), Toy(), next_token_loss, cfg, out)
    plain(tmp_path / "plain"), sharded(tmp_path / "sharded")
    with pytest.raises(UserError, match="holds checkpoints of a plain process"): sharded(tmp_path / "plain")
    with pytest.raises(UserError, match="holds sharded checkpoints"): plain(tmp_path / "sharded")

def test_saving_goes_on_while_training_does(alone, one_thread, tmp_path):
    "What is written is the state at the time of the call, not that of a later step."
    mesh = make_mesh(layout := ParallelConfig())
    run = Run(new_sharded(SMALL, mesh, layout, 0), TRAIN, tmp_path, parallel=SavingRanks(mesh))
    fit(run.model, Toy(), next_token_loss, replace(TRAIN, steps=1, warmup=0), parallel=Ranks(mesh))
    before = [p.full_tensor().clone() for p in run.model.parameters()]
    for p in run.model.parameters(): run.optimizer.state[p] = dict(step=torch.tensor(1.), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    run.save(wait=False)
    with torch.no_grad(): [p.zero_() for p in run.model.parameters()]
    run.parallel.finish(run)
    again = Run(new_sharded(SMALL, mesh, layout, 1), TRAIN, tmp_path, parallel=SavingRanks(mesh))
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(again.model.parameters(), before))

# ---- reading slices

def test_slices_are_what_load_gives(done):  # three formats, two layouts; and new weights do not depend on the layout
    assert done[4]["slices"] == []

@pytest.mark.parametrize("kind", ["own", "hf", "meta"])
def test_any_slice(done, kind):
    shape, read = open_weights(done["folder"] / kind)
    whole = dict(load(done["folder"] / kind)[0].named_parameters())
    assert shape == replace(SMALL, max_seq_len=shape.max_seq_len, multiple_of=shape.multiple_of)
    random = torch.Generator().manual_seed(0)
    for name, t in whole.items():
        for _ in range(5):
            part = tuple(slice(*sorted(torch.randint(0, n + 1, (2,), generator=random).tolist())) for n in t.shape)
            if all(p.start < p.stop for p in part): assert torch.equal(read(name, part), t[part]), (name, part)

def test_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"): open_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model that can be recognised"): open_weights(tmp_path)

# ---- torchrun

def test_a_script_that_fails_says_why(tmp_path):
    (tmp_path / "bad.py").write_text("raise ValueError('seven')")
    with pytest.raises(UserError, match="failed on 1 processes(?s:.*)ValueError: seven"): torchrun(tmp_path / "bad.py", 1)

@pytest.mark.slow
def test_a_script_that_hangs_is_ended(tmp_path):
    (tmp_path / "hang.py").write_text(f"import os, time; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid())); time.sleep(600)")
    with pytest.raises(UserError, match="did not end on 2 processes"): torchrun(tmp_path / "hang.py", 2, timeout=12)
    time.sleep(1)
    for rank in "01":
        with pytest.raises(ProcessLookupError): os.kill(int((tmp_path / rank).read_text()), 0)
