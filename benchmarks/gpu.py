"""One GPU: training at the layer shape of 7B, decoding beside the memory's bandwidth, a PPO iteration by parts, peak memory.

    python -m benchmarks.gpu                       # everything, some ten minutes on an A100 or H100
    python -m benchmarks.gpu decoding --micro 1    # one part
    python -m benchmarks.gpu --tiny --out DIR      # tiny shapes, also without a GPU: does it run?

MFU = FLOPs a token * tokens a second / peak. FLOPs a token = `ModelConfig.flops_per_token`: 6 for each matrix parameter
(input embedding left out) and 6 * layers * sequence * dim for attention, the visible (causal) half only; what
checkpointing computes again does not count. Peak: the data sheet's dense bf16 figure (`peak_flops`).
Decoding share = bytes that a step must read (all weights but the embedding table, all keys and values)
/ seconds / the bandwidth that copying or summing a large tensor reaches here, whichever is more.
"""
import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import record
from llama2_nbdev.core import pick_device
from llama2_nbdev.finetuning import ppo_training
from llama2_nbdev.finetuning.ppo import PPOConfig
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.finetuning.rollouts import reward_pair
from llama2_nbdev.model.attention import KVCache, LayerCache, visible_mask
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.pretraining.longrun import peak_flops
from llama2_nbdev.pretraining.training import Run, TrainConfig, next_token_loss, train_step
from llama2_nbdev.world.world import World

PARTS = ("training", "decoding", "ppo")


@dataclass(frozen=True)
class Plan:
    "Sizes of the measurements."
    model: ModelConfig = ModelConfig.preset("7b")
    seq: int = 4096  # tokens of a training row
    rows: int = 16  # of a step; the optimiser runs once a step, as in real training with large batches
    micro: int = 2  # rows of a forward pass
    layers: tuple[int, ...] = (32, 28, 24, 20, 18, 16, 14, 12, 10, 8, 6, 4, 3, 2, 1)  # tried in turn until one fits
    steps: int = 4  # timed steps
    batches: tuple[int, ...] = (1, 4, 16, 64)  # rows that decode together
    context: int = 1024  # slots of the cache, all of them read at each step
    tokens: int = 64  # timed decoding steps
    probe: int = 2**30  # bytes for the bandwidth
    policy: ModelConfig = replace(ModelConfig.preset("small"), vocab_size=1024)  # model of the PPO iteration, with a tokenizer of the toy world
    ppo: PPOConfig = PPOConfig(batch_size=512, mini_batch=64, micro_batch=32, max_new_tokens=128, critic_warmup=0)
    compiled: tuple[bool, ...] = (False, True)


TINY = Plan(replace(ModelConfig.preset("nano"), vocab_size=64), 16, 2, 1, (2,), 1, (1, 2), 16, 2, 2**20,
            replace(ModelConfig.preset("nano"), vocab_size=320), PPOConfig(batch_size=4, mini_batch=2, micro_batch=2, max_new_tokens=4, critic_warmup=0), (False,))


def wait(device: torch.device) -> None:
    "Until all that was started on the device is done."
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable, n: int, device: torch.device) -> list[float]:
    "Time n calls one by one."
    found = []
    for _ in range(n):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - start)
    return found


def forget(device: torch.device) -> None:
    "Give freed memory back and start the peak anew."
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    "Most bytes held by tensors since `forget`; None on a CPU."
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def if_it_fits(work: Callable) -> dict | None:
    "The result, or None where the GPU's memory is too small. The failed tensors are gone on return."
    try:
        return work()
    except torch.OutOfMemoryError:
        return None


