"""The ground: masked means, log-probabilities, JSONL with errors that help, files that are whole or absent."""
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_nbdev import core
from llama2_nbdev.core import (UserError, append_jsonl, atomic_write, iter_jsonl, masked_mean, pick_device, pick_dtype, progress,
                               project_root, read_json, read_jsonl, seed_everything, token_logprobs, write_json, write_jsonl)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_masked_mean_ignores_what_is_outside_forward_and_backward():
    x = torch.tensor([[1., float("nan"), 3.], [float("inf"), 5., 7.]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    mean = masked_mean(x, mask)
    assert mean.item() == 4
    mean.backward()
    assert torch.equal(x.grad, mask / 4)
    assert masked_mean(x, mask, dim=1).tolist() == [2, 6]
    assert masked_mean(x, mask, dim=(0, 1)).item() == 4


def test_masked_mean_of_nothing_is_zero_without_gradient():
    x = torch.full((2, 3), float("nan"), requires_grad=True)
    out = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool), dim=1)
    out.sum().backward()
    assert out.tolist() == [0, 0] and x.grad.abs().sum() == 0


def test_masked_mean_counts_a_broadcast_mask_and_sums_in_fp32():
    assert masked_mean(torch.ones(2, 4), torch.tensor([[1], [0]])).item() == 1
    assert masked_mean(torch.ones(2, 4), torch.tensor([[1], [0]]), dim=0).tolist() == [1] * 4
    many = torch.ones(70_000, dtype=torch.bfloat16)
    assert masked_mean(many, many.bool()).item() == 1 and masked_mean(many, many.bool()).dtype == torch.float32
    assert masked_mean(torch.ones(3, dtype=torch.float64), torch.ones(3)).dtype == torch.float64


def test_the_mean_of_a_split_needs_the_global_count():  # traps 18, 19, 20
    x, mask = torch.arange(12.).view(4, 3), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    parts = [(masked_mean(x[i:i + 1], mask[i:i + 1]), mask[i].sum()) for i in range(4)]
    weighted = sum(m * n for m, n in parts) / mask.sum()
    assert torch.isclose(weighted, masked_mean(x, mask))
    assert not torch.isclose(sum(m for m, _ in parts) / 4, masked_mean(x, mask))


def test_token_logprobs_against_log_softmax_in_double():
    seed_everything(0)
    logits, targets = torch.randn(3, 4, 17) * 5, torch.randint(17, (3, 4))
    want = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(token_logprobs(logits, targets).double(), want, atol=1e-5)
    assert token_logprobs(logits[:, 1:], targets[:, 1:]).shape == (3, 3)  # not contiguous


def test_token_logprobs_computes_in_fp32():  # trap 5
    logits = (torch.randn(2, 3, 50) * 4).bfloat16()
    targets = torch.randint(50, (2, 3))
    got = token_logprobs(logits, targets)
    assert got.dtype == torch.float32
    assert torch.equal(got, token_logprobs(logits.float(), targets))
    probs = torch.stack([token_logprobs(logits, torch.full((2, 3), v)) for v in range(50)]).exp().sum(0)
    assert torch.allclose(probs, torch.ones(2, 3), atol=1e-5)


@pytest.mark.parametrize("bad", [-100, -1, 5])
def test_token_logprobs_has_no_magic_id(bad):  # trap 13: an id of -1 must never pass silently
    with pytest.raises(IndexError):
        token_logprobs(torch.zeros(1, 2, 5), torch.tensor([[0, bad]]))


def test_devices_and_dtypes(monkeypatch):
    calls = []
    monkeypatch.setattr(core, "matmul_seconds", lambda device, dtypes: calls.append(device) or [1., seconds])
    for seconds, want in ((2., torch.float32), (.9, torch.float32), (.5, torch.bfloat16)):
        core._probe_dtype.cache_clear()
        assert [pick_dtype(torch.device("cpu")) for _ in range(3)] == [want] * 3
    assert len(calls) == 3, "probed once per process"
    core._probe_dtype.cache_clear()
    monkeypatch.setenv("LLAMA2_DTYPE", "bfloat16")
    assert pick_dtype("cpu") == torch.bfloat16
    for name, call in (("LLAMA2_DTYPE", lambda: pick_dtype("cpu")), ("LLAMA2_DEVICE", pick_device)):
        monkeypatch.setenv(name, "toaster")
        with pytest.raises(UserError, match=f"{name}='toaster'"):
            call()


