"""Execute every notebook with nbdev's runner, each in a process of its own, some at a time, and write `results/times.json`.

Use: python tools/run_notebooks.py [NAME ...] [--slow]      NAME: part of a notebook's path; all when nothing is named
Before a complete run, the artefacts of the preset ($LLAMA2_PRESET, default tiny) are trained once; all notebooks share
them through runs/. A notebook that is run by name trains what it needs itself.
The seconds in results/times.json name the hardware and versions they were measured with. Runs that stay near the
recorded times of the same machine leave the file as it is, so testing does not dirty a clean tree.
"""
import json
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from notebooks import ROOT, find

TIMES = ROOT / "results" / "times.json"
LIMIT = 15 * 60  # seconds; a notebook that takes longer than this hangs
TRAIN_LIMIT = 60 * 60  # seconds; the same for training all artefacts
ARTEFACTS = "artefacts"

RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split(), basepath=sys.argv[3])
sys.exit(0 if ok else 1)
"""
TRAIN = """
from llama2_nbdev.pipeline import workspace
ws = workspace()
for name, _ in list(ws.status()): ws.get(name)
"""


def cores() -> int:
    "How many this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict:
    "What the times depend on, without anything that names a person's machine."
    return {
        "cores": cores(),
        "processor": processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "preset": os.environ.get("LLAMA2_PRESET", "tiny"),
    }


def processor() -> str:
    "The processor's model name where the system tells it, else its architecture."
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def child(args: list[str], env: dict, limit: int = LIMIT) -> tuple[bool, float, str]:
    "Run a Python process; whether it succeeded, how long it took, and what it printed."
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=limit)
        ok, text = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or b""
        ok, text = False, f"{said.decode(errors='replace') if isinstance(said, bytes) else said}\nstopped after {limit} s"
    return ok, time.perf_counter() - start, text


def near(new: dict, old: dict) -> bool:
    "Whether every time is within 30 % or 3 s of the recorded one."
    return new.keys() == old.keys() and all(abs(new[k] - old[k]) <= max(3, 0.3 * old[k]) for k in new)


def record(seconds: dict[str, float], complete: bool, path: Path = TIMES) -> bool:
    "Merge measured seconds into `path`; a complete run also drops notebooks that are gone. True if the file changed."
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": {}, "seconds": {}}
    same = old["machine"] == machine()
    kept = {k: v for k, v in old["seconds"].items() if same and (not complete or k == ARTEFACTS)}
    merged = {**kept, **{k: round(v) for k, v in seconds.items()}}
    if same and near(merged, old["seconds"]):
        return False
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "seconds": merged}, indent=1, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return True


def environment() -> dict:
    "The variables the notebooks run with: quiet, no display, and the working tree importable."
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "LLAMA2_PRESET": os.environ.get("LLAMA2_PRESET", "tiny"), "LLAMA2_QUIET": "1", "MPLBACKEND": "agg",
            "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONDONTWRITEBYTECODE": "1"}


def shared_out() -> tuple[dict, int]:
    "`environment` for one of several processes, and how many: small models use two cores better in two processes than in two threads."
    at_once = min(4, cores())
    return {**environment(), "OMP_NUM_THREADS": str(max(1, cores() // at_once))}, at_once


def train(env: dict) -> tuple[bool, float | None]:
    "Make the shared artefacts. The time counts only if nothing was there before."
    print(f"  training the shared artefacts of preset {env['LLAMA2_PRESET']}, or reusing them (minutes) ...", flush=True)
    runs = Path(env.get("LLAMA2_RUNS") or ROOT / "runs")
    fresh = not any((runs / env["LLAMA2_PRESET"]).glob("*/done"))
    ok, seconds, text = child(["-c", TRAIN], env, TRAIN_LIMIT)
    print(f"  {'ok  ' if ok else 'FAIL'} {seconds:6.0f} s  artefacts", flush=True)
    if not ok:
        print(text)
    return ok, seconds if fresh and ok else None


def run(names: list[str], slow: bool = False) -> list[str]:
    "Execute the notebooks whose path contains one of `names` (all if empty); the names of those that failed."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores Ctrl-C, and children would inherit that
    env, seconds, failed = environment(), {}, []
    ok, spent = (True, None) if names else train(env)
    if spent is not None:
        seconds[ARTEFACTS] = spent
    if not ok:
        failed.append(ARTEFACTS)
    chosen = {str(path.relative_to(ROOT / "nbs")): path for path in find()}
    chosen = {name: path for name, path in chosen.items() if not names or any(n in name for n in names)}
    env, at_once = shared_out()
    known = json.loads(TIMES.read_text(encoding="utf-8"))["seconds"] if TIMES.exists() else {}
    longest_first = sorted(chosen.items(), key=lambda item: -known.get(item[0], LIMIT))
    with ThreadPoolExecutor(at_once) as pool:
        jobs = {pool.submit(child, ["-c", RUN, str(path), "" if slow else "slow", str(ROOT)], env): name for name, path in longest_first}
        for job in as_completed(jobs):
            name, (ok, spent, text) = jobs[job], job.result()
            print(f"  {'ok  ' if ok else 'FAIL'} {spent:6.0f} s  {name}", flush=True)
            if ok:
                seconds[name] = spent
            else:
                failed.append(name)
                print("\n".join(text.splitlines()[-40:]))
    record(seconds, complete=not names and not failed)
    return failed


if __name__ == "__main__":
    args = sys.argv[1:]
    sys.exit(1 if run([a for a in args if not a.startswith("--")], slow="--slow" in args) else 0)