def new_model(cfg: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Llama:
    "Random weights, made on the device in their dtype, so that nothing is held twice."
    with torch.device("meta"):
        model = Llama(cfg)
    model = model.to(dtype).to_empty(device=device)
    model.init_weights()
    return model


# Training

def time_training(plan: Plan, device: torch.device, n_layers: int, compiled: bool, recompute: bool) -> dict:
    "Steps of `train_step`: fp32 weights, bf16 autocast, fused AdamW."
    cfg = replace(plan.model, n_layers=n_layers, max_seq_len=plan.seq)
    model = new_model(cfg, device)
    for block in model.layers:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if compiled:
            block.compile()  # one compilation serves all blocks
    run = Run(model, TrainConfig(steps=10**6, lr=1e-5, warmup=1, micro_batch=plan.micro, dtype="bfloat16"), out=None)
    ids = torch.randint(cfg.vocab_size, (plan.rows, plan.seq + 1)).to(device)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": torch.ones_like(ids[:, 1:], dtype=torch.bool)}
    step = partial(train_step, run, batch, next_token_loss)
    step()
    step()
    seconds = seconds_of(step, plan.steps, device)
    rate = plan.rows * plan.seq / median(seconds)
    peak = peak_flops(device, torch.bfloat16)
    return {"layers": n_layers, "params": cfg.n_params(), "compiled": compiled, "checkpointing": recompute, "seq": plan.seq, "rows": plan.rows, "micro": plan.micro,
            "seconds": seconds, "tokens_per_s": rate, "flops_per_token": cfg.flops_per_token(plan.seq), "peak_flops": peak,
            "mfu": cfg.flops_per_token(plan.seq) * rate / peak, "peak_bytes": peak_bytes(device)}


def training(plan: Plan, device: torch.device) -> Iterator[dict]:
    "Every combination of compile and checkpointing, each with as many layers as fit."
    for recompute in (False, True):
        for compiled in plan.compiled:
            for n in plan.layers:
                if device.type == "cuda" and 16 * replace(plan.model, n_layers=n).n_params() > torch.cuda.get_device_properties(device).total_memory:
                    continue  # weights, gradients and AdamW's two averages alone are too much
                forget(device)
                if row := if_it_fits(partial(time_training, plan, device, n, compiled, recompute)):
                    print(f"training: {n} layers, compile {compiled}, checkpointing {recompute}: MFU {row['mfu']:.1%}, {row['tokens_per_s']:,.0f} tok/s, {gib(row)}", flush=True)
                    yield row
                    break
            torch._dynamo.reset()


# Decoding

class Decoder:
    "Greedy decoding with static shapes: the same few tensors at every step, so that a CUDA graph can replay it."

    def __init__(self, model: Llama, batch: int, length: int, start: int):
        cfg, weight = model.cfg, model.tok_embeddings.weight
        self.model, self.rows = model, torch.arange(batch, device=weight.device)[:, None]
        self.cache = KVCache(cfg.n_layers, batch, length, cfg.n_kv_heads, cfg.head_dim, weight.dtype, weight.device)
        self.tokens, self.positions = torch.zeros_like(self.rows), torch.full_like(self.rows, start)

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        "`Llama.forward` for one token a row; the mask hides what the cache does not hold yet."
        m, mask = self.model, visible_mask(positions, self.cache.max_len)
        cos, sin, x = m.rope_cos[positions], m.rope_sin[positions], m.tok_embeddings(tokens)
        for i, layer in enumerate(m.layers):
            x = layer(x, cos, sin, mask, LayerCache(self.cache.k[i], self.cache.v[i], (self.rows, positions), self.cache.max_len))
        return m.output(m.norm(x))[:, -1]

    @torch.no_grad()
    def step(self) -> None:
        "The next token of every row."
        self.tokens.copy_(self.logits(self.tokens, self.positions).argmax(-1, keepdim=True))
        self.positions.add_(1)

    def bytes_read(self) -> int:
        "What a step cannot avoid to read."
        weights = sum(p.nbytes for p in self.model.parameters())
        table = 0 if self.model.cfg.tie_embeddings else self.model.tok_embeddings.weight.nbytes
        return weights - table + self.cache.k.nbytes + self.cache.v.nbytes


def graphed(step: Callable, device: torch.device) -> Callable:
    "The step as one CUDA graph (on a CPU: the step itself)."
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def bandwidth(device: torch.device, nbytes: int) -> float:
    "Bytes a second of the faster of two simple jobs: copy a tensor (read and write), sum it (read)."
    x = torch.zeros(nbytes // 4, device=device)
    y = torch.empty_like(x)
    for work in (lambda: y.copy_(x), x.sum):
        work()
    return max(2 * x.nbytes / min(seconds_of(lambda: y.copy_(x), 10, device)), x.nbytes / min(seconds_of(x.sum, 10, device)))


def time_decoding(model: Llama, plan: Plan, device: torch.device, batch: int, mode: str, peak: float) -> dict:
    "One batch size and one way to run the step."
    warm = 8  # steps before the clock starts: capture and warm-up
    decoder = Decoder(model, batch, plan.context, max(0, plan.context - plan.tokens - warm))
    for block in model.layers:
        block._compiled_call_impl = None  # undo what an earlier mode did
        if "compiled" in mode:
            block.compile(dynamic=False, options={"coordinate_descent_tuning": True})
    step = graphed(decoder.step, device) if "graph" in mode else decoder.step
    step()
    seconds = median(seconds_of(step, plan.tokens, device))
    return {"mode": mode, "batch": batch, "context": plan.context, "seconds_per_step": seconds, "tokens_per_s": batch / seconds, "bytes_read": decoder.bytes_read(),
            "bandwidth": peak, "bandwidth_share": decoder.bytes_read() / seconds / peak, "peak_bytes": peak_bytes(device)}


def decoding(plan: Plan, device: torch.device) -> Iterator[dict]:
    "All batch sizes, eager and as a CUDA graph, with and without compilation; weights and cache in bf16."
    peak = bandwidth(device, plan.probe)
    print(f"memory bandwidth {peak / 1e9:,.0f} GB/s", flush=True)
    model = new_model(replace(plan.model, max_seq_len=max(plan.model.max_seq_len, plan.context)), device, torch.bfloat16).eval().requires_grad_(False)
    for batch in plan.batches:
        for mode in ("eager", "graph") + ("compiled graph",) * (True in plan.compiled):
            forget(device)
            if row := if_it_fits(partial(time_decoding, model, plan, device, batch, mode, peak)):
                print(f"decoding: batch {batch}, {mode}: {row['tokens_per_s']:,.0f} tok/s, {row['bandwidth_share']:.0%} of the bandwidth, {gib(row)}", flush=True)
                yield row
            torch._dynamo.reset()


# PPO

@contextmanager
def stopwatch(name: str, into: dict, device: torch.device) -> Iterator[None]:
    "Inside `with`, the seconds of every call of `ppo_training.<name>` are added up."
    plain = getattr(ppo_training, name)

    def timed(*args, **kwargs):
        done = []
        into[name] = into.get(name, 0.) + seconds_of(lambda: done.append(plain(*args, **kwargs)), 1, device)[0]
        return done[0]
    setattr(ppo_training, name, timed)
    try:
        yield
    finally:
        setattr(ppo_training, name, plain)


def ppo(plan: Plan, device: torch.device) -> Iterator[dict]:
    "Two iterations with random weights on the toy prompts; the second is reported. Generation keeps a KV cache, so no prefix is read twice."
    files = World(seed=0).files()
    rows = list(islice(files["prompts.jsonl"], 2 * plan.ppo.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train((r["text"] for r in islice(files["pretrain.jsonl"], 1500)), plan.policy.vocab_size, Path(folder) / "tok.model")
        tok = Tokenizer(Path(folder) / "tok.model")
    forget(device)
    policy = new_model(plan.policy, device)
    critic, helpful, safe = (RewardModel(new_model(plan.policy, device)).to(device) for _ in range(3))
    run = ppo_training.PPORun(policy, deepcopy(policy), critic, plan.ppo, len(rows), None)
    rewards = reward_pair(helpful, safe, tok)
    for _ in range(2):
        parts = {}
        with stopwatch("rollout", parts, device), stopwatch("_learn", parts, device):
            total = seconds_of(lambda: ppo_training.ppo_step(run, tok, rows, rewards), 1, device)[0]
    generation, learning = parts["rollout"], parts["_learn"]
    row = {"params": plan.policy.n_params(), "answers": plan.ppo.batch_size, "max_new_tokens": plan.ppo.max_new_tokens, "seconds": total, "generation": generation,
           "scoring": total - generation - learning, "training": learning, "generation_share": generation / total, "peak_bytes": peak_bytes(device)}
    print(f"PPO iteration: {total:.2f} s = generation {generation:.2f} + scoring {row['scoring']:.2f} + training {learning:.2f}, {gib(row)}", flush=True)
    yield row


def gib(row: dict) -> str:
    "Peak memory in words."
    return "memory not measured" if row["peak_bytes"] is None else f"peak {row['peak_bytes'] / 2**30:.1f} GiB"


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    "Measure, print as it goes, write results/<hardware>/gpu-<part>.json."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; nothing: all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--micro", type=int, help="rows of a forward pass in training")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the records")
    args = parser.parse_args(argv)
    if unknown := [p for p in args.parts if p not in PARTS]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    device, plan = pick_device(), TINY if args.tiny else Plan()
    if device.type != "cuda" and not args.tiny:
        parser.error("no CUDA device was found; `--tiny` tries the code on tiny shapes")
    plan, found = replace(plan, micro=args.micro or plan.micro), {}
    for part in args.parts or PARTS:
        found[part] = list({"training": training, "decoding": decoding, "ppo": ppo}[part](plan, device))
        print(f"-> {record(f'gpu-{part}', [], args.out, measured=found[part])}", flush=True)
    return found


if __name__ == "__main__":
    main()
