"""Our models beside the same models in `transformers`, with the same weights."""
import tempfile
from dataclasses import replace

import torch

from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.weights import save_hf

SHAPES = {"tiny": ModelConfig.preset("tiny"),  # 1 M parameters
          "10m": ModelConfig(320, 8, 10, 5, vocab_size=4096, multiple_of=32, max_seq_len=1024)}


def ours(cfg: ModelConfig, seed: int = 0) -> Llama:
    "A freshly initialised model."
    torch.manual_seed(seed)
    return Llama(cfg)


def theirs(model: Llama, kind: str = "LlamaForCausalLM", **settings):
    "The same weights in `transformers`, with its SDPA attention."
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, None, folder)
        return getattr(transformers, kind).from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32, **settings)


def small(cfg: ModelConfig) -> ModelConfig:
    "The same with little of everything, for a quick trial."
    return replace(cfg, n_layers=2, vocab_size=min(cfg.vocab_size, 256))
