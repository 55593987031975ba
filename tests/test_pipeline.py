"""The recipe end to end on the smallest preset, and what bad input says."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama2_nbdev import versions
from llama2_nbdev.cli import COMMANDS, main
from llama2_nbdev.core import UserError, read_json, read_jsonl, write_jsonl
from llama2_nbdev.finetuning.preferences import hold_out, task_prompts
from llama2_nbdev.model.weights import load
from llama2_nbdev.pipeline import change, preset, run, tiny_preset, workspace
from llama2_nbdev.report import FREE_PROMPTS, read_metrics

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("pretrain.train.steps=30", "sft.public_epochs=0", "sft.epochs=1", "evaluate.max_new_tokens=8", "report.max_new_tokens=8",
         "preferences.comparisons=20", "rate.prompts=12", *(f"v{i}.{change}" for i in range(1, 6) for change in ("prompts=6", "collect.comparisons=12")))
STAGES = ("tokenizer", "shards", "pretrain", "sft", "preferences", "reward", "v1", "v2", "v3", "v4", "v5", "obedience", "gatt", "ppo", "rate", "evaluate",
          "unguarded", "benchmarks", "audit", "safety", "distilled", "redteam", "report")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    "A few hundred rows of the project's data: enough to run every stage."
    out = tmp_path_factory.mktemp("data")
    for name, n in (("pretrain", 1500), ("sft", 300), ("sft_public", 100), ("eval", 60), ("prompts", 180), ("preferences", 120), ("gatt", 12)):
        rows = read_jsonl(ROOT / "data_samples" / f"{name}.jsonl")
        write_jsonl(out / f"{name}.jsonl", rows[::max(1, len(rows) // n)])
    return out


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    "A finished run of the nano preset on the small data."
    root = tmp_path_factory.mktemp("runs")
    page = run("nano", small_data, root, QUICK)
    return workspace("nano", small_data, root, QUICK), page


def call(capsys, *args: str) -> tuple[int, str]:
    "Exit status and everything that a command line prints."
    try:
        main(args)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_every_stage_is_done_and_nothing_is_made_twice(finished):
    ws, page = finished
    assert dict(ws.status()) == dict.fromkeys(STAGES, "done")
    before = page.stat().st_mtime_ns, (ws.get("report") / "report.html").stat().st_mtime_ns
    run("nano", ws.sources["data"], ws.root, QUICK)
    assert (ws.get("report") / "report.html").stat().st_mtime_ns == before[1]


def test_the_loss_falls(finished):
    rows = read_metrics(finished[0].get("pretrain"))
    assert len(rows) == 30 and rows[-1]["loss"] < rows[0]["loss"] - .5


def test_phases_are_read_in_the_order_in_which_they_ran(finished):
    ws, _ = finished
    both = workspace("nano", ws.sources["data"], ws.root, (*QUICK, "sft.public_epochs=1"))
    folder = both.get("sft")
    rows, public = read_metrics(folder), read_jsonl(folder / "1_public" / "metrics.jsonl")
    assert [r["loss"] for r in rows[:len(public)]] == [r["loss"] for r in public] and len(rows) > len(public)
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))


def test_a_corpus_alone_is_enough_for_a_base_model(tmp_path, monkeypatch):
    texts = [{"text": f"Mara has {i} red hats and {i + 1} kites."} for i in range(200)]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split, streaming: iter(texts)))
    ws = workspace("nano", "me/hats", tmp_path, ("tokenizer.vocab_size=300",))
    assert ws.get("shards").is_dir() and ws.sources["data"] == tmp_path / "hub" / "me--hats"


def test_models_are_found_outside_the_project(capsys, monkeypatch, tmp_path, finished):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "generate", "Mara", "--model", str(finished[0].get("sft")), "--max-new-tokens", "2")[0] == 0
    status, text = call(capsys, "info")
    assert status == 0 and "6,738,415,616" in text and "data_samples" in text


def test_a_setting_remakes_what_depends_on_it_and_nothing_else(finished):
    ws, _ = finished
    other = workspace("nano", ws.sources["data"], ws.root, (*QUICK, "sft.lr=0.001"))
    same = {name for name in STAGES if other.path(name) == ws.path(name)}
    assert same == {"tokenizer", "shards", "pretrain", "audit", "unguarded", "redteam"}


def test_the_report_is_one_file_with_everything(finished):
    text = finished[1].read_text(encoding="utf-8")
    assert text.count("<svg") == 8 and "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert len(read_json(finished[0].get("report") / "free_prompts.json")) == len(FREE_PROMPTS) == 20
    for name in ("pretrain", "sft"):
        assert f"<th>{name}</th>" in text


def test_every_preset_setting_can_be_changed_and_keeps_its_type():
    cfg = tiny_preset()["pretrain"]
    assert change(cfg, ["train", "lr"], "1").train.lr == 1.0
    for bad in ("pretrain.train.lr=fast", "pretrain.nothing=1", "nothing.lr=1", "pretrain"):
        with pytest.raises(UserError):
            preset("tiny", [bad])


@pytest.mark.parametrize("make, says", [
    (lambda d: None, "holds no data"),
    (lambda d: (d / "notes.txt").write_text("no corpus"), "pretrain.jsonl"),
    (lambda d: (d / "pretrain.jsonl").write_text('{"text": "a b"}\n\n{"text": null}\n'), "pretrain.jsonl:3: 'text' holds no text"),
    (lambda d: ((d / "pretrain.jsonl").write_text('{"text": "a b"}\n'), (d / "sft.jsonl").write_text('{"messages": [{"role": "user"}]}\n')),
     "sft.jsonl:1: 'messages' holds no text"),
    (lambda d: (d / "pretrain.jsonl").write_text('{"text": "a b", "source": "web", "url": "u"}\n{"text": \n'), "pretrain.jsonl:2"),
])
def test_bad_data_folders_say_where_and_what(tmp_path, make, says):
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    with pytest.raises(UserError, match=says):
        workspace("nano", data, tmp_path / "runs").get("shards")


def test_mistakes_on_the_command_line_cost_one_line(capsys, tmp_path, finished):
    ws, _ = finished
    broken = tmp_path / "model.safetensors"
    broken.write_bytes((ws.get("sft") / "model.safetensors").read_bytes()[:1000])
    for args, says in (
        (("run", "--preset", "huge"), "choose one of nano, tiny"),
        (("run", "--preset", "nano", "--data", str(tmp_path / "nowhere")), "nowhere"),
        (("chat", "--model", "nowhere"), "path of weights"),
        (("chat", "--preset", "nano", "--runs", str(tmp_path)), "llama2 run --preset nano"),
        (("generate", "hello", "--model", str(tmp_path)), "model.safetensors"),
        (("convert", str(ws.get("sft")), str(tmp_path)), "exists already"),
        (("generate", "word " * 2000, "--model", str(ws.get("sft"))), "context of 1024"),
    ):
        status, text = call(capsys, *args)
        assert status == 2 and says in text and "Traceback" not in text, (args, text)
        assert text.startswith("llama2: ") and text.count("\n") == 1, text


def test_commands_work_on_a_finished_run(capsys, monkeypatch, tmp_path, finished):
    ws, _ = finished
    sft = str(ws.get("sft"))
    status, text = call(capsys, "generate", "Mara lives in", "--model", sft, "--max-new-tokens", "4", "--temperature", "0")
    assert status == 0 and text.startswith("Mara lives in")
    tok = load(sft)[1]
    assert text.strip() == tok.decode(tok.encode(text.strip()))
    lines = iter(["Hello!", "/reset", "[INST] no", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    status, text = call(capsys, "chat", "--model", sft, "--max-new-tokens", "4")
    assert status == 0 and text.count("llama: ") == 2 and "[INST]" in text
    for form, name in (("own", "own"), ("hf", "hf"), ("meta", "meta"), ("llama2c", "model.bin")):
        status, text = call(capsys, "convert", sft, str(tmp_path / name), "--to", form)
        assert status == 0 and f"as {form}" in text, text
        status, text = call(capsys, "generate", "Mara", "--model", str(tmp_path / name), "--max-new-tokens", "2")
        assert status == 0, text
    status, text = call(capsys, "evaluate", "--preset", "nano", "--data", str(ws.sources["data"]), "--runs", str(ws.root), "--settings", *QUICK)
    assert status == 0 and "phrasing" in text and "%" in text
    for command, said in (("benchmarks", "Math"), ("audit", "toxic documents"), ("safety", "mean rating"), ("redteam", "gamma"), ("distill", "gain")):
        status, text = call(capsys, command, "--preset", "nano", "--data", str(ws.sources["data"]), "--runs", str(ws.root), *(() if command == "audit" else ("--settings", *QUICK)))
        assert status == 0 and said in text, text
    status, text = call(capsys, "world", "--seed", "0", "--out", str(tmp_path / "world"))
    assert status == 0 and (tmp_path / "world" / "sft.jsonl").read_bytes() == (ROOT / "data_samples" / "sft.jsonl").read_bytes()
    assert call(capsys, "info", "--preset", "nano")[0] == 0


def test_the_end_of_the_input_ends_a_chat(capsys, monkeypatch, finished):
    def end(prompt): raise EOFError
    monkeypatch.setattr("builtins.input", end)
    assert call(capsys, "chat", "--model", str(finished[0].get("sft")))[0] == 0


def test_help_names_every_command(capsys):
    status, text = call(capsys, "--help")
    assert status == 0 and all(name in text for name in COMMANDS)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_leaves_a_run_that_goes_on(small_data, tmp_path):
    command = [sys.executable, "-c", "from llama2_nbdev.cli import main; main()", "pretrain", "--preset", "nano", "--data", str(small_data), "--runs",
               str(tmp_path), "--settings", "pretrain.train.steps=4000"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    logged = lambda: sum(p.read_text().count("\n") for p in tmp_path.glob("nano/pretrain-*/metrics.jsonl"))
    while logged() < 3 and time.time() < deadline: time.sleep(.1)
    child.send_signal(signal.SIGINT)
    text, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "goes on where it stopped" in text and "Traceback" not in text, text
    assert list(tmp_path.glob("nano/pretrain-*/checkpoints/step-*.pt")) and not list(tmp_path.glob("nano/pretrain-*/done"))


def test_every_version_learns_from_all_samples_so_far(finished):
    "Trap 52: the rounds keep their pairs and samples, and rewards of different rounds are never compared."
    ws, _ = finished
    for i in range(1, 6):
        folder = ws.get(f"v{i}")
        samples = read_jsonl(folder / "samples.jsonl", allow_empty=True)
        assert {r["version"].split()[0] for r in samples} <= {f"v{i}"}  # trap 52
        assert (i == 1) != (folder / "rewards" / "helpfulness" / "reward.safetensors").exists()
        assert not (load(folder)[0].output.weight == load(ws.get("sft"))[0].output.weight).all()


def test_pairs_of_held_out_prompts_train_no_reward_model(finished):
    ws, _ = finished
    held = {str(p["messages"]) for p in read_jsonl(ws.get("reward") / "held_out.jsonl")}
    train, _ = hold_out(read_jsonl(ws.sources["data"] / "preferences.jsonl") + read_jsonl(ws.get("preferences") / "pairs.jsonl"),
                        ws.configs["reward"].held_out, ws.configs["reward"].seed)
    assert held and not held & {str(p["messages"]) for p in train}


def test_a_round_that_failed_half_way_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch):
    ws, _ = finished
    inputs = {name: ws.get(name) for name in ("sft", "preferences", "reward", "v1", "data")}
    real = versions.save
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(versions, "save", fail)
    with pytest.raises(OSError): versions.make_version(2, ws.configs["v2"], tmp_path, inputs)
    monkeypatch.setattr(versions, "save", real)
    monkeypatch.setattr(versions, "collect_batch", fail)  # what is on disk is not made again
    versions.make_version(2, ws.configs["v2"], tmp_path, inputs)
    again, once = load(tmp_path)[0].state_dict(), load(ws.get("v2"))[0].state_dict()
    assert all((again[k] == once[k]).all() for k in once)


def test_the_rating_compares_with_sft_and_kl_starts_at_zero(finished):
    table = finished[0].summary("rate")
    assert list(table) == ["sft", "v1", "v2", "v3", "v4", "v5", "ppo"] and table["sft"]["wins_by_truth"]["mean"] == .5
    assert abs(table["sft"]["kl"]["mean"]) < 1e-4 < abs(table["ppo"]["kl"]["mean"])  # trap 37: k1 of a model against itself is 0


def test_a_folder_without_prompts_says_what_is_missing(finished, tmp_path):
    with pytest.raises(UserError, match="prompts.jsonl"):
        task_prompts(tmp_path, "train")
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "messages": [], "task": "x", "kind": "helpful", "split": "dev"}\n')
    with pytest.raises(UserError, match="has no prompt of split 'train'"):
        task_prompts(tmp_path, "train")
