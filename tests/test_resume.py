"A training run, and every stage of the pipeline, is killed at random moments and must end with the same files, bit for bit (traps 29, 55)."
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import QUICK, small_data  # noqa: F401 (a fixture)

from llama2_nbdev.core import read_json, read_jsonl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.pipeline import workspace
from llama2_nbdev.pretraining.longrun import sha256
from llama2_nbdev.pretraining.training import TrainConfig, fit, next_token_loss

STEPS = 60

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

def start(out:Path) -> subprocess.Popen:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_resume as t; t.train(t.Path(sys.argv[1]), .02)"
    return subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE, text=True)

def rows(out:Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0

def kill_at(out:Path, step:int, how:signal.Signals, rng:random.Random) -> tuple[int, str]:
    "Start the run, send a signal soon after `step`, return the exit code and what it said."
    run, deadline = start(out), time.time() + 60
    while run.poll() is None and rows(out) < step and time.time() < deadline: time.sleep(.002)
    time.sleep(.03 * rng.random())
    run.send_signal(how)
    error = run.communicate(timeout=60)[1]
    return run.returncode, error

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
    rng, threads = random.Random(seed), torch.get_num_threads()
    try: train(tmp_path / "whole")
    finally: torch.set_num_threads(threads)
    out, codes = tmp_path / "killed", []
    for i, step in enumerate(sorted(rng.sample(range(2, STEPS - 5), kills))):
        how = signal.SIGINT if i == 1 else signal.SIGKILL
        code, error = kill_at(out, step, how, rng)
        codes.append(code)
        if how == signal.SIGINT: assert "run the same again to go on" in error, error
    assert codes.count(-signal.SIGKILL) >= 1 and 0 not in codes, f"the runs ended before they were killed: {codes}"
    last = start(out)
    assert last.wait(timeout=60) == 0, last.stderr.read()
    last.stderr.close()
    check(out, tmp_path / "whole")

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

STAGES = ("tokenizer", "shards", "pretrain", "sft", "preferences", "reward", "v1", "v2", "v3", "obedience", "gatt", "v4", "v5", "ppo", "rate")
QUICKLY = ("pretrain", "sft", "preferences", "reward", "v1", "v2", "obedience", "gatt", "ppo", "rate")  # once each; the others only in the long test
OFTEN = [f"{k}.checkpoint_every=3" for k in ("pretrain.train", "sft.train", "reward.helpfulness.train", "reward.safety.train",
                                             "obedience.short.train", "obedience.long.train", "v2.helpfulness.train", "v2.safety.train")]
SETTINGS = (*QUICK, *OFTEN, "ppo.ppo.checkpoint_every=1", "ppo.ppo.iterations=5", "ppo.ppo.dev_every=2", "ppo.ppo.critic_warmup=1")
TIMES = {"seconds", "generating", "tokens_per_s", "mfu"}
FORKS = multiprocessing.get_context("forkserver")  # imports torch once; a child is ready in milliseconds
FORKS.set_forkserver_preload(["llama2_nbdev.pipeline"])

def make(stage:str, data:Path, root:Path) -> None:
    "What a child process does."
    os.setsid()
    torch.set_num_threads(1)
    workspace("nano", data, root, SETTINGS).get(stage)

def killed(stage:str, data:Path, root:Path, after:float) -> bool:
    "Make a stage in another process and kill its whole group after some seconds; False: it was done before."
    child = FORKS.Process(target=make, args=(stage, data, root))
    child.start()
    child.join(after)
    if child.exitcode is None:
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: child.kill()  # it had no group of its own yet
        child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), f"{stage} failed; the error stands above"
    return child.exitcode != 0

def timeless(value):
    "A JSON value without what a clock says."
    if isinstance(value, list): return [timeless(v) for v in value]
    return {k: timeless(v) for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value

def content(folder:Path) -> dict:
    "All that a stage leaves, but for checkpoints, clocks and sizes of files."
    read = {".json": read_json, ".jsonl": lambda p: read_jsonl(p, allow_empty=True)}
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "done" and "checkpoints" not in p.parts]
    return {p.relative_to(folder).as_posix(): timeless(read[p.suffix](p)) if p.suffix in read else sha256(p) for p in files}

@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):  # noqa: F811
    "All stages, undisturbed, each in a process of its own: (data, root, seconds of each)."
    root, seconds = tmp_path_factory.mktemp("whole"), {}
    for stage in STAGES:
        began = time.monotonic()
        assert not killed(stage, small_data, root, 600)
        seconds[stage] = time.monotonic() - began
    return small_data, root, seconds

def kill_stage(stage:str, whole:tuple, root:Path, kills:int, earliest:float=.1) -> None:
    "Kill a stage so many times, each time somewhere in what is left of it; what it needs is the undisturbed run's."
    (data, origin, seconds), rng = whole, random.Random(f"{stage} {kills}")
    wanted = next(origin.glob(f"nano/{stage}-*"))
    (root / "nano").mkdir()
    for other in origin.glob("nano/*-*"):
        if other != wanted: (root / "nano" / other.name).symlink_to(other)
    out = root / "nano" / wanted.name
    left, with_checkpoint = kills, 0
    while left:
        if not killed(stage, data, root, rng.uniform(earliest, .95) * seconds[stage]):  # not much was left to do
            assert content(out) == content(wanted)
            shutil.rmtree(out)
        elif out.is_dir():
            left, with_checkpoint = left - 1, with_checkpoint + any(out.rglob("step-*.json"))
    assert not killed(stage, data, root, 300)
    assert content(out) == content(wanted)
    print(f"{stage}: {kills} kills, {with_checkpoint} of them after a checkpoint, no difference")

@pytest.mark.parametrize("stage", QUICKLY)
def test_a_killed_stage_ends_with_the_same_bits(whole, tmp_path, stage):  # traps 29, 55
    kill_stage(stage, whole, tmp_path, 1, .5)

@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_many_kills_of_a_stage(whole, tmp_path, stage):  # traps 29, 55
    kill_stage(stage, whole, tmp_path, 8)
