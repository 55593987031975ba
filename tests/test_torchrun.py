"""The recipe on two processes: what `torchrun -m llama2_nbdev.cli` makes, who writes it, and how it ends when one fails."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama2_nbdev import processes
from llama2_nbdev.core import UserError, read_jsonl, write_jsonl
from llama2_nbdev.model.weights import load
from llama2_nbdev.pipeline import run, workspace
from llama2_nbdev.pretraining.data import Batches
from llama2_nbdev.pretraining.longrun import MetricsLog
from llama2_nbdev.pretraining.training import Copies, OneProcess, TrainConfig, fit, set_gradients

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("pretrain.train.steps=12", "sft.public_epochs=0", "sft.batch_size=16", "evaluate.max_new_tokens=8", "report.max_new_tokens=8",
         "preferences.comparisons=20", "rate.prompts=12", *(f"v{i}.{change}" for i in range(1, 6) for change in ("prompts=6", "collect.comparisons=12")))
# The command line with one addition: after every stage, what each process wrote is compared.
CHECKED = """
import sys
import torch.distributed as dist
from llama2_nbdev import artifacts, cli
from llama2_nbdev.pretraining.longrun import sha256

def checked(st, cfg, folder, inputs, record, run_stage=artifacts.run_stage):
    run_stage(st, cfg, folder, inputs, record)
    mine = {str(f.relative_to(folder)): sha256(f) for f in artifacts.data_files(folder)
            if f.suffix in (".safetensors", ".jsonl", ".model") and f.name != "metrics.jsonl"}
    dist.all_gather_object(found := [None, None], mine)
    assert found[0] == found[1], (st.name, found)
    print(f"{st.name}: {len(mine)} files are equal", flush=True)

