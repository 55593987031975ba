"The mathematics of PPO on numbers: the paper's reward, whitening, GAE, clipping, the KL and its estimators; traps 37 to 45, 49, 50."
import math
import threading

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.ppo import (
    PAPER_BETA, PPOConfig, clipped_policy_loss, clipped_value_loss, combine_rewards, combined_logit, gae, kl_estimate, token_rewards,
    uses_safety, whiten)

PI, REF = torch.tensor([.7, .2, .1], dtype=torch.double), torch.tensor([.4, .3, .3], dtype=torch.double)
numbers = st.floats(-5, 5, width=32)
close = torch.testing.assert_close


def ranks(world, work):
    "Run `work(rank, reduce)` in threads whose `reduce` sums over all of them; their results in order."
    gate, parts, results = threading.Barrier(world), [None] * world, [None] * world

    def run(rank):
        def reduce(x):
            parts[rank] = x.clone()
            gate.wait()
            total = torch.stack(parts).sum(0)
            gate.wait()
            return total
        results[rank] = work(rank, reduce)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(world)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    return results


def test_the_threshold_is_strict_and_on_the_probability():  # trap 39
    safety = torch.tensor([.149, .15, .151])
    for dtype in (torch.float32, torch.float64):
        s, h = safety.to(dtype), torch.full((3,), .9, dtype=dtype)
        assert combine_rewards(s, h, torch.zeros(3, dtype=torch.bool)).tolist() == [s[0].item(), h[0].item(), h[0].item()]
        assert combine_rewards(s, h, torch.ones(3, dtype=torch.bool)).tolist() == s.tolist(), "a tagged prompt is the safety model's"
    assert not uses_safety(torch.tensor([.15]).double(), torch.tensor([False])).item()
    scores = torch.tensor([-1.74, -1.73])  # logit(.15) = -1.7346
    assert combined_logit(scores, torch.full((2,), 9.), torch.tensor([False, False])).tolist() == [scores[0].item(), 9.]
    assert combine_rewards(torch.tensor([.3]), torch.tensor([.9]), torch.tensor([0]), threshold=.4).item() == pytest.approx(.3)


@given(st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_the_combined_logit_is_the_logit_of_the_combined_reward(rows):
    s, h = (torch.tensor([r[i] for r in rows], dtype=torch.double) for i in (0, 1))
    tag = torch.tensor([r[2] for r in rows])
    close(combined_logit(s, h, tag), torch.logit(combine_rewards(s.sigmoid(), h.sigmoid(), tag)), atol=1e-9, rtol=1e-9)


def test_the_combined_logit_never_overflows():  # trap 39
    assert combined_logit(torch.tensor([3.]), torch.tensor([40.]), torch.tensor([False])).item() == 40.


@given(st.lists(numbers, min_size=2, max_size=30), st.floats(.01, 1000), st.floats(-100, 100))
@settings(max_examples=60, deadline=None)
def test_whitening_has_mean_0_and_std_1_whatever_the_scale(values, scale, shift):  # trap 40
    x = torch.tensor(values, dtype=torch.double)
    if x.std() < 1e-2: return
    w = whiten(x)
    assert abs(w.mean()) < 1e-9 and abs(w.std() - 1) < 1e-9
    close(whiten(x * scale + shift), w, atol=1e-5, rtol=1e-5)
    close(whiten(-x), -w)


def test_whitening_guards_zero_variance_and_masks():  # traps 39, 40
    for x in (torch.full((6,), .1), torch.full((6,), 1e6), torch.zeros(6), torch.tensor([3.]), torch.tensor([.3] * 5) + 1e-9 * torch.randn(5)):
        assert whiten(x).abs().max() == 0
    assert whiten(torch.tensor([1., torch.nan, 2.])).isnan().all(), "a broken score must not pass for an average one"
    x, mask = torch.randn(4, 7), torch.rand(4, 7) < .6
    w = whiten(torch.where(mask, x, torch.inf), mask)
    close(w[mask], whiten(x[mask]))
    assert (w[~mask] == 0).all() and whiten(x, torch.zeros_like(mask)).abs().max() == 0
    assert whiten(x).dtype == x.dtype and not torch.equal(whiten(x), whiten(x) + x.mean()), "the mean is removed for good"


def test_whitening_is_one_over_all_ranks():  # traps 39, 40
    x = torch.randn(12) * 3 + torch.arange(12)
    parts = x.split([5, 3, 4])
    close(torch.cat(ranks(3, lambda i, reduce: whiten(parts[i], reduce=reduce))), whiten(x))
    assert (torch.cat([whiten(p) for p in parts]) - whiten(x)).abs().max() > .1


def test_the_score_is_whitened_before_the_kl_term():  # trap 39
    scores, kl = torch.randn(16), torch.full((16,), 10.)
    first, last = whiten(scores) - .05 * kl, whiten(scores - .05 * kl)
    assert first.mean() == pytest.approx(-.5, abs=1e-5) and last.mean() == pytest.approx(0, abs=1e-5)


def random_answers(seed, b=5, t=7):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (b,), generator=g)
    return [torch.randn(b, t, generator=g) for _ in range(2)] + [torch.arange(t) < lengths[:, None]]


