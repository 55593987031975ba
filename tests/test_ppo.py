"""The arithmetic of PPO on numbers, and a loop that goes on where it was killed."""
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.ppo import (PPOConfig, clipped_policy_loss, combine_rewards, combined_logit, gae, kl_estimate, token_rewards,
                                         whiten)
from llama2_nbdev.finetuning.ppo_training import score_rollout, train_ppo
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.finetuning.rollouts import answer_logprobs, critic_from, rollout, sequence_kl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_safety_model_speaks_below_the_threshold_or_by_tag():
    safety, helpful, tag = torch.tensor([.149, .15, .151, .9]), torch.full((4,), .7), torch.tensor([False, False, False, True])
    assert torch.equal(combine_rewards(safety, helpful, tag), torch.tensor([.149, .7, .7, .9]))  # trap 39: strictly below 0.15
    linear = combined_logit(torch.logit(safety), torch.logit(helpful), tag)
    assert torch.allclose(linear.sigmoid(), combine_rewards(safety, helpful, tag), atol=1e-6)
    assert math.isclose(torch.logit(torch.tensor(.15)).item(), -1.7346, abs_tol=1e-4)


def test_whitening_removes_the_mean_and_survives_equal_scores():
    x = torch.randn(50) * 3 + 7
    w = whiten(x)
    assert abs(w.mean()) < 1e-5 and abs(w.std() - 1) < .02  # trap 40: the mean is not added back
    mask = torch.arange(50) < 30
    inside = whiten(x, mask)[mask]
    assert abs(inside.mean()) < 1e-5  # trap 40: what is masked does not count
    assert torch.isfinite(whiten(torch.ones(5))).all()  # trap 39: no variance, no division by zero


def test_kl_estimators_have_the_right_sign_and_mean():
    pi, ref = torch.tensor([.7, .2, .1]), torch.tensor([.4, .3, .3])
    logs = [kl_estimate(pi.log(), ref.log(), k) for k in ("k1", "k2", "k3")]
    exact = (pi * (pi / ref).log()).sum()
    assert math.isclose(exact, .2008, abs_tol=1e-4)
    for k in (logs[0], logs[2]): assert torch.isclose((pi * k).sum(), exact, atol=1e-6)  # trap 37
    wrong = (pi * kl_estimate(ref.log(), pi.log(), "k3")).sum()
    assert math.isclose(wrong, .1909, abs_tol=1e-4)  # trap 37: the reversed estimator looks alike and is not
    assert (logs[2] >= 0).all()


def test_k1_as_a_loss_teaches_nothing():
    logits = torch.zeros(3, requires_grad=True)
    pi, ref = logits.softmax(0), torch.tensor([.6, .3, .1])
    (pi.detach() * kl_estimate(logits.log_softmax(0), ref.log())).sum().backward()
    assert logits.grad.abs().max() < 1e-6  # trap 38: so it belongs into the reward


def test_the_reward_falls_on_the_last_sampled_token_and_the_kl_on_each():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]]).bool()
    kl = torch.full((2, 4), .5)
    r = token_rewards(torch.tensor([10., -10.]), kl, mask, beta=.2)
    assert torch.allclose(r, torch.tensor([[0., -.1, 9.9, 0.], [-.1, -.1, -.1, -10.1]]))  # traps 38, 41, 49


def test_gae_counts_nothing_after_the_end():
    mask = torch.tensor([[1, 1, 0]]).bool()
    rewards, values = torch.tensor([[0., 1., 99.]]), torch.tensor([[.2, .4, 77.]])
    advantages, returns = gae(rewards, values, mask, gamma=1., lam=1.)
    assert torch.allclose(advantages[0, :2], torch.tensor([.8, .6]))  # trap 43
    assert torch.allclose(returns[0, :2], torch.tensor([1., 1.])) and advantages[0, 2] == 0
    one_step, _ = gae(rewards, values, mask, gamma=1., lam=0.)
    assert torch.allclose(one_step[0, :2], torch.tensor([.2, .6]))


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient_and_clipping_stops_it():
    mask, advantage = torch.ones(1, 2).bool(), torch.tensor([[1., -2.]])
    logprobs = torch.tensor([[-1., -2.]], requires_grad=True)
    clipped_policy_loss(logprobs, logprobs.detach(), advantage, mask, .2)[0].sum().backward()
    assert torch.allclose(logprobs.grad, -advantage)  # trap 46
    far = torch.tensor([[-1. + .5, -2. - .5]], requires_grad=True)
    clipped_policy_loss(far, logprobs.detach(), advantage, mask, .2)[0].sum().backward()
    assert far.grad.abs().max() == 0  # both moved the right way, beyond the clip


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


def test_rollouts_are_scored_under_the_distribution_they_were_drawn_from(tok):
    policy = small_model(tok, 0)
    for temperature in (1., .7):
        cfg = replace(CFG, temperature=temperature)
        r = rollout(policy, tok, ROWS, cfg, 0)
        logprobs, _ = answer_logprobs(policy, r.tokens, r.mask, temperature)
        assert torch.allclose(logprobs, r.sampled, atol=1e-4)  # traps 44, 46, 48
    assert len({tuple(t.tolist()) for t in rollout(policy, tok, ROWS[:1] * 8, CFG, 0).tokens}) > 1  # trap 45: random, not greedy
    assert (sequence_kl(policy, deepcopy(policy), r, cfg).abs() < 1e-4).all()


def test_the_missing_eos_is_looked_for_in_the_answer_only(tok):
    r = rollout(small_model(tok, 0), tok, ROWS, CFG, 0)
    last = [row[mask.nonzero().max() + 1].item() for row, mask in zip(r.tokens, r.mask)]
    assert r.truncated.tolist() == [t != tok.eos_id for t in last]  # trap 42


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