artifacts.run_stage = checked
cli.main(sys.argv[1:])
"""


def start(program: list[str], **more: str) -> subprocess.Popen:
    "Two processes, in a process group of their own."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    env = os.environ | dict(OMP_NUM_THREADS="1", LLAMA2_DEVICE="cpu", LLAMA2_DTYPE="float32", LLAMA2_QUIET="0") | more
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)


def finish(child: subprocess.Popen, timeout: float) -> tuple[int, str, str]:
    "Exit status, what was printed, and what was printed to stderr; nothing of the group survives."
    try: out, err = child.communicate(timeout=timeout)
    finally:
        try: os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        child.wait()
    return child.returncode, out, err


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "A few hundred rows of the project's data."
    out = tmp_path_factory.mktemp("data")
    for name, n in (("pretrain", 600), ("sft", 150), ("sft_public", 100), ("eval", 60), ("prompts", 180), ("preferences", 120), ("gatt", 12)):
        rows = read_jsonl(ROOT / "data_samples" / f"{name}.jsonl")
        write_jsonl(out / f"{name}.jsonl", rows[::max(1, len(rows) // n)])
    return out


def arguments(data: Path, root: Path, until: str) -> list[str]:
    return ["run", "--preset", "nano", "--data", str(data), "--runs", str(root), "--until", until, "--settings", *QUICK]


def distance(a: Path, b: Path) -> float:
    "The largest difference between the weights of two models."
    x, y = (load(p)[0].state_dict() for p in (a, b))
    return max((x[k] - y[k]).abs().max().item() for k in x)


@pytest.mark.skipif(os.name != "posix", reason="uses POSIX process groups")
def test_two_processes_make_the_model_of_one(data, tmp_path, monkeypatch, one_thread):
    for key, value in dict(LLAMA2_DEVICE="cpu", LLAMA2_DTYPE="float32").items(): monkeypatch.setenv(key, value)
    (program := tmp_path / "checked.py").write_text(CHECKED)
    two = start([str(program), *arguments(data, tmp_path / "two", "sft")])
    try: run("nano", data, tmp_path / "one", QUICK, "sft")
    finally: status, out, err = finish(two, 100)
    assert status == 0, err[-3000:]
    for name, files in (("tokenizer", 1), ("pretrain", 2), ("sft", 2)):
        assert out.count(f"{name}: {files} files are equal\n") == 1, "the first process prints, the other does not"
        assert err.count(f"{name}-") == 2 and "warn" not in err.lower(), err
    one, both = (workspace("nano", data, tmp_path / place, QUICK) for place in ("one", "two"))
    assert distance(one.get("pretrain"), both.get("pretrain")) < 1e-5
    assert distance(one.get("sft"), both.get("sft")) < 1e-3
    rows = read_jsonl(both.get("pretrain") / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 13)), "one log, every step once"
    assert [r["targets"] for r in rows] == [r["targets"] for r in read_jsonl(one.get("pretrain") / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="uses POSIX process groups")
def test_the_whole_recipe_runs_on_two_processes(data, tmp_path):
    (program := tmp_path / "checked.py").write_text(CHECKED)
    status, out, err = finish(start([str(program), *arguments(data, tmp_path / "runs", "report")]), 400)
    assert status == 0, err[-3000:]
    ws = workspace("nano", data, tmp_path / "runs", QUICK)
    assert set(dict(ws.status()).values()) == {"done"}
    for name, _ in ws.status(): assert out.count(f"{name}: ") >= 1, name
    assert out.endswith("report.html\n") and [r["step"] for r in read_jsonl(ws.get("ppo") / "metrics.jsonl")] == [1, 2]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_stops_all_and_the_same_command_goes_on(data, tmp_path):
    command = ["-m", "llama2_nbdev.cli", "pretrain", "--preset", "nano", "--data", str(data), "--runs", str(tmp_path), "--settings",
               "pretrain.train.steps=300", "pretrain.train.checkpoint_every=5", "pretrain.eval_every=1000"]
    child, until = start(command), time.monotonic() + 60
    logs = lambda: [f.read_text() for f in tmp_path.glob("nano/pretrain-*/metrics.jsonl")]
    while sum(text.count("\n") for text in logs()) < 8 and time.monotonic() < until: time.sleep(.05)
    child.send_signal(signal.SIGINT)
    status, _, err = finish(child, 60)
    assert status and "goes on where it stopped" in err and not list(tmp_path.glob("nano/pretrain-*/done")), err
    saved = max(int(f.stem[5:]) for f in tmp_path.glob("nano/pretrain-*/checkpoints/step-*.json"))
    before = [line for text in logs() for line in text.splitlines()][:saved]
    status, _, err = finish(start(command), 100)
    rows = read_jsonl(next(tmp_path.glob("nano/pretrain-*/metrics.jsonl")))
    assert status == 0 and "goes on" in err and [r["step"] for r in rows] == list(range(1, 301)), err
    assert [r["loss"] for r in rows[:saved]] == [json.loads(line)["loss"] for line in before] and saved >= 8


@pytest.mark.skipif(os.name != "posix", reason="uses POSIX process groups")
def test_an_error_in_one_process_ends_all(tmp_path):
    (program := tmp_path / "fails.py").write_text("import os, sys\nfrom llama2_nbdev import cli\nfrom llama2_nbdev.core import UserError\n"
        "from llama2_nbdev.processes import Processes\ndef info():\n    if Processes().rank: raise UserError('seven')\n    Processes().wait()\n"
        "cli.COMMANDS['info'] = info\ncli.main(['info'])\n")
    begun = time.monotonic()
    status, _, err = finish(start([str(program)]), 60)
    assert status and "llama2: seven" in err and time.monotonic() - begun < 50


class Three(Batches):
    batch_size = 3
    def rows(self, step, first, last): return {"x": torch.arange(3.)[first:last, None]}


def squares(model, batch):
    y = model(batch["x"])
    return (y * y).sum(), torch.tensor(len(y))


def test_more_processes_than_rows():
    parts = [Three().slice(r, 5)[0]["x"] for r in range(5)]
    assert torch.equal(torch.cat(parts), Three()[0]["x"]) and min(map(len, parts)) == 0
    model = torch.nn.Linear(1, 1)
    loss, n = set_gradients(model, {"x": torch.zeros(0, 1)}, squares)
    assert (loss, n) == (0, 0) and not any(p.grad.any() for p in model.parameters())


def test_a_process_alone_is_not_disturbed(monkeypatch):
    "Whoever names no processes gets those of `torchrun`; without it no message is sent."
    for name in ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **more: pytest.fail("a message"))
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    other.load_state_dict(one.state_dict())
    cfg = TrainConfig(steps=3, lr=.1, warmup=0, dtype="float32")
    assert [r["loss"] for r in fit(one, Three(), squares, cfg)] == [r["loss"] for r in fit(other, Three(), squares, cfg, parallel=OneProcess())]
    assert torch.equal(one.weight, other.weight) and Copies().leader and processes.spread(str, range(3)) == ["0", "1", "2"]


def test_a_follower_reads_the_log_and_writes_none(tmp_path):
    first = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3): first.add({"step": step})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log = MetricsLog(tmp_path, 2, write=False)
    log.add({"step": 3})
    assert [r["step"] for r in log.rows] == [1, 2, 3] and (tmp_path / "metrics.jsonl").read_bytes() == before