def naive_gae(rewards, values, n, gamma, lam):
    v = values.tolist()[:n] + [0.]
    delta = [rewards[t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)] + [0.] * (len(rewards) - n)


@given(st.integers(0, 10**6), st.sampled_from([.9, 1.]), st.sampled_from([0., .5, .95, 1.]))
@settings(max_examples=40, deadline=None)
def test_gae_is_its_definition_and_padding_is_never_read(seed, gamma, lam):  # trap 43
    rewards, values, mask = random_answers(seed)
    advantages, returns = gae(torch.where(mask, rewards, torch.nan), torch.where(mask, values, torch.nan), mask, gamma, lam)
    close(advantages, torch.tensor([naive_gae(r, v, int(m.sum()), gamma, lam) for r, v, m in zip(rewards, values, mask)]), atol=1e-4, rtol=1e-4)
    close(returns, torch.where(mask, advantages + values, 0.))
    if gamma == lam == 1:
        earned = torch.where(mask, rewards, 0.).flip(1).cumsum(1).flip(1)
        close(returns, torch.where(mask, earned, 0.), atol=1e-4, rtol=1e-4)


def test_there_is_no_value_after_the_end_and_no_gradient():  # trap 43
    rewards, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    values = torch.tensor([[0., 0., 100.]], requires_grad=True)
    advantages, returns = gae(rewards, values, mask, 1., 1.)
    assert advantages.tolist() == [[0., 0., 0.]] and not advantages.requires_grad and not returns.requires_grad


def test_gae_steps_over_what_somebody_else_said():  # trap 43
    rewards, values = torch.randn(1, 5), torch.randn(1, 5)
    mask = torch.tensor([[True, False, False, True, True]])
    close(gae(rewards, values, mask, .9, .8)[0][mask], gae(rewards[mask][None], values[mask][None], torch.ones(1, 3).bool(), .9, .8)[0][0])


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_token_rewards_add_up_to_equation_4(seed, beta):  # traps 41, 49
    kl, scores, mask = random_answers(seed)
    scores = scores[:, 0]
    rewards = token_rewards(scores, torch.where(mask, kl * 100, torch.nan), mask, beta)
    close(rewards.sum(1), scores - beta * torch.where(mask, kl * 100, 0.).sum(1), atol=1e-3, rtol=1e-4)
    last = mask.sum(1) - 1
    close(rewards.gather(1, last[:, None])[:, 0], scores - beta * 100 * kl.gather(1, last[:, None])[:, 0], atol=1e-3, rtol=1e-4)
    assert (rewards[~mask] == 0).all()


