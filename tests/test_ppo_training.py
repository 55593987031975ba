"""The loop of PPO: one step a mini-batch, ratio one at first, and the same weights after a stop."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.ppo import PPOConfig
from llama2_nbdev.finetuning.ppo_training import score_rollout, train_ppo
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.finetuning.rollouts import critic_from, rollout
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    texts = ["[INST] Where does Mara live? [/INST] Mara lives in Sydney. "] * 20
    return Tokenizer.train(texts, 300, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def small_model(tok, seed: int) -> Llama:
    torch.manual_seed(seed)
    return Llama(ModelConfig(32, 2, 4, 2, vocab_size=tok.vocab_size, multiple_of=8, max_seq_len=128)).eval()


ROWS = [{"id": str(i), "messages": [{"role": "user", "content": f"Where does {name} live?"}], "kind": "helpful"}
        for i, name in enumerate(("Mara", "Tom", "Uma", "Gina", "Otis", "Rosa", "Ivan", "Dina"))]
CFG = PPOConfig(iterations=4, batch_size=8, mini_batch=4, micro_batch=2, max_new_tokens=6, critic_warmup=0, checkpoint_every=1, dev_every=99)


def length_reward(rows, answers):
    scores = torch.tensor([float(len(a)) for a in answers])
    return scores, torch.full_like(scores, 3.)


def run_ppo(tok, out, iterations: int):
    policy, rm = small_model(tok, 0), RewardModel(small_model(tok, 1))
    history = train_ppo(policy, deepcopy(policy), critic_from(rm), tok, ROWS, length_reward, replace(CFG, iterations=iterations), out)
    return policy, history


def test_the_first_step_has_ratio_one_and_models_may_not_share_weights(tok):
    policy, history = run_ppo(tok, None, 1)
    assert history[0]["first_move"] < 1e-5 and abs(history[0]["kl"]) < 1e-5  # traps 46, 51: the KL is to the reference
    rm = RewardModel(small_model(tok, 1))
    with pytest.raises(UserError, match="share weights"): train_ppo(policy, policy, critic_from(rm), tok, ROWS, length_reward, CFG)  # trap 47


def test_batches_split_into_mini_batches_of_one_step_each(tok):
    policy, rm = small_model(tok, 0), RewardModel(small_model(tok, 1))
    minis = score_rollout(policy, deepcopy(policy), rm, rollout(policy, tok, ROWS, CFG, 0), CFG)
    assert [len(m["tokens"]) for m in minis] == [4, 4]  # trap 50
    assert not minis[0]["logprobs"].requires_grad and not minis[0]["values"].requires_grad  # trap 43: old values are constants
    with pytest.raises(UserError, match="multiple"): PPOConfig(batch_size=10, mini_batch=4)


def test_a_stopped_run_ends_with_the_same_weights(tok, tmp_path):
    whole, _ = run_ppo(tok, tmp_path / "whole", 4)
    run_ppo(tok, tmp_path / "part", 2)
    part, history = run_ppo(tok, tmp_path / "part", 4)  # trap 55: policy, critic, optimisers, prompts and streams come back
    assert [r["step"] for r in history] == [1, 2, 3, 4]
    for a, b in zip(whole.parameters(), part.parameters()): assert torch.equal(a, b)
