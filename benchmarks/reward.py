"""One step of reward-model training beside trl's `RewardTrainer`: the same weights, pairs and margins."""
import tempfile
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import Row, take_turns
from benchmarks.peers import SHAPES, ours, small, theirs
from llama2_nbdev.core import pick_dtype
from llama2_nbdev.finetuning.reward import RewardModel, pad_rows, pair_loss
from llama2_nbdev.pretraining.training import Run, TrainConfig, train_step

PAD = 0


def make_pairs(vocab: int, n: int, longest: int) -> list[dict]:
    "Pairs of random answers, as trl wants them; lengths between half of the longest and the longest."
    g = torch.Generator().manual_seed(0)

    def ids():
        return torch.randint(3, vocab, (int(torch.randint(longest // 2, longest + 1, (), generator=g)),), generator=g).tolist()
    return [{"chosen_ids": ids(), "rejected_ids": ids(), "margin": 1 / 3} for _ in range(n)]


def our_step(model: RewardModel, pairs: list[dict], dtype: torch.dtype) -> Callable:
    "A step of `fit` with the ranking loss."
    run = Run(model, TrainConfig(steps=10**6, lr=1e-4, warmup=10, dtype=str(dtype).removeprefix("torch.")), out=None)
    tokens, lengths = pad_rows([p[k] for p in pairs for k in ("chosen_ids", "rejected_ids")])
    batch = {"tokens": tokens.view(len(pairs), 2, -1), "lengths": lengths.view(-1, 2), "margin": torch.tensor([p["margin"] for p in pairs]),
             "unsafe": torch.full((len(pairs), 2), -1.)}
    return lambda: train_step(run, batch, pair_loss())["loss"]


def trl_step(model: nn.Module, pairs: list[dict], dtype: torch.dtype, folder: str) -> Callable:
    "The trainer's own `training_step`, then clipping and fused AdamW as `Trainer` does it."
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": 2, "<unk>": 3}, unk_token="<unk>"))
    args = RewardConfig(folder, per_device_train_batch_size=len(pairs), activation_checkpointing=False, bf16=dtype == torch.bfloat16, use_cpu=True,
                        report_to=[], disable_tqdm=True, max_length=None, remove_unused_columns=False)
    trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list(pairs),
                            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"))
    trainer.current_gradient_accumulation_steps = 1  # what `trainer.train()` would set
    inputs, weights = trainer.data_collator(pairs), list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(.9, .95), eps=1e-5, weight_decay=.1, fused=True)
    model.train()

    def step():
        loss = trainer.training_step(model, dict(inputs))
        nn.utils.clip_grad_norm_(weights, 1.)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


def run(rounds: int = 15, quick: bool = False, **_) -> list[Row]:
    "The tiny model; bf16 only where a probe says that it pays."
    cfg, n, longest, found = (small(SHAPES["tiny"]), 2, 12, []) if quick else (SHAPES["tiny"], 32, 96, [])
    pairs = make_pairs(cfg.vocab_size, n, longest)
    for dtype in dict.fromkeys((torch.float32, torch.float32 if quick else pick_dtype(torch.device("cpu")))):
        model = ours(cfg)
        peer = theirs(model, "LlamaForSequenceClassification", num_labels=1, pad_token_id=PAD)
        mine = RewardModel(model)
        with torch.no_grad():
            peer.score.weight.copy_(mine.head.weight)
        with tempfile.TemporaryDirectory() as folder:
            jobs = {"ours": our_step(mine, pairs, dtype), "trl RewardTrainer": trl_step(peer, pairs, dtype, folder)}
            first = [job() for job in jobs.values()]
            assert abs(first[0] - first[1]) < 1e-2, f"the losses differ: {first}"
            seconds = take_turns(jobs, rounds)
        label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        found.append(Row(f"reward model tiny {label}", "ours", seconds, n, "pairs/s", f"{n} pairs of up to {longest} tokens"))
    return found
