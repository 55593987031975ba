"""Generated programs: what is right passes, what is hostile is stopped, pass@k is unbiased."""
import math
from itertools import combinations

import pytest

from llama2_nbdev.core import UserError
from llama2_nbdev.pretraining.sandbox import GUARD, Limits, humaneval_program, pass_at_k, read_humaneval, run_program, run_programs

HOSTILE = {  # name -> (program, how it must end)
    "loop": ("while True: pass", "timeout"), "sleep": ("import time; time.sleep(60)", "timeout"), "bomb": ("x = 'a' * 10**10", "memory"),
    "flood": ("while True: print('a' * 1000)", "failed"), "write": ("open('/tmp/llama2_sandbox_was_here', 'w').write('x')", "blocked"),
    "append here": ("open('x', 'a')", "blocked"), "os.open": ("import os; os.open('/tmp/llama2_sandbox_was_here', os.O_CREAT | os.O_WRONLY)", "blocked"),
    "read": ("open('/etc/hostname').read()", "blocked"), "list": ("import os; os.listdir('/')", "blocked"), "network": ("import socket; socket.socket()", "blocked"),
    "fork": ("import os; os.fork()", "blocked"), "shell": ("import os; os.system('ls')", "blocked"), "spawn": ("import os; os.posix_spawn('/bin/ls', ['ls'], {})", "blocked"),
    "kill": ("import os; os.kill(os.getppid(), 0)", "blocked"), "ctypes": ("import ctypes", "blocked"), "rename": ("import os; os.rename('a', 'b')", "blocked"),
    "limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))", "blocked"), "exit": ("import os; os._exit(0)", "failed"),
    "polite": ("raise SystemExit(0)", "failed"), "recursion": ("def f(): f()\nf()", "failed"),
    "caught": ("import os\ntry: os.fork()\nexcept BaseException: pass\nos._exit(0)", "failed")}


def test_hostile_programs_are_stopped(tmp_path):
    ended = run_programs([code for code, _ in HOSTILE.values()], Limits(seconds=2.))
    assert {n: o.status for n, o in zip(HOSTILE, ended)} == {n: how for n, (_, how) in HOSTILE.items()}
    from pathlib import Path
    assert not Path("/tmp/llama2_sandbox_was_here").exists()
    assert all(len(o.output) <= 64 * 1024 for o in ended)


def test_honest_programs_pass():
    good = ["print(2)", "import math, re, collections, hashlib, itertools, functools, typing, heapq, string, copy, datetime, decimal, random, dataclasses, enum",
            "from collections import namedtuple\nP = namedtuple('P', 'x')\nassert P(1).x == 1", "if __name__ == '__main__': assert sorted([2, 1]) == [1, 2]",
            "try: assert False\nexcept AssertionError: pass", "# é\nassert len('é') == 1"]
    assert [o.status for o in run_programs(good)] == ["passed"] * len(good)


def test_a_program_must_reach_its_end():
    row = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 2", "entry_point": "f"}
    ended = [run_program(humaneval_program(row, c)).status for c in ("    return x + 1", "    return x", "    import sys; sys.exit(0)", "    import os; os._exit(0)")]
    assert ended == ["passed", "failed", "failed", "failed"]
    assert run_program("1 +").error.startswith("SyntaxError")


def test_without_the_token_an_early_exit_would_pass(monkeypatch):
    "The planted bug: the guard announces success before the program runs."
    import llama2_nbdev.pretraining.sandbox as sandbox
    line = '    os.write(2, job["token"].encode())\n'
    assert line in GUARD
    start = '    exec(compile(job["code"]'
    monkeypatch.setattr(sandbox, "GUARD", GUARD.replace(line, "").replace(start, line + start))
    assert run_program("import os; os._exit(0)").status == "passed"


def test_pass_at_k_is_the_mean_over_all_choices():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                choices = list(combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)  # trap 60


def test_pass_at_k_is_stable_and_monotonic():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(.5)
    assert pass_at_k(1000, 2, 500) == pytest.approx(1 - math.comb(998, 500) / math.comb(1000, 500), abs=1e-12)
    row = [pass_at_k(200, 3, k) for k in range(1, 201)]
    assert row == sorted(row) and row[0] == pytest.approx(3 / 200) and row[-1] == 1.
    for bad in ((5, 6, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(UserError):
            pass_at_k(*bad)


def test_real_humaneval_solutions_pass(real_data):
    rows = read_humaneval(real_data / "humaneval" / "HumanEval.jsonl.gz")
    assert len(rows) == 164
    ended = run_programs([humaneval_program(r, r["canonical_solution"]) for r in rows], Limits(seconds=20.))
    assert [(r["task_id"], o.status, o.error) for r, o in zip(rows, ended) if o.status != "passed"] == []
    wrong = run_programs([humaneval_program(r, "    return None\n") for r in rows[:20]])
    assert all(o.status == "failed" for o in wrong)


def test_a_broken_file_is_reported(tmp_path):
    (tmp_path / "x.gz").write_text("no")
    with pytest.raises(UserError, match="download it again"):
        read_humaneval(tmp_path / "x.gz")
