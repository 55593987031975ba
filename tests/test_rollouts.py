"Rollouts: which prompts, what is sampled is what is scored, the place of EOS and mask, frozen judges; traps 41 to 48 and 51."
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.finetuning.chat import encode_prompt
from llama2_nbdev.finetuning.ppo import PPOConfig
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.finetuning.rollouts import (
    answer_logprobs, answer_values, critic_from, linear_reward, prompt_order, reward_pair, rollout, sequence_kl)
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CFG = PPOConfig(batch_size=8, mini_batch=4, micro_batch=2, max_new_tokens=10)
close = torch.testing.assert_close


def said(role, text): return {"role": role, "content": text}


ROWS = [{"messages": [said("user", f"Where does {n} live?")], "kind": "safety" if i % 4 == 3 else "helpful"}
        for i, n in enumerate("Mira Otto Lena Paul Nora Emil Ada".split())]
ROWS.append({"messages": [said("user", "Hi!"), said("assistant", "Hello!"), said("user", "Where does Max live, and why?")], "kind": "helpful"})


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [m["content"] for r in ROWS for m in r["messages"]] * 3 + ["Hello! [INST] [/INST] <<SYS>> <</SYS>>"]
    return Tokenizer.train(texts, 310, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def llama(tok, seed=0):
    torch.manual_seed(seed)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=128))
    with torch.no_grad():
        model.output.weight.mul_(8)  # a random model that prefers some tokens ...
        model.output.weight[tok.eos_id] = model.output.weight[5]
    return model


