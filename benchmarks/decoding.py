"""Greedy decoding beside `transformers.generate` and llama2.c: the same weights, the same number of tokens."""
import os
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.measure import Row, take_turns
from benchmarks.peers import SHAPES, ours, small, theirs
from llama2_nbdev.model.generate import generate
from llama2_nbdev.model.llama import Llama
from llama2_nbdev.model.weights import load


def jobs(model: Llama, prompts: list[list[int]], n: int) -> dict:
    "Both ways to continue the prompts by n tokens; they are checked to say the same."
    peer = theirs(model.eval()).eval()
    ids = torch.tensor(prompts)

    def ours_():
        return [c.tokens for c in generate(model, prompts, n, temperature=0.)]

    def theirs_():
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
        return out[:, ids.shape[1]:].tolist()
    same = sum(a == b for x, y in zip(ours_(), theirs_()) for a, b in zip(x, y)) / (n * len(prompts))
    assert same > .9, f"only {same:.0%} of the tokens agree"  # fp32 rounding may turn a near tie
    return {"ours": ours_, "transformers.generate": theirs_}


def compare(what: str, model: Llama, batch: int, prompt: int, n: int, rounds: int) -> Row:
    "One model at one batch size."
    prompts = torch.randint(3, model.cfg.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1)).tolist()
    seconds = take_turns(jobs(model, prompts, n), rounds)
    return Row(f"decoding {what}, batch {batch}", "ours", seconds, batch * n, "tok/s", f"greedy, {prompt} + {n} tokens, fp32")


def llama2c(program: str, folder: Path, n: int, rounds: int) -> list[Row]:
    "stories260K beside the C program, which writes one story at a time and reports its own speed."
    model, tok = load(folder / "stories260K.bin")
    model.eval()
    command = [program, str(folder / "stories260K.bin"), "-z", str(folder / "tok512.bin"), "-t", "0", "-n", str(n)]

    def c():
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return n / float(re.search(r"achieved tok/s: ([\d.]+)", said)[1])
    seconds, said = {1: [], 16: []}, []
    for batch in seconds:
        take_turns({"warm": lambda: generate(model, [[tok.bos_id]] * batch, n, temperature=0.)}, 1, 0)
    for _ in range(rounds):
        said.append(c())
        for batch, into in seconds.items():
            into += take_turns({"x": lambda: generate(model, [[tok.bos_id]] * batch, n, temperature=0.)}, 1, 0)["x"]
    return [Row(f"decoding stories260K beside C, batch {batch}", "ours", {"ours": s, "llama2.c": [x * batch for x in said]}, batch * n, "tok/s",
                f"greedy from BOS, {n} tokens, fp32; the C program one row at a time") for batch, s in seconds.items()]


def run(rounds: int = 7, quick: bool = False, llama2c_path: str | None = None, shapes: tuple[str, ...] = tuple(SHAPES), **_) -> list[Row]:
    "All decoding rows."
    prompt, n = (4, 4) if quick else (16, 128)
    models = {name: ours(small(SHAPES[name]) if quick else SHAPES[name]) for name in shapes}
    for m in models.values():
        m.init_weights(std=.08)  # preferences clear enough that rounding seldom changes a token
    real = os.environ.get("LLAMA2_REAL_DATA")
    if real and not quick:
        models["stories260K"] = load(Path(real) / "stories260K" / "stories260K.bin")[0]
    found = [compare(name, model, batch, prompt, n, rounds) for name, model in models.items() for batch in ((1, 2) if quick else (1, 16))]
    if llama2c_path and real:
        found += llama2c(llama2c_path, Path(real) / "stories260K", 200, rounds)
    return found
