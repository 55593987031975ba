"""The whole check of the project, in four steps (`make test`).

Use: python tools/run_tests.py [--slow]     exit 1 if any step fails; every step runs even if an earlier one failed
"""
import subprocess
import sys
import time

import check_sync
import run_notebooks

ROOT = run_notebooks.ROOT


def report(number: int, title: str, found: list[str], start: float) -> bool:
    "One line a step, and under it what was found."
    state = "ok" if not found else "FAILED"
    print(f"[{number}/4] {title:<24} {state:<6} {time.perf_counter() - start:5.0f} s", flush=True)
    for line in found:
        print(f"      {line}", flush=True)
    return not found


def main(slow: bool) -> int:
    "Run the four steps; the exit code."
    failed = []
    for number, name, title in ((1, "export", "package in sync"), (2, "clean", "notebooks clean")):
        start = time.perf_counter()
        check, remedy = check_sync.CHECKS[name]
        found = check()
        if not report(number, title, found and [*found, f"-> {remedy}"], start):
            failed.append(title)
    start = time.perf_counter()
    if not report(3, "notebooks executed", run_notebooks.run([], slow), start):
        failed.append("notebooks executed")
    print("[4/4] pytest", flush=True)
    env, at_once = run_notebooks.shared_out()
    chosen = ["-m", ""] if slow else []  # pyproject.toml leaves the slow tests out
    workers = ["-n", str(at_once), "--dist", "loadfile"] # a file's tests share what they prepare
    if subprocess.run([sys.executable, "-m", "pytest", "-q", *workers, *chosen], cwd=ROOT, env=env).returncode:
        failed.append("pytest")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main("--slow" in sys.argv[1:]))
