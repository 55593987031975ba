"A training run, and every stage of the pipeline, is killed at random moments and must end with the same files, bit for bit (traps 29, 55)."
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import QUICK, small_data  # noqa: F401 (a fixture)

from llama2_nbdev.artifacts import needed_order
from llama2_nbdev.core import read_json, read_jsonl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.pipeline import workspace
from llama2_nbdev.pretraining.longrun import sha256
from llama2_nbdev.pretraining.scaling import distributed
from llama2_nbdev.pretraining.training import TrainConfig, fit, next_token_loss

STEPS = 60
TRIALS = []  # of this session: (what, processes, kills, kills after a checkpoint, torn checkpoints, whether something differed)
FORKS = multiprocessing.get_context("forkserver")  # imports torch once; a child is ready in milliseconds
FORKS.set_forkserver_preload(["llama2_nbdev.pipeline"])

class Toy:
    "Rows that depend on the step alone."
    batch_size = 4
    def __getitem__(self, step):
        ids = torch.randint(1, 64, (4, 17), generator=torch.Generator().manual_seed(step))
        return dict(tokens=ids[:, :-1], targets=ids[:, 1:], mask=ids[:, 1:] > 10)

def noisy_loss(model, batch):
    "All three random generators take part, so that a forgotten one shows."
    s, n = next_token_loss(model, batch)
    return s * (1 + .1 * torch.rand(()) + .1 * random.random() + .1 * np.random.rand()), n

def train(out:Path, pause:float=0.) -> Llama:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Llama(ModelConfig(32, 2, 4, 2, vocab_size=64, multiple_of=32, max_seq_len=16))
    cfg = TrainConfig(steps=STEPS, lr=1e-2, warmup=5, dtype="float32", checkpoint_every=3)
    fit(model, Toy(), noisy_loss, cfg, out, on_step=lambda step, row: time.sleep(pause))
    return model

def train_aloud(out:Path) -> None:
    "What a child process does; what Ctrl-C made it say is kept."
    try: train(out, .02)
    except KeyboardInterrupt as e: (out / "said").write_text(str(e))

