"""Turns, ratios with their spread, and a record that says on what they were measured."""
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from llama2_nbdev.core import read_json, write_json

PACKAGES = ("torch", "transformers", "trl", "numpy")


@dataclass(frozen=True)
class Row:
    "One comparison: what was done, the seconds of every turn, and a rate for the reader."
    what: str  # the work, in words
    ours: str  # name of our job in `seconds`
    seconds: dict[str, list[float]]  # of every job, one entry a turn
    amount: float = 1.  # units of work in a turn
    unit: str = "steps/s"
    note: str = ""
    extra: dict = field(default_factory=dict)  # further figures, for the record

    def rate(self, job: str) -> float:
        "Units of work a second, from the median turn."
        return self.amount / statistics.median(self.seconds[job])

    def ratio(self, job: str) -> tuple[float, float, float]:
        "How many times as fast we are as `job`: median and quartiles over the turns."
        ratios = [theirs / mine for theirs, mine in zip(self.seconds[job], self.seconds[self.ours])]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return middle, low, high


def take_turns(jobs: dict[str, Callable], rounds: int, warmup: int = 1, wait: Callable = lambda: None) -> dict[str, list[float]]:
    "Seconds of each job in each round. The jobs alternate; each round begins with the next one."
    names, seconds = list(jobs), {name: [] for name in jobs}
    for r in range(-warmup, rounds):
        gc.collect()
        for k in range(len(names)):
            name = names[(k + r) % len(names)]
            wait()
            start = time.perf_counter()
            jobs[name]()
            wait()
            if r >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(rows: list[Row]) -> str:
    "A line for each comparison: our rate, theirs, and the ratio with its quartiles."
    lines = [f"{'what':<52} {'ours':>22} {'beside':<26} {'theirs':>10} {'ratio':>6}  quartiles"]
    for row in rows:
        for job in row.seconds:
            if job != row.ours:
                middle, low, high = row.ratio(job)
                mine = f"{row.rate(row.ours):,.5g} {row.unit}"
                lines.append(f"{row.what:<52} {mine:>22} {job:<26} {row.rate(job):>10,.5g} {middle:>6.2f}  {low:.2f} to {high:.2f}  {row.note}")
    return "\n".join(lines)


def hardware() -> dict:
    "What the times depend on, without anything that names somebody's machine."
    cuda = torch.cuda.is_available()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return {"processor": names[0].strip() if names else platform.machine(), "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if cuda else None,
            "gpu_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
            "system": platform.system(), "python": platform.python_version(), "cuda": torch.version.cuda,
            "versions": {p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def slug(box: dict) -> str:
    "Name of the folder of a machine's results: its GPU, or its processor and cores."
    name = box["gpu"] or f"{box['processor']} {box['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("processor", "")).strip("-")


def record(name: str, rows: list[Row], out: Path, **more) -> Path:
    "Write results/<hardware>/<name>.json: machine, versions, every turn, rates and ratios. Rows measured earlier on this machine stay."
    box = hardware()
    path = Path(out) / slug(box) / f"{name}.json"
    found = [asdict(r) | {"rates": {job: r.rate(job) for job in r.seconds},
                          "ratios": {job: dict(zip(("median", "low", "high"), r.ratio(job))) for job in r.seconds if job != r.ours}}
             for r in rows]
    old = read_json(path) if path.exists() else {}
    kept = [r for r in old.get("rows", []) if old["machine"] == box and r["what"] not in [f["what"] for f in found]]
    write_json(path, {"machine": box, "rows": kept + found} | more)
    return path