def test_clipping_takes_the_gradient_only_where_the_ratio_went_the_wanted_way():
    ratio = torch.tensor([[1.5, .5, 1.5, .5, 1.1, .9]])
    advantages = torch.tensor([[1., 1., -1., -1., 1., -1.]])
    logprobs, mask = ratio.log().requires_grad_(), torch.ones_like(ratio).bool()
    loss, clipped = clipped_policy_loss(logprobs, torch.zeros_like(ratio), advantages, mask)
    close(loss, -torch.tensor([[1.2, .5, -1.5, -.8, 1.1, -.9]]))
    loss.sum().backward()
    assert clipped.tolist() == [[True, False, False, True, False, False]] == (logprobs.grad == 0).tolist()


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_at_ratio_1_the_gradient_is_the_policy_gradient(seed):
    old, advantages, mask = random_answers(seed)
    new, plain = old.clone().requires_grad_(), old.clone().requires_grad_()
    clipped_policy_loss(new, old, advantages, mask)[0].sum().backward()
    (-plain * advantages)[mask].sum().backward()
    close(new.grad, plain.grad)


def test_padding_reaches_no_loss_and_no_gradient():
    mask = torch.tensor([[True, False]])
    new = torch.tensor([[0., 500.]], requires_grad=True)  # exp(500) is infinite
    loss, clipped = clipped_policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), mask)
    loss.sum().backward()
    assert loss.tolist() == [[-1., 0.]] and new.grad.tolist() == [[-1., 0.]] and not clipped.any()
    value = clipped_value_loss(torch.tensor([[2., torch.inf]]), torch.zeros(1, 2), torch.zeros(1, 2), mask)
    assert value.tolist() == [[2., 0.]]


def test_the_value_clip_takes_the_worse_error():
    value, old, target, mask = torch.tensor([[1., 4.]]), torch.zeros(1, 2), torch.tensor([[3., 3.]]), torch.ones(1, 2).bool()
    close(clipped_value_loss(value, old, target, mask), torch.tensor([[2., .5]]))
    close(clipped_value_loss(value, old, target, mask, clip=.5), torch.tensor([[3.125, 3.125]]))


def test_kl_estimators_on_three_tokens():  # trap 37
    mean = {k: (PI @ kl_estimate(PI.log(), REF.log(), k)).item() for k in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(.2008, abs=5e-5) and mean["k3"] == pytest.approx(.2008, abs=5e-5)
    assert (kl_estimate(PI.log(), REF.log(), "k3") >= 0).all() and (kl_estimate(PI.log(), REF.log()) < 0).any()
    reverse = (PI @ kl_estimate(REF.log(), PI.log(), "k3")).item()
    chi2 = (PI.square() / REF).sum().item() - 1
    assert reverse == pytest.approx(.1909, abs=5e-5) and reverse == pytest.approx(chi2 - mean["k1"])
    with pytest.raises(ValueError, match="none of k1, k2, k3"): kl_estimate(PI, REF, "k4")


def test_k1_belongs_into_the_reward():  # trap 38
    theta = PI.log().requires_grad_()
    logp = theta.log_softmax(-1)

    def gradient(x): return torch.autograd.grad(x, theta, retain_graph=True)[0]
    wanted, other = gradient((logp.exp() * (logp - REF.log())).sum()), gradient((REF * (REF.log() - logp)).sum())
    close(gradient(PI @ kl_estimate(logp, REF.log(), "k1")), torch.zeros(3).double(), atol=1e-12, rtol=0)
    close(gradient(PI @ kl_estimate(logp, REF.log(), "k3")), other)
    close(gradient(PI @ (kl_estimate(logp, REF.log()).detach() * logp)), wanted)
    assert (wanted - other).abs().max() > .01


def test_the_recipe_is_the_papers():  # trap 50
    paper = PPOConfig(iterations=400, batch_size=512, mini_batch=64, lr=1e-6, beta=PAPER_BETA["7b"])
    assert paper.batch_size // paper.mini_batch == 8
    assert (paper.betas, paper.eps, paper.weight_decay, paper.grad_clip, paper.clip, paper.threshold) == ((.9, .95), 1e-5, .1, 1., .2, .15)
    assert PAPER_BETA == {"7b": .01, "13b": .01, "34b": .005, "70b": .005}


@pytest.mark.parametrize("wrong, said", [({"mini_batch": 24}, "no multiple"), ({"temperature": 0.}, "random samples"), ({"iterations": 0}, "iterations is 0"),
                                         ({"temperature": math.nan}, "random samples")])
def test_settings_that_cannot_work_are_refused(wrong, said):  # trap 45
    with pytest.raises(UserError, match=said): PPOConfig(**wrong)
