"""Stages, their hashes, and what becomes of an artefact that is killed, broken, wanted twice or damaged."""
import enum
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2_nbdev import artifacts
from llama2_nbdev.artifacts import (Stage, Workspace, canonical, config_hash, fingerprint, folder_state, mark_done, needed_order,
                                    stage, stages)
from llama2_nbdev.core import UserError, read_json, write_json

fork = multiprocessing.get_context("fork")


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    betas: tuple = (.9, .95)


@dataclass(frozen=True)
class Config:
    steps: int = 4
    inner: Inner = field(default_factory=Inner)
    dtype: torch.dtype = torch.float32
    path: Path = Path("a/b")
    note: str | None = None
    weights: dict = field(default_factory=lambda: {"web": 1., "code": 2.})


@pytest.fixture
def registry(monkeypatch):
    "An empty registry for this test."
    monkeypatch.setattr(artifacts, "_registry", {})


@pytest.fixture
def make(tmp_path, registry):
    "A recipe of three stages on one source; `make(**configs)` gives a workspace. Each run is noted in `runs.txt`."
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.txt").write_text("rows")

    def note(word):
        with open(tmp_path / "runs.txt", "a") as f:
            f.write(word + "\n")

    @stage("prepare", config=Inner, needs=("data",))
    def prepare(cfg, out, inputs):
        note("prepare")
        (out / "rows.txt").write_text((inputs["data"] / "rows.txt").read_text() * 2)
        return {"lr": cfg.lr}

    @stage("train", config=Config, needs=("prepare", "data"))
    def train(cfg, out, inputs):
        note("train")
        state = read_json(out / "state.json") if (out / "state.json").exists() else []
        for step in range(len(state), cfg.steps):
            state.append(step * cfg.inner.lr)
            write_json(out / "state.json", state)
            note(f"step {step}")
            if cfg.note and step == 1 and (tmp_path / cfg.note).exists():
                (tmp_path / cfg.note).unlink()
                if cfg.note == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise {"fail": ValueError("no luck"), "ctrl-c": KeyboardInterrupt()}[cfg.note]
            time.sleep(.02)
        return {"steps": len(state)}

    @stage("report", needs=("train",))
    def report(cfg, out, inputs):
        note("report")
        (out / "page.html").write_text("fine")
        return {}

    def workspace(prepare=Inner(), train=Config(), **more):
        more = {"root": tmp_path / "runs", "sources": {"data": tmp_path / "data"}} | more
        return Workspace("test", {"prepare": prepare, "train": train}, **more)

    workspace.runs = lambda: (tmp_path / "runs.txt").read_text().split("\n")[:-1] if (tmp_path / "runs.txt").exists() else []
    workspace.arm = lambda word: (tmp_path / word).touch()
    return workspace


@pytest.mark.parametrize("change", [dict(steps=5), dict(inner=Inner(lr=2e-3)), dict(inner=Inner(betas=(.9, .96))), dict(dtype=torch.bfloat16),
                                    dict(path=Path("a/c")), dict(note="x"), dict(weights={"web": 1., "code": 2.5}), dict(weights={"web": 1.})])
def test_hash_sees_every_field(change):
    assert config_hash(replace(Config(), **change)) != config_hash(Config())


def test_equal_configs_have_equal_hashes():
    assert config_hash(Config()) == config_hash(Config(weights={"code": 2, "web": 1}, inner=Inner(betas=[.9, .95])))
    assert config_hash(1.) == config_hash(1) == config_hash(np.float64(1)) != config_hash(True)
    assert config_hash({"a", "b"}) == config_hash({"b", "a"}) and config_hash(Colour.RED) != config_hash(1)
    assert config_hash(float("nan")) == config_hash(float("nan")) != config_hash(float("inf"))
    assert config_hash([1, [2]]) != config_hash([[1], 2])


def test_hash_does_not_change_between_processes_or_releases():
    assert config_hash(Config()) == "b53798605341"


@pytest.mark.parametrize("bad", [torch.ones(2), lambda: 0, {1: 2}, object(), Config])
def test_what_has_no_spelling_is_refused(bad):
    with pytest.raises(UserError, match="has no hash"):
        canonical({"x": bad})