def rows(out:Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0

def kill_at(out:Path, step:int, how:signal.Signals, rng:random.Random) -> int:
    "Start the run, send a signal soon after `step`, return the exit code."
    run, deadline = FORKS.Process(target=train_aloud, args=(out,)), time.time() + 60
    run.start()
    while run.exitcode is None and rows(out) < step and time.time() < deadline: time.sleep(.002)
    time.sleep(.03 * rng.random())
    os.kill(run.pid, how)
    run.join(60)
    return run.exitcode

def tear(folder:Path) -> int:
    "Cut the newest checkpoint of each run under a folder that has an older one, as a power cut may do; returns how many."
    runs = {f.parent for f in folder.rglob("step-*.pt")}
    newest = [sorted(run.glob("step-*.json"))[-1].with_suffix(".pt") for run in runs if len(list(run.glob("step-*.json"))) > 1]
    for file in newest: file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
    return len(newest)

def check(out:Path, reference:Path) -> None:
    "Same weights, same averages, same log, no step twice or missing."
    a, b = (torch.load(f / f"checkpoints/step-{STEPS:08d}.pt", weights_only=True) for f in (out, reference))
    for k in a["model"]: assert torch.equal(a["model"][k], b["model"][k]), k
    for i, s in a["optimizer"]["state"].items():
        for k in s: assert torch.equal(s[k], b["optimizer"]["state"][i][k]), k
    log, wanted = ([json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, reference))
    assert [r["step"] for r in log] == list(range(1, STEPS + 1))
    assert [(r["loss"], r["lr"], r["grad_norm"]) for r in log] == [(r["loss"], r["lr"], r["grad_norm"]) for r in wanted]

def rounds(tmp_path:Path, kills:int, seed:int) -> None:
    rng, threads, torn = random.Random(seed), torch.get_num_threads(), 0
    try: train(tmp_path / "whole")
    finally: torch.set_num_threads(threads)
    out, codes = tmp_path / "killed", []
    for i, step in enumerate(sorted(rng.sample(range(2, STEPS - 5), kills))):
        codes.append(kill_at(out, step, signal.SIGINT if i == 1 else signal.SIGKILL, rng))
        if i == kills - 1: torn = tear(out)
    assert codes.count(-signal.SIGKILL) == kills - 1, f"the runs ended before they were killed: {codes}"
    assert "run the same again to go on" in (out / "said").read_text()
    last = FORKS.Process(target=train, args=(out,))
    last.start(), last.join(60)
    assert last.exitcode == 0
    TRIALS.append(trial := ["a toy run", 1, kills - 1, kills - 1, torn, True])
    check(out, tmp_path / "whole")
    trial[-1] = False

def test_killed_runs_end_with_the_same_weights(tmp_path): rounds(tmp_path, kills=3, seed=0)

@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_kills(tmp_path, seed): rounds(tmp_path, kills=8, seed=seed)

def test_the_check_sees_a_difference(tmp_path):
    "Planted: a run whose random generators were not restored."
    from unittest.mock import patch
    threads = torch.get_num_threads()
    try:
        train(tmp_path / "whole")
        stop = lambda step, row: (_ for _ in ()).throw(RuntimeError) if step == 31 else None
        with patch("time.sleep", lambda s: stop(rows(tmp_path / "broken") + 1, None)), pytest.raises(RuntimeError): train(tmp_path / "broken")
        with patch("llama2_nbdev.pretraining.training.set_rng"): train(tmp_path / "broken")
    finally: torch.set_num_threads(threads)
    assert sha256(tmp_path / f"broken/checkpoints/step-{STEPS:08d}.pt")
    with pytest.raises(AssertionError): check(tmp_path / "broken", tmp_path / "whole")

# ---- every stage of the pipeline

TRAINED = ("pretrain", "sft", "unguarded", "reward", "v1", "v2", "v3", "obedience", "v4", "v5", "ppo")  # also on two processes
STAGES = ("tokenizer", "shards", "preferences", "gatt", "rate", "evaluate", *TRAINED)
QUICKLY = (("pretrain", 1), ("sft", 1), ("reward", 1), ("sft", 2))  # with the toy run five trials; the others only in the long test
OFTEN = [f"{k}.checkpoint_every=3" for k in ("pretrain.train", "sft.train", "unguarded.sft.train", "reward.helpfulness.train", "reward.safety.train",
                                             "obedience.short.train", "obedience.long.train", "v2.helpfulness.train", "v2.safety.train")]
SETTINGS = (*QUICK, *OFTEN, "unguarded.sft.public_epochs=0", "unguarded.sft.epochs=1", "ppo.ppo.checkpoint_every=1", "ppo.ppo.iterations=5",
            "ppo.ppo.dev_every=2", "ppo.ppo.critic_warmup=1")
TIMES = {"seconds", "generating", "tokens_per_s", "mfu"}

def make(stage:str, data:Path, root:Path, rank:int, world:int, port:int) -> None:
    "What a child process does: alone, or as one of several that `torchrun` would start."
    os.setsid()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "checkpoint .* is damaged")
    os.environ |= dict(LLAMA2_DTYPE="float32", LLAMA2_DEVICE="cpu")  # a probe might choose differently the next time
    if world > 1: os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    with distributed(minutes=2) if world > 1 else nullcontext(): workspace("nano", data, root, SETTINGS).get(stage)

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]

def killed(stage:str, data:Path, root:Path, world:int, when) -> bool:
    "Make a stage in other processes and kill them one after the other as soon as `when()` says so; False: it was done before."
    port = free_port()
    children = [FORKS.Process(target=make, args=(stage, data, root, rank, world, port)) for rank in range(world)]
    for child in children: child.start()
    while all(c.exitcode is None for c in children) and not when(): children[0].join(.005)
    if early := [c for c in children if c.exitcode is None and when()]:
        random.shuffle(early)
        for child in early:
            try: os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError: child.kill()  # it had no group of its own yet
            child.join(.02)
    for child in children: child.join(60)
    codes = [c.exitcode for c in children]
    assert -signal.SIGKILL in codes or not any(codes), f"{stage} failed with {codes}; the error stands above"
    return any(codes)

def timeless(value):
    "A JSON value without what a clock says."
    if isinstance(value, list): return [timeless(v) for v in value]
    return {k: timeless(v) for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value

def content(folder:Path) -> dict:
    "All that a stage leaves, but for checkpoints, clocks and sizes of files."
    read = {".json": read_json, ".jsonl": lambda p: read_jsonl(p, allow_empty=True)}
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "done" and "checkpoints" not in p.parts]
    return {p.relative_to(folder).as_posix(): timeless(read[p.suffix](p)) if p.suffix in read else sha256(p) for p in files}