@given(st.integers(1, 40), st.integers(0, 9), st.sampled_from([4, 8]))
@settings(max_examples=30, deadline=None)
def test_every_prompt_comes_once_a_pass_and_the_order_needs_no_memory(n, seed, size):  # trap 55
    cfg = PPOConfig(batch_size=size, mini_batch=4, seed=seed)
    asked = [i for it in range(-(-2 * n // size)) for i in prompt_order(n, cfg, it)]
    assert sorted(asked[:n]) == sorted(asked[n:2 * n]) == list(range(n))
    assert prompt_order(n, cfg, 1) == prompt_order(n, cfg, 1)


def test_the_mask_is_the_answer_with_its_eos(tok):  # traps 41, 42
    r = rollout(llama(tok, 3), tok, ROWS, CFG, 0)
    assert 0 < r.truncated.sum() < len(ROWS), "the test needs answers of both kinds"
    for i, row in enumerate(ROWS):
        answer = r.tokens[i, 1:][r.mask[i]].tolist()
        assert r.tokens[i, :r.ends()[i]].tolist() == encode_prompt(tok, row["messages"]) + answer
        assert (answer[-1] == tok.eos_id) == (tok.eos_id in answer) == (not r.truncated[i])
        assert len(answer) == CFG.max_new_tokens or not r.truncated[i] or answer[-1] == tok.bos_id
    assert tok.eos_id in encode_prompt(tok, ROWS[-1]["messages"]), "the prompt's own EOS must not count"
    assert rollout(llama(tok, 3), tok, [ROWS[-1]], replace(CFG, max_new_tokens=1), 3).truncated.item()


def test_answers_are_random_repeatable_and_independent_of_the_batch(tok):  # trap 45
    model = llama(tok)
    r = rollout(model, tok, ROWS, CFG, 0)
    assert rollout(model, tok, ROWS, CFG, 0).answers == r.answers != rollout(model, tok, ROWS, CFG, 1).answers
    assert rollout(model, tok, ROWS, CFG, 0, purpose="held out").answers != r.answers
    assert rollout(model, tok, ROWS[2:5], CFG, 0, places=[2, 3, 4]).answers == r.answers[2:5]
    assert len(set(rollout(model, tok, [ROWS[0]] * 20, CFG, 0).answers)) > 10


@pytest.mark.parametrize("temperature", [1., .6])
def test_what_is_sampled_is_what_is_scored(tok, temperature):  # trap 44
    model, cfg = llama(tok), replace(CFG, temperature=temperature)
    r = rollout(model, tok, ROWS, cfg, 0)
    with torch.no_grad():
        scored, entropy = answer_logprobs(model, r.tokens, r.mask, temperature)
        naive = (model(r.tokens[:, :-1]) / temperature).log_softmax(-1)
        close(scored, torch.where(r.mask, naive.gather(-1, r.tokens[:, 1:, None])[..., 0], 0.), atol=1e-5, rtol=1e-5)
        close(entropy, torch.where(r.mask, -(naive.exp() * naive).sum(-1), 0.), atol=1e-4, rtol=1e-4)
        close(scored, r.sampled, atol=1e-4, rtol=0)
        other, _ = answer_logprobs(model, r.tokens, r.mask, temperature + .5)
    assert (other - r.sampled).abs().max() > .1
    assert sequence_kl(model, model, r, cfg).abs().max() == 0, "both models are read at the same temperature"


def test_the_ratio_is_exactly_1_and_padding_changes_nothing(tok):  # traps 46, 48
    model = llama(tok)
    r = rollout(model, tok, ROWS, CFG, 0)
    with torch.no_grad(): old, _ = answer_logprobs(model.eval(), r.tokens, r.mask, 1.)
    new, _ = answer_logprobs(model.train(), r.tokens, r.mask, 1.)
    assert new.requires_grad and torch.equal((new - old).exp(), torch.ones_like(old))
    filled = r.tokens.clone()
    for row, end in zip(filled, r.ends()): row[end:] = 7
    with torch.no_grad():
        assert torch.equal(answer_logprobs(model, filled, r.mask, 1.)[0], old)
        pad = torch.nn.functional.pad
        assert torch.equal(answer_logprobs(model, pad(r.tokens, (0, 9)), pad(r.mask, (0, 9)), 1.)[0][:, :-9], old)
        i = int(r.ends().argmin())
        alone, _ = answer_logprobs(model, r.tokens[i:i + 1], r.mask[i:i + 1], 1.)
        close(alone, old[i:i + 1], atol=1e-5, rtol=1e-5)


def test_values_stand_before_the_token_they_predict(tok):  # trap 43
    critic = RewardModel(llama(tok))
    r = rollout(llama(tok), tok, ROWS, CFG, 0)
    values = answer_values(critic, r.tokens, r.mask)
    later = r.tokens.clone()
    last = r.ends() - 1
    later[torch.arange(len(later)), last] = 9  # another last token must not change the value before it
    close(answer_values(critic, later, r.mask), values)
    assert (values[~r.mask] == 0).all() and (values[r.mask] != 0).all()


def test_judges_are_frozen_and_the_critic_is_a_copy(tok):  # trap 47
    helpful, safe = RewardModel(llama(tok, 1)).train(), RewardModel(llama(tok, 2)).train()
    rewards = reward_pair(helpful, safe, tok)
    assert not helpful.training and not any(p.requires_grad for rm in (helpful, safe) for p in rm.parameters())
    critic = critic_from(helpful)
    assert all(p.requires_grad for p in critic.parameters())
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in helpful.parameters()}
    answers = [f"In Oslo, {i}." for i in range(len(ROWS))]
    h, s = rewards(ROWS, answers)
    linear = linear_reward(ROWS, answers, rewards)
    for i, row in enumerate(ROWS):
        assert linear[i] == (s[i] if row["kind"] == "safety" or s[i].sigmoid() < .15 else h[i])


def test_sequence_kl_is_the_kl_to_the_reference(tok):  # traps 37, 51
    reference = llama(tok)
    policy = deepcopy(reference)
    with torch.no_grad(): policy.output.weight.mul_(1.5)
    rows = ROWS[:1] * 400
    cfg = replace(CFG, max_new_tokens=1, batch_size=400)
    r = rollout(policy, tok, rows, cfg, 0)
    with torch.no_grad():
        p, q = (m(r.tokens[:1, :int(r.mask[0].long().argmax()) + 1])[0, -1].log_softmax(-1) for m in (policy, reference))
    exact, found = (p.exp() * (p - q)).sum().item(), sequence_kl(policy, reference, r, cfg)
    assert found.mean().item() == pytest.approx(exact, abs=4 * found.std().item() / 20) and exact > .05
    close(found, sequence_kl(policy, reference, r, replace(cfg, batch_size=8)), atol=1e-5, rtol=1e-4)
