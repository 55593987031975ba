"""One training step: forward, backward, clipping and AdamW, beside `transformers` as people run it."""
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import Row, take_turns
from benchmarks.peers import SHAPES, ours, small, theirs
from llama2_nbdev.core import pick_dtype
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.pretraining.training import Run, TrainConfig, next_token_loss, train_step

ROWS = {"tiny": (32, 128), "10m": (8, 256)}  # rows and tokens of a batch
AT_ONCE = 2  # parts of a batch in "ours eager, in parts": its activations stay nearer to the core (`TrainConfig.micro_batch`)


def our_step(model: Llama, ids: torch.Tensor, dtype: torch.dtype, parts: int = 1) -> Callable:
    "A step of our training loop, checks and gradient norm included."
    config = TrainConfig(steps=10**6, lr=1e-4, warmup=10, dtype=str(dtype).removeprefix("torch."), micro_batch=len(ids) // parts)
    run = Run(model, config, out=None)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": torch.ones_like(ids[:, 1:], dtype=torch.bool)}
    return lambda: train_step(run, batch, next_token_loss)["loss"]


def their_step(model: nn.Module, ids: torch.Tensor, dtype: torch.dtype) -> Callable:
    "The usual loop: loss from the model, clip at 1, fused AdamW. The labels are shifted inside, hence one token more."
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(.9, .95), eps=1e-5, weight_decay=.1, fused=True)

    def step():
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def compare(what: str, cfg: ModelConfig, rows: tuple[int, int], dtype: torch.dtype, rounds: int, compiled: bool) -> list[Row]:
    "Eager against eager, our step also in parts, and, if wanted, compiled against compiled."
    b, t = rows
    ids = torch.randint(cfg.vocab_size, (b, t + 1), generator=torch.Generator().manual_seed(0))
    jobs, label = {}, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    for mode in ("eager", "compiled")[:1 + compiled]:
        model = ours(cfg)
        peer = theirs(model).train()
        if mode == "compiled":
            model.compile()
            peer.compile()
        jobs |= {f"ours {mode}": our_step(model, ids, dtype), f"transformers {mode}": their_step(peer, ids[:, :-1], dtype)}
    jobs["ours eager, in parts"] = our_step(ours(cfg), ids, dtype, AT_ONCE)
    seconds = take_turns(jobs, rounds, warmup=2)
    peers = [k for k in jobs if k.startswith("transformers")]
    return [Row(f"training {what} {label}, {mine.removeprefix('ours ')}", mine, {k: seconds[k] for k in (mine, *(peers[-1:] if "compiled" in mine else peers))},
                b * t, "tok/s", f"{b} x {t} tokens, {cfg.n_params():,} parameters") for mine in jobs if mine not in peers]


def run(rounds: int = 15, quick: bool = False, shapes: tuple[str, ...] = tuple(SHAPES), **_) -> list[Row]:
    "All training rows; bf16 only where a probe says that this machine computes in it."
    found = []
    for name in shapes:
        cfg = SHAPES[name]
        for dtype in dict.fromkeys((torch.float32, pick_dtype(torch.device("cpu")))):
            if quick and dtype != torch.float32:
                continue
            shape = (small(cfg), (2, 16)) if quick else (cfg, ROWS[name])
            found += compare(name, *shape, dtype, rounds, compiled=not quick)
    return found
