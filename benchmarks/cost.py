"""Linear cost: time and memory of data preparation, training and evaluation as the work grows tenfold and a hundredfold.

Each kind of work runs in a process of its own, sizes ascending, so its peak memory can be told apart. The exponent p of
`seconds ~ size ** p` is fitted by least squares in logarithms: 1 is linear, below 1 a fixed cost is still seen.
"""
import math
import multiprocessing
import queue
import resource
import sys
import tempfile
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.measure import Row
from llama2_nbdev.core import read_jsonl, write_jsonl
from llama2_nbdev.evaluation import EvaluateConfig, evaluate
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.pretraining.data import PretrainBatches, TokenData, tokenize_corpus
from llama2_nbdev.pretraining.training import TrainConfig, fit, next_token_loss
from llama2_nbdev.world.world import World

SIZES = (1, 10, 100)
UNIT = {"data preparation": 100, "training": 4, "evaluation": 16}  # at size 1: documents, steps of 16 x 128 tokens, prompts


def rows_of(file: str, n: int) -> list[dict]:
    "n rows of a file of the toy world; it is repeated where it is too short."
    return list(islice(cycle(World(seed=0).files()[file]), n))


def prepare(folder: Path, n: int) -> None:
    "A corpus file of n documents becomes shards."
    tokenize_corpus(Tokenizer(folder / "tok.model"), folder / f"{n}.jsonl", folder / f"shards{n}", .02)


def train(folder: Path, n: int) -> None:
    "n steps of a nano model."
    batches = PretrainBatches(TokenData(folder / "shards"), batch_size=16, seq_len=128)
    fit(Llama(nano(folder)), batches, next_token_loss, TrainConfig(steps=n, lr=1e-3, warmup=1, dtype="float32"))


def judge(folder: Path, n: int) -> None:
    "A nano model answers n prompts of the evaluation file, and the answers are scored."
    torch.manual_seed(0)
    evaluate(Llama(nano(folder)).eval(), Tokenizer(folder / "tok.model"), read_jsonl(folder / "eval.jsonl")[:n], EvaluateConfig(max_new_tokens=16))


def nano(folder: Path) -> ModelConfig:
    "The nano model for our tokenizer."
    return replace(ModelConfig.preset("nano"), vocab_size=Tokenizer(folder / "tok.model").vocab_size)


WORK = {"data preparation": prepare, "training": train, "evaluation": judge}


def peak_bytes() -> int:
    "The most memory this process has held."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(what: str, folder: str, counts: list[int], threads: int, results) -> None:
    "Child process: seconds and growth of the peak for each size, after one warm-up."
    torch.set_num_threads(threads)
    WORK[what](Path(folder), counts[0])
    base = peak_bytes()
    for n in counts:
        start = time.perf_counter()
        WORK[what](Path(folder), n)
        results.put((n, time.perf_counter() - start, peak_bytes() - base))


def exponent(sizes: list[int], seconds: list[float]) -> float:
    "Slope of log seconds over log size."
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)


def inputs(folder: Path, sizes: tuple[int, ...]) -> None:
    "The files that the work reads: tokenizer, corpora, one set of shards."
    counts = [UNIT["data preparation"] * s for s in sizes]
    rows = rows_of("pretrain.jsonl", max(counts))
    write_jsonl(folder / "eval.jsonl", rows_of("eval.jsonl", UNIT["evaluation"] * sizes[-1]))
    texts = [r["text"] for r in rows[:2000]]
    Tokenizer.train(texts, 1024 if len(texts) > 1000 else 400, folder / "tok.model")
    for n in counts:
        write_jsonl(folder / f"{n}.jsonl", rows[:n])
    tokenize_corpus(Tokenizer(folder / "tok.model"), folder / f"{counts[-1]}.jsonl", folder / "shards", .02)


def run(quick: bool = False, sizes: tuple[int, ...] | None = None, **_) -> list[Row]:
    "One row for each kind of work; `extra` holds the sizes, seconds, bytes and the fitted exponent."
    sizes, found = sizes or ((1, 2) if quick else SIZES), []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        inputs(Path(folder), sizes)
        for what, unit in UNIT.items():
            results = queue.SimpleQueue() if quick else context.SimpleQueue()
            args = what, folder, [unit * s for s in sizes], torch.get_num_threads(), results
            if quick:
                measure(*args)
            else:
                child = context.Process(target=measure, args=args)
                child.start()
                child.join()
                if child.exitcode:
                    raise RuntimeError(f"{what} failed with code {child.exitcode}")
            counts, seconds, grown = zip(*(results.get() for _ in sizes))
            p = exponent(counts, seconds)
            last = exponent(counts[-2:], seconds[-2:])
            found.append(Row(what, f"x{sizes[-1]}", {f"x{s}": [t / s] for s, t in zip(sizes, seconds)}, unit,
                             {"data preparation": "docs/s", "training": "steps/s", "evaluation": "prompts/s"}[what],
                             f"seconds ~ size ** {p:.2f}, {last:.2f} at the end; memory grows by {grown[-1] / 2**20:.0f} MiB", {"counts": counts, "seconds": seconds, "grown_bytes": grown, "exponent": p, "exponent_at_the_end": last}))
    return found


def figure(rows: list[Row], path: Path) -> None:
    "Seconds and memory over size, both axes logarithmic, with a line of slope 1."
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), dpi=80, layout="constrained")
    for row, style in zip(rows, ("o-", "s--", "^:")):
        counts, e = row.extra["counts"], row.extra
        sizes = [n / counts[0] for n in counts]
        axes[0].loglog(sizes, e["seconds"], style, label=f"{row.what} ({e['exponent_at_the_end']:.2f} at the end)")
        axes[1].semilogx(sizes, [b / 2**20 for b in e["grown_bytes"]], style)
    axes[0].loglog(sizes, [rows[0].extra["seconds"][0] * x for x in sizes], color="gray", lw=.8, label="linear (1.00)")
    axes[0].set(xlabel="size", ylabel="seconds", title="Time grows linearly"), axes[0].legend(frameon=False, fontsize=7)
    axes[1].set(xlabel="size", ylabel="MiB above the smallest size", title="Peak memory")
    fig.savefig(path)
    plt.close(fig)