def test_fingerprint(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
    same = fingerprint(one)
    assert fingerprint(two) == same, "place and date do not count"
    (two / ".hidden").write_text("x")
    (two / "README.md").write_text("x")
    assert fingerprint(two) == same
    (two / "b.txt").rename(two / "c.txt")
    assert fingerprint(two) != same, "names count"
    assert fingerprint(one / "b.txt") != fingerprint(one / "sub" / "a.txt")
    (one / "b.txt").write_text("B")
    changed = fingerprint(one)
    assert changed != same, "a change of the same length is seen in the same process"
    reads = artifacts._digest.cache_info().misses
    assert fingerprint(one) == changed and artifacts._digest.cache_info().misses == reads, "not read twice"


def test_missing_and_empty_sources(tmp_path, make):
    for place, says in ((tmp_path / "none", "does not exist"), (tmp_path / "empty", "holds no data")):
        if "empty" in place.name:
            place.mkdir()
            (place / "rows.txt").touch()
        with pytest.raises(UserError, match=f"Source 'data': .*{says}"):
            make(sources={"data": place}).get("train")
    assert make.runs() == []


def test_registration(registry):
    def fn(cfg, out, inputs): return {}
    def twin(cfg, out, inputs): return {}
    stage("a")(fn)
    assert stages() == {"a": Stage("a", fn, None, (), 1)}
    with pytest.raises(UserError, match="registered twice"):
        stage("a")(twin)
    stage("a", version=2)(fn)
    assert stages()["a"].version == 2, "the same function again is no clash"
    with pytest.raises(UserError, match="cannot name a stage"):
        stage("../a")
    other = type(fn)(fn.__code__, fn.__globals__)
    other.__qualname__, other.__module__ = fn.__qualname__, "another.module"
    with pytest.raises(UserError, match="another.module"):
        stage("a")(other)


def test_a_notebook_and_its_module_are_one(registry):
    def fn(cfg, out, inputs): return {}
    live = type(fn)(fn.__code__, fn.__globals__)
    live.__qualname__, live.__module__ = fn.__qualname__, "__main__"
    for first, second in ((fn, live), (live, fn)):
        artifacts._registry.clear()
        stage("a")(first)
        stage("a")(second)
        assert stages()["a"].run is live, "what the reader edits is what runs"


def test_order_unknown_and_circle(make):
    assert needed_order("report", ["data"]) == ["data", "prepare", "train", "report"]
    with pytest.raises(UserError, match="no stage or source 'data', which 'prepare' needs.*Stages: prepare, report, train"):
        needed_order("report")
    with pytest.raises(UserError, match="no stage or source 'tarin'"):
        make().get("tarin")
    stage("x", needs=("y",))(lambda c, o, i: {})
    stage("y", needs=("x",))(lambda c, o, i: {})
    with pytest.raises(UserError, match="circle: x -> y -> x"):
        needed_order("x")


def test_a_long_recipe_is_walked_once_per_stage(registry):
    for i in range(60):  # each needs all before it: 2**60 ways through the graph
        stage(f"s{i}", needs=[f"s{j}" for j in range(i)])(lambda c, o, i: {})
    assert len(needed_order("s59")) == 60 and Workspace("w", {}, root="r").path("s59").name.startswith("s59-")


def test_wrong_or_missing_config(make):
    with pytest.raises(UserError, match="'train' wants a Config and a Inner is given"):
        make(train=Inner()).path("train")
    with pytest.raises(UserError, match="wants a Config and none is given"):
        make(train=None).path("train")


def test_everything_is_made_once_and_reused(make):
    ws = make()
    page = ws.get("report")
    assert make.runs() == ["prepare", "train", *(f"step {i}" for i in range(4)), "report"]
    assert make().get("report") == page and len(make.runs()) == 7
    assert ws.summary("train") == {"steps": 4} and ws.get("data").name == "data"
    assert read_json(ws.path("train") / "config.json")["config"]["fields"]["steps"] == 4
    assert make().status() == [("prepare", "done"), ("train", "done")]


def test_only_what_depends_on_a_change_is_made_again(make, tmp_path):
    make().get("report")
    make(train=Config(steps=2)).get("report")
    assert make.runs()[7:] == ["train", "step 0", "step 1", "report"]
    (tmp_path / "data" / "rows.txt").write_text("new rows")
    assert [s for _, s in make().status()] == ["missing", "missing"]
    make().get("prepare")
    assert make.runs()[11:] == ["prepare"]
    old = make().path("report")
    artifacts._registry["prepare"] = replace(artifacts._registry["prepare"], version=2)
    assert make().path("report") != old


def test_a_source_stands_in_for_a_stage(make, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").write_text("x")
    ws = make(sources={"train": tmp_path / "mine"})
    ws.get("report")
    assert make.runs() == ["report"] and ws.get("train") == tmp_path / "mine"


def test_sigkill_leaves_a_state_to_go_on_from(make):
    ws = make(train=Config(note="kill"))
    make.arm("kill")
    child = fork.Process(target=ws.get, args=("train",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert folder_state(ws.path("train")) == "partial" and ws.status()[-1] == ("train", "partial")
    with pytest.raises(UserError, match="it is partial"):
        ws.summary("train")
    ws.get("train")
    assert make.runs() == ["prepare", "train", "step 0", "step 1", "train", "step 2", "step 3"]
    assert read_json(ws.path("train") / "state.json") == read_json(make().get("train") / "state.json")


def test_two_processes_make_it_once(make):
    ws = make()
    children = [fork.Process(target=ws.get, args=("report",)) for _ in range(3)]
    for c in children:
        c.start()
    for c in children:
        c.join()
    assert [c.exitcode for c in children] == [0, 0, 0]
    assert sorted(make.runs()) == sorted(["prepare", "train", *(f"step {i}" for i in range(4)), "report"])


def test_a_running_stage_is_said_to_run(make):
    ws = make(train=Config(steps=200))
    child = fork.Process(target=ws.get, args=("train",))
    child.start()
    try:
        deadline = time.time() + 20
        while "step 3" not in make.runs() and time.time() < deadline:
            time.sleep(.02)
        assert ws.status() == [("prepare", "done"), ("train", "running")]
    finally:
        child.kill()
        child.join()
    assert ws.status() == [("prepare", "done"), ("train", "partial")]


def test_failure_is_told_kept_and_retried(make, monkeypatch, capsys):
    monkeypatch.delenv("LLAMA2_QUIET", raising=False)
    ws = make(train=Config(note="fail"))
    make.arm("fail")
    with pytest.raises(ValueError, match="no luck"):
        ws.get("train")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and "failed (ValueError: no luck)" in said[-1] and "runs/test/train-" in said[-1]
    assert "no luck" in (ws.path("train") / "failed.txt").read_text()
    assert ws.status()[-1] == ("train", "failed")
    ws.get("train")
    assert not (ws.path("train") / "failed.txt").exists() and make.runs()[-3:] == ["train", "step 2", "step 3"]
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["goes on", "done"]


def test_ctrl_c_passes_and_says_how_to_go_on(make, monkeypatch, capsys):
    monkeypatch.delenv("LLAMA2_QUIET", raising=False)
    ws = make(train=Config(note="ctrl-c"))
    make.arm("ctrl-c")
    with pytest.raises(KeyboardInterrupt):
        ws.get("train")
    assert "interrupted" in (said := capsys.readouterr().err) and "ask again to go on" in said
    assert ws.status()[-1] == ("train", "partial")
    ws.get("train")
    assert ws.summary("train") == {"steps": 4}


def test_silence(make, monkeypatch, capsys):
    monkeypatch.delenv("LLAMA2_QUIET", raising=False)
    make(quiet=True).get("prepare")
    monkeypatch.setenv("LLAMA2_QUIET", "1")
    make().get("train")
    assert capsys.readouterr() == ("", "")


def test_a_summary_that_is_no_dict_is_a_failure(make):
    stage("odd")(lambda cfg, out, inputs: None)
    with pytest.raises(TypeError, match="returned a NoneType"):
        make().get("odd")
    assert folder_state(make().path("odd")) == "failed"


@pytest.mark.parametrize("hurt, says", [(lambda p: p.unlink(), "is missing"), (lambda p: p.write_text("["), "has 1 bytes instead of")])
def test_damage_is_found(make, hurt, says):
    folder = make().get("train")
    hurt(folder / "state.json")
    assert make().status()[-1] == ("train", "damaged")
    for ask in (make().get, make().summary):
        with pytest.raises(UserError, match=f"state.json {says}.*Delete the folder"):
            ask("train")
    (folder / "done").unlink()  # without its last word, whole or not, it is no artefact
    assert folder_state(folder) == "partial"


def test_done_is_the_last_file_written(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(b"123")
    monkeypatch.setattr(artifacts, "write_json", lambda path, obj: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        mark_done(tmp_path)
    assert folder_state(tmp_path) == "partial"


def test_explain_says_why(make):
    make().get("train")
    assert make().explain("train").splitlines()[1:] == [f"{make().path(n).name}: done" for n in ("prepare", "train")]
    why = make(prepare=Inner(lr=.5)).explain("train")
    assert "config.fields.lr: 0.001 -> 0.5" in why and "needs.prepare" in why and "missing" in why
    assert len(make.runs()) == 6, "explaining makes nothing"


def test_root_default_and_a_root_that_cannot_be(make, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA2_RUNS", str(tmp_path / "elsewhere"))
    assert make(root=None).path("train").parent == tmp_path / "elsewhere" / "test"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Set LLAMA2_RUNS"):
        make(root=tmp_path / "file").get("prepare")