def progress(folder:Path) -> int:
    "Lines of all logs of a stage so far."
    return sum(f.read_bytes().count(b"\n") for f in folder.rglob("metrics.jsonl"))

@dataclass
class Undisturbed:
    "Stages that nobody killed, made when they are asked for, each in processes of its own."
    data:Path
    root:Path  # of those of one process
    seconds:dict[str, float] = field(default_factory=dict)

    def folder(self, stage:str) -> Path:
        for name in needed_order(stage, ["data"]):
            if name in self.seconds or name == "data": continue
            began = time.monotonic()
            assert not killed(name, self.data, self.root, 1, lambda: False)
            self.seconds[name] = time.monotonic() - began
        return next(self.root.glob(f"nano/{stage}-*"))

    def beside(self, stage:str, root:Path) -> Path:
        "Another root in which all that a stage needs is there; returns where the stage will be."
        mine = self.folder(stage)
        (root / "nano").mkdir(parents=True)
        for other in self.root.glob("nano/*-*"):
            if other != mine: (root / "nano" / other.name).symlink_to(other)
        return root / "nano" / mine.name

@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):  # noqa: F811
    return Undisturbed(small_data, tmp_path_factory.mktemp("whole"))

def moment(out:Path, rng:random.Random, seconds:float, lines:int):
    "A random moment in a stage: after some time, or after some lines of its logs and a little more."
    at, line, pause = time.monotonic() + rng.uniform(.05, .95) * seconds, rng.randint(1, max(1, lines - 1)), rng.uniform(0, .05)
    if rng.random() < .3 or not lines: return lambda: time.monotonic() > at
    return lambda: progress(out) >= line and (time.sleep(pause) or True)

def trial(stage:str, world:int, whole:Undisturbed, wanted:Path, root:Path, kills:int, seed:int) -> None:
    "Kill a stage so many times, tear a checkpoint once, and compare what it leaves in the end with the undisturbed one."
    rng, out, done, saved, torn = random.Random(f"{stage} {world} {seed}"), whole.beside(stage, root), 0, 0, 0
    lines, tries = progress(wanted), 0
    while done < kills and (tries := tries + 1) < 20:
        began = time.monotonic()
        if not killed(stage, whole.data, root, world, moment(out, rng, whole.seconds[stage], lines)):
            whole.seconds[stage] = time.monotonic() - began  # faster than the first time
            shutil.rmtree(out)
        elif out.is_dir():
            done, saved = done + 1, saved + any(out.rglob("step-*.json"))
            if not torn: torn = tear(out)
    assert done == kills and not killed(stage, whole.data, root, world, lambda: False)
    TRIALS.append([stage, world, done, saved, torn, differs := content(out) != content(wanted)])
    assert not differs

def trials(stage:str, world:int, whole:Undisturbed, tmp_path:Path, n:int, kills:int) -> None:
    wanted = whole.folder(stage)
    if world > 1:
        wanted = whole.beside(stage, tmp_path / "together")
        assert not killed(stage, whole.data, tmp_path / "together", world, lambda: False)
    for seed in range(n): trial(stage, world, whole, wanted, tmp_path / f"killed {seed}", kills, seed)

@pytest.mark.parametrize("stage, world", QUICKLY)
def test_a_killed_stage_ends_with_the_same_bits(whole, tmp_path, stage, world): trials(stage, world, whole, tmp_path, 1, 1)  # traps 29, 55

@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_many_kills_of_a_stage(whole, tmp_path, stage): trials(stage, 1, whole, tmp_path, 2, 3)  # traps 29, 55

@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_many_kills_of_a_stage_on_two_processes(whole, tmp_path, stage): trials(stage, 2, whole, tmp_path, 2, 2)  # traps 29, 55

def test_the_count(record_property):
    "What was tried, for the last lines of the run."
    kills, saved, torn, differences = (sum(t[i] for t in TRIALS) for i in (2, 3, 4, 5))
    together = sum(t[1] > 1 for t in TRIALS)
    record_property("summary", f"kill and resume: trials: {len(TRIALS)} ({together} on two processes), kills: {kills} ({saved} after a "
                               f"checkpoint), torn checkpoints: {torn}, differences: {differences}")
    assert differences == 0
    if {t[0] for t in TRIALS} > set(STAGES): assert len(TRIALS) >= 50 and torn > 5  # the long test