def test_the_real_probe_is_short():
    core._probe_dtype.cache_clear()
    start = time.perf_counter()
    pick_dtype(torch.device("cpu"))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_survives_exceptions(tmp_path, error):
    (tmp_path / "a.txt").write_text("old")
    for name in ("a.txt", "new.txt"):
        with pytest.raises(error), atomic_write(tmp_path / name) as f:
            f.write("half")
            f.flush()
            assert (tmp_path / "a.txt").read_text() == "old"
            raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def _die_writing(path):
    with atomic_write(path) as f:
        f.write("half")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_atomic_write_survives_sigkill(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    child = multiprocessing.get_context("fork").Process(target=_die_writing, args=(tmp_path / "a.txt",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(names(tmp_path)) == 2, "the kill came inside the write"
    with atomic_write(tmp_path / "a.txt") as f:
        f.write("new")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "new"


def test_atomic_write_leaves_a_living_writer_alone(tmp_path):
    with atomic_write(tmp_path / "a.txt") as slow:
        slow.write("slow")
        with atomic_write(tmp_path / "a.txt") as fast:
            fast.write("fast")
        assert (tmp_path / "a.txt").read_text() == "fast"
    assert (tmp_path / "a.txt").read_text() == "slow" and names(tmp_path) == ["a.txt"]


def test_atomic_write_modes_links_and_folders(tmp_path):
    with atomic_write(tmp_path / "deep" / "b.bin", "wb") as f:
        f.write(b"\r\n")
    assert (tmp_path / "deep" / "b.bin").read_bytes() == b"\r\n"
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "b.bin")
    with atomic_write(tmp_path / "link") as f:
        f.write("ü\n")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "b.bin").read_bytes() == "ü\n".encode()
    with pytest.raises(ValueError, match="only 'w' and 'wb'"), atomic_write(tmp_path / "c", "a"):
        pass


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=4))
def test_jsonl_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert read_jsonl(path) == rows
    path.unlink()
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows


@pytest.mark.parametrize("line, says", [
    (b'{"text": "cut', "not valid JSON"), (b"[1]", "a list, not an object"), (b"3", "a int, not an object"), (b"null", "NoneType"),
    (b'{"txt": 1}', "key 'text' is missing; found 'txt'"), (b"{}", "found no keys"), (b'{"text": "\xe9"}', "byte 10 is not UTF-8"),
    (b'{"text": "\\ud83d"}', "surrogate"), (b"[" * 100_000, "not valid JSON"), (b'{"text": 1}{"text": 2}', "not valid JSON")])
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    rows = iter_jsonl(path, ["text"])
    assert next(rows) == {"text": "ok"}
    with pytest.raises(UserError) as e:
        next(rows)
    assert str(e.value).startswith(f"{path}:3: ") and says in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_no_file_no_rows_no_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="a.jsonl has no rows"):
        read_jsonl(tmp_path / "a.jsonl")
    assert read_jsonl(tmp_path / "a.jsonl", allow_empty=True) == []
    with pytest.raises(UserError, match="does not exist"):
        read_jsonl(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_jsonl(tmp_path)


def test_write_jsonl_is_all_or_nothing(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"n": 1}])
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_jsonl(tmp_path / "a.jsonl", [{"n": 2}, {"n": object()}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"n": 1}] and names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_log_cut_anywhere_goes_on(tmp_path, cut):
    rows = [{"step": 1, "loss": .5}, {"step": 2, "text": "ü" * 3000}]
    for row in rows:
        append_jsonl(tmp_path / "log.jsonl", row)
    whole = (tmp_path / "log.jsonl").read_bytes()
    at = len(whole) * cut // 20
    (tmp_path / "log.jsonl").write_bytes(whole[:at])
    append_jsonl(tmp_path / "log.jsonl", {"step": 3})
    assert read_jsonl(tmp_path / "log.jsonl") == [r for r, end in zip(rows, (whole.index(b"\n"), len(whole))) if at >= end] + [{"step": 3}]


def test_json_documents(tmp_path):
    write_json(tmp_path / "a.json", {"path": tmp_path, "x": torch.ones(2), "dtype": torch.float32})
    assert read_json(tmp_path / "a.json") == {"path": str(tmp_path), "x": [1, 1], "dtype": "torch.float32"}
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="not a JSON document"):
        read_json(tmp_path / "a.json")


def test_the_bar_waits_also_for_set_postfix(monkeypatch, capfd):
    monkeypatch.delenv("LLAMA2_QUIET", raising=False)
    bar = progress(total=2, desc="short")
    bar.set_postfix(loss=1.)
    bar.update(2)
    bar.close()
    assert capfd.readouterr().err == ""
    bar = progress(total=2, desc="long")
    bar.start_t -= 3  # as if three seconds had passed
    bar.set_postfix(loss=1.)
    assert "long" in capfd.readouterr().err
    bar.close()
    monkeypatch.setenv("LLAMA2_QUIET", "1")
    assert progress(range(3)).disable and list(progress(range(3))) == [0, 1, 2]


def test_project_root(tmp_path, monkeypatch):
    (tmp_path / "nbs" / "part").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs" / "part")
    assert project_root() == tmp_path / "nbs" / "part"
    (tmp_path / "data_samples").mkdir()
    (tmp_path / "settings.ini").touch()
    assert project_root() == tmp_path


def test_import_adds_little_to_torch():
    code = "import torch, time; t = time.perf_counter(); import llama2_nbdev.core; print(time.perf_counter() - t)"
    best = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert best < .3 and math.isfinite(best)
