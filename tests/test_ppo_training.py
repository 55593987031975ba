"The PPO loop: micro-batches, ranks, the first ratio, what is trained and what is not, early stopping, exact resume; traps 39 to 41, 43, 46, 47, 50, 51, 55."
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from llama2_nbdev.core import UserError, read_jsonl
from llama2_nbdev.finetuning import ppo_training
from llama2_nbdev.finetuning.ppo import PPOConfig, whiten
from llama2_nbdev.finetuning.ppo_training import (
    PPORun, add_advantages, critic_loss, look, policy_loss, ppo_step, score_rollout, train_ppo)
from llama2_nbdev.finetuning.reward import RewardModel
from llama2_nbdev.finetuning.rollouts import answer_logprobs, critic_from, linear_reward, prompt_order, reward_pair, rollout
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.pretraining.training import Copies, set_gradients

pytestmark = pytest.mark.usefixtures("one_thread")
close = torch.testing.assert_close
NAMES = "Mira Otto Lena Paul Nora Emil Ada Max Ines Karl Lara Hugo".split()
ROWS = [{"messages": [{"role": "user", "content": f"Where does {n} live{' now' * (i % 3)}?"}], "kind": "safety" if i % 4 == 3 else "helpful"}
        for i, n in enumerate(NAMES)]
CFG = PPOConfig(iterations=5, batch_size=8, mini_batch=4, micro_batch=2, max_new_tokens=6, lr=1e-3, beta=.1, critic_warmup=0, checkpoint_every=2, dev_every=2)
TIMES = "seconds", "generating"


def like_letter_a(rows, answers):
    "A judge without a network: the share of the letter a, and nothing is unsafe."
    return torch.tensor([10. * a.count("a") / (len(a) + 1) + .01 * len(a) for a in answers]), torch.tensor([3. + .1 * len(a) for a in answers])


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    texts = [r["messages"][0]["content"] for r in ROWS] * 3 + ["Hello! [INST] [/INST] <<SYS>> <</SYS>>"]
    return Tokenizer.train(texts, 310, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def llama(tok, seed=0):
    torch.manual_seed(seed)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=128))
    with torch.no_grad(): model.output.weight.mul_(4)
    return model


def critic(tok): return RewardModel(llama(tok, 9))
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def go(tok, out=None, cfg=CFG, judge=like_letter_a, **more):
    "A run from the same start: (policy, critic, history)."
    policy, value = llama(tok), critic(tok)
    history = train_ppo(policy, llama(tok), value, tok, ROWS, judge, cfg, out, **more)
    return policy, value, history


def batch(tok, policy, cfg=CFG):
    rows = [ROWS[i] for i in prompt_order(len(ROWS), cfg, 0)]
    r = rollout(policy, tok, rows, cfg, 0)
    minis = score_rollout(policy, llama(tok), critic(tok), r, cfg)
    add_advantages(minis, whiten(linear_reward(rows, r.answers, like_letter_a)), cfg)
    return r, minis


def test_mini_batches_hold_each_answer_once_and_old_numbers_are_constants(tok):  # traps 43, 50
    r, minis = batch(tok, llama(tok))
    assert sorted(torch.cat([m["row"] for m in minis]).tolist()) == list(range(8)) and [len(m["row"]) for m in minis] == [4, 4]
    for m in minis:
        assert torch.equal(m["tokens"], r.tokens[m["row"]]) and torch.equal(m["mask"], r.mask[m["row"]])
        assert not any(m[k].requires_grad for k in ("logprobs", "values", "advantages", "returns", "ref"))
        assert all((m[k][~m["mask"]] == 0).all() for k in ("logprobs", "values", "advantages", "returns"))
    flat = torch.cat([m["advantages"][m["mask"]] for m in minis])
    assert abs(flat.mean()) < 1e-6 and abs(flat.std() - 1) < 1e-6  # trap 40
    assert any(abs(m["advantages"][m["mask"]].mean()) > 1e-3 for m in minis), "whitened over the batch, not each mini-batch"


@pytest.mark.parametrize("make", ["policy", "critic"])
def test_micro_batches_change_no_gradient(tok, make):  # trap 50
    policy, value = llama(tok), critic(tok)
    _, minis = batch(tok, policy)
    model, loss = (policy, policy_loss(CFG, [])) if make == "policy" else (value, critic_loss(CFG))

    def gradients(size):
        set_gradients(model, minis[0], loss, size)
        return [p.grad.clone() for p in model.parameters()]
    whole = gradients(None)
    for size in (1, 2, 3): close(gradients(size), whole, atol=1e-6, rtol=1e-4)
    assert max(g.abs().max() for g in whole) > 1e-3


def test_the_first_gradient_is_the_policy_gradient_at_ratio_exactly_1(tok):  # trap 46
    policy, seen = llama(tok), []
    _, minis = batch(tok, policy)
    set_gradients(policy, minis[0], policy_loss(CFG, seen), CFG.micro_batch)
    clipped = [p.grad.clone() for p in policy.parameters()]
    assert [s[2] for s in seen] == [0., 0.] and [s[0] for s in seen] == [0, 0]

    def plain(model, b): return -(answer_logprobs(model, b["tokens"], b["mask"], 1.)[0] * b["advantages"]).sum(), b["mask"].sum()
    set_gradients(policy, minis[0], plain, CFG.micro_batch)
    close([p.grad for p in policy.parameters()], clipped, atol=1e-7, rtol=1e-4)


def test_only_policy_and_critic_learn_and_the_kl_is_to_the_reference(tok):  # traps 46, 47, 51
    policy, reference, value = llama(tok), llama(tok), critic(tok)
    judges = [RewardModel(llama(tok, s)) for s in (1, 2)]
    before = [deepcopy(m) for m in (reference, *judges)]
    run = PPORun(policy, reference, value, CFG, len(ROWS), None)
    rows = [ppo_step(run, tok, ROWS, reward_pair(*judges, tok)) for _ in range(3)]
    assert all(same(a, b) for a, b in zip((reference, *judges), before))
    assert not same(policy, reference) and not same(value, critic(tok))
    assert [r["first_move"] for r in rows] == [0., 0., 0.] and rows[0]["kl"] == 0. and all(r["kl"] != 0 for r in rows[1:])
    assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in (reference, *judges))


def test_models_that_share_weights_or_cannot_learn_are_refused(tok):  # trap 47
    policy, value = llama(tok), critic(tok)
    with pytest.raises(UserError, match="reference and policy share weights"): PPORun(policy, policy, value, CFG, 1, None)
    with pytest.raises(UserError, match="critic and policy share weights"): PPORun(policy, llama(tok), RewardModel(policy), CFG, 1, None)
    reward_pair(value, critic(tok), tok)
    with pytest.raises(UserError, match="critic is frozen"): PPORun(llama(tok), llama(tok), value, CFG, 1, None)
    assert PPORun(llama(tok), llama(tok), critic_from(value), CFG, 1, None).step == 0


def test_ppo_learns_what_the_judge_likes_and_beta_holds_it_back(tok):
    def likes_vowels(rows, answers): return torch.tensor([sum(map(a.count, "aeiou")) / 4 for a in answers]), torch.full((len(answers),), 3.)
    rows = [r | {"kind": "helpful"} for r in ROWS]
    cfg = replace(CFG, iterations=22, batch_size=16, micro_batch=None, lr=4e-3, critic_lr=4e-3)
    free, held = (train_ppo(llama(tok), llama(tok), critic(tok), tok, rows, likes_vowels, replace(cfg, beta=beta)) for beta in (0., 1.))
    assert free[-1]["linear"] > free[0]["linear"] + .3 and held[-1]["kl"] < free[-1]["kl"] / 4


def test_an_answer_without_eos_pays_the_penalty(tok, monkeypatch):  # trap 41
    seen = []
    monkeypatch.setattr(ppo_training, "add_advantages", lambda minis, scores, cfg, reduce: seen.append(scores) or add_advantages(minis, scores, cfg, reduce))
    for penalty in (0., 2.):
        run = PPORun(llama(tok), llama(tok), critic(tok), replace(CFG, truncation_penalty=penalty, max_new_tokens=1), len(ROWS), None)
        assert ppo_step(run, tok, ROWS, like_letter_a)["truncated"] == 1.
    close(seen[0] - seen[1], torch.full((8,), 2.))


def test_warm_up_trains_the_critic_only(tok):
    run = PPORun(llama(tok), llama(tok), critic(tok), replace(CFG, critic_warmup=1), len(ROWS), None)
    ppo_step(run, tok, ROWS, like_letter_a)
    assert same(run.models["policy"], llama(tok)) and not same(run.models["critic"], critic(tok))
    ppo_step(run, tok, ROWS, like_letter_a)
    assert not same(run.models["policy"], llama(tok))


def spoilt(rows, answers):
    "A judge that fails at one prompt."
    helpful, safe = like_letter_a(rows, answers)
    broken = torch.tensor(["Paul" in r["messages"][-1]["content"] for r in rows])
    return helpful.masked_fill(broken, torch.nan), safe.masked_fill(broken, torch.nan)


def break_critic(run): run.models["critic"].head.weight.data[0, 0] = torch.nan
def break_reference(run): run.reference.output.weight.data[3] = torch.inf


@pytest.mark.parametrize("judge, harm, said", [(spoilt, None, "reward of the answer to prompt 'Where does Paul live[?]' is nan.* reward function"),
                                               (like_letter_a, break_critic, "value of the answer to prompt .* is nan.* lower learning rates"),
                                               (like_letter_a, break_reference, "KL of the answer to prompt .* is (nan|-?inf)")])
def test_a_number_that_is_not_finite_stops_before_any_weight_changes(tok, judge, harm, said):  # trap 39
    run = PPORun(llama(tok), llama(tok), critic(tok), replace(CFG, batch_size=12), len(ROWS), None)
    ppo_step(run, tok, ROWS, like_letter_a)
    if harm: harm(run)
    before = deepcopy(run.models)
    with pytest.raises(UserError, match=f"^PPO broke at iteration 2: the {said}"): ppo_step(run, tok, ROWS, judge)
    for name, model in run.models.items():
        assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip(before[name].parameters(), model.parameters()))
    assert run.step == 1


def test_a_look_with_a_broken_reward_stops_too(tok):
    with pytest.raises(UserError, match="iteration 1: the reward of the answer to prompt 'Where does Paul live[?]' is nan"):
        go(tok, judge=spoilt, dev_rows=ROWS)


def test_the_best_weights_on_held_out_prompts_are_kept(tok, monkeypatch):  # trap 50
    looks, kept = iter([0., 5., 1., 2., 3.]), []

    def staged(run, *args):
        run.first_look, run.waited, value = {"mean": 0., "std": 1.}, run.waited + 1, next(looks)
        if run.best is None or value > run.best["objective"]:
            run.best, run.waited = {"step": run.step, "objective": value, "weights": deepcopy(run.models["policy"].state_dict())}, 0
        kept.append(deepcopy(run.best))
        return {"dev_objective": value}
    monkeypatch.setattr(ppo_training, "look", staged)
    policy, _, history = go(tok, cfg=replace(CFG, iterations=20, dev_every=1, patience=3), dev_rows=ROWS[:4])
    assert len(history) == 4 and kept[-1]["step"] == 1, "three looks without a new best end the run"
    assert all(torch.equal(v, kept[-1]["weights"][k]) for k, v in policy.state_dict().items())


def test_a_look_is_equation_4_with_the_first_looks_scale(tok):
    run = PPORun(llama(tok), llama(tok), critic(tok), CFG, len(ROWS), None)
    first = look(run, tok, ROWS, like_letter_a)
    r = rollout(llama(tok), tok, ROWS, CFG, 0, purpose="held out")
    assert first["dev_kl"] == 0 and first["dev_objective"] == pytest.approx(-r.truncated.float().mean().item(), abs=1e-5)
    with torch.no_grad(): run.models["policy"].output.weight.mul_(1.4)
    again = look(run, tok, ROWS, like_letter_a)
    r = rollout(run.models["policy"], tok, ROWS, CFG, 0, purpose="held out")
    scores = (linear_reward(ROWS, r.answers, like_letter_a) - run.first_look["mean"]) / run.first_look["std"]
    assert again["dev_objective"] == pytest.approx((scores - r.truncated.float()).mean().item() - CFG.beta * again["dev_kl"], abs=1e-5)


RANKS = replace(CFG, iterations=20, dev_every=1, patience=2)
CLOSE = 1e-5  # ranks add the same fp32 numbers in another order; AdamW may stretch that, at most to its step (1e-3 here), and this is a hundredth of it


def join(rank, store):
    "Become one of two processes."
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    return Copies()


def two_processes(what, folder, root):
    "Start `what(rank, folder)` of this file twice."
    code = f"import sys; sys.path.insert(0, sys.argv[1]); import test_ppo_training as t; t.{what}(int(sys.argv[2]), sys.argv[3])"
    return [subprocess.Popen([sys.executable, "-c", code, str(root / "tests"), str(r), str(folder)], stderr=subprocess.PIPE, text=True) for r in (0, 1)]


def finish(processes):
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors


def compare_ranks(rank, folder):
    "Rank 1 begins with another policy and critic: those of rank 0 must count."
    said, tok, parallel = [], Tokenizer(f"{folder}/t.model"), join(rank, f"{folder}/store")

    def start(judge, out=None):
        models = llama(tok, rank), llama(tok), RewardModel(llama(tok, 9 + rank))
        try: return *models, train_ppo(*models, tok, ROWS, judge, replace(RANKS, batch_size=12), out, dev_rows=ROWS[:3], parallel=parallel)
        except UserError as e: said.append(str(e))
    policy, _, value, history = start(like_letter_a, f"{folder}/out{rank}")
    start(like_letter_a, f"{folder}/out{rank}")  # rank 1 finds no checkpoint in its folder
    start(spoilt)                                # one of the two meets the broken prompt
    torch.save({"policy": policy.state_dict(), "critic": value.state_dict(), "rows": untimed(history), "said": said}, f"{folder}/{rank}.pt")


def resume_ranks(rank, folder):
    "A longer run in one folder, which may be killed and started again."
    parallel, cfg = join(rank, f"{folder}/store"), replace(RANKS, iterations=12, patience=99, checkpoint_every=2)
    policy, value, _ = go(Tokenizer(f"{folder}/../t.model"), folder, cfg, dev_rows=ROWS[:3], parallel=parallel)
    torch.save([policy.state_dict(), value.state_dict()], f"{folder}/{rank}.pt")


def test_two_ranks_train_as_one_process(tok, tmp_path, root):  # traps 39, 40, 50
    tok.save(tmp_path / "t.model")
    finish(two_processes("compare_ranks", tmp_path, root))
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    policy, value, history = go(tok, cfg=replace(RANKS, batch_size=12), dev_rows=ROWS[:3])
    for name, one in (("policy", policy), ("critic", value)):
        for k, w in one.state_dict().items():
            assert torch.equal(first[name][k], second[name][k]), f"{name}: the ranks must never drift apart"
            close(first[name][k], w, atol=CLOSE, rtol=0)
    assert first["rows"] == second["rows"] and 2 <= len(first["rows"]) == len(history) < RANKS.iterations, "both stop early, as one process does"
    for a, b in zip(first["rows"], untimed(history)): assert a == pytest.approx(b, abs=1e-4)
    assert (tmp_path / "out0" / "metrics.jsonl").exists() and not (tmp_path / "out1").exists(), "only rank 0 writes"
    for r, said in enumerate((first["said"], second["said"])):
        assert "found different checkpoints" in said[0] and "PPO broke at iteration 1: the reward of the answer to prompt" in said[1] and len(said) == 2


def sharded_ranks(rank, folder, name="shard"):
    "Everything in two shards, or the policy's products cut in two: a whole run, and one that is stopped and resumed."
    from llama2_nbdev.pretraining.scaling import ParallelConfig, Ranks, make_mesh, parallelize
    join(rank, f"{folder}/store")
    tok, cfg = Tokenizer(f"{folder}/t.model"), replace(RANKS, iterations=2, checkpoint_every=1, critic_warmup=1)
    mesh = make_mesh(layout := ParallelConfig(tensor=2 if name == "tensor" else 1))
    def cut(model, method): return parallelize(model, mesh, layout, (method,)) if method == "hidden" or name == "shard" else model

    def start(out, stop=2):
        policy, value = cut(llama(tok), "hidden"), cut(critic(tok), "values")
        rows = train_ppo(policy, cut(llama(tok), "hidden"), value, tok, ROWS, like_letter_a, replace(cfg, iterations=stop), f"{folder}/{out}",
                         dev_rows=ROWS[:3], parallel=Ranks(mesh))
        return *({k: getattr(v, "full_tensor", lambda: v)() for k, v in m.state_dict().items()} for m in (policy, value)), untimed(rows)
    whole = start("whole")
    start("part", 1)
    part = start("part")
    if not rank: torch.save({"whole": whole, "part": part}, f"{folder}/found.pt")


def tensor_ranks(rank, folder): sharded_ranks(rank, folder, "tensor")


@pytest.mark.parametrize("what", ["sharded_ranks", pytest.param("tensor_ranks", marks=pytest.mark.slow)])
def test_sharded_models_train_as_one_process_and_resume(tok, tmp_path, root, what):  # traps 55, 56
    tok.save(tmp_path / "t.model")
    finish(two_processes(what, tmp_path, root))
    cfg = replace(RANKS, iterations=2, checkpoint_every=1, critic_warmup=1)
    policy, value, history = go(tok, cfg=cfg, dev_rows=ROWS[:3])
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for one, whole, part in zip((policy, value), found["whole"], found["part"]):
        for k, w in one.state_dict().items():
            assert torch.equal(whole[k], part[k]), f"{k}: stopped and resumed"
            close(whole[k], w, atol=CLOSE, rtol=0)
    assert found["whole"][2] == found["part"][2] == untimed(read_jsonl(tmp_path / "whole" / "metrics.jsonl")), "one process writes"
    for a, b in zip(found["whole"][2], untimed(history), strict=True): assert a == pytest.approx(b, abs=1e-4)
    longer = go(tok, tmp_path / "part", replace(cfg, iterations=3), dev_rows=ROWS[:3])[2]  # one process goes on
    assert [r["step"] for r in longer] == [1, 2, 3]


@pytest.mark.slow
def test_two_ranks_that_were_killed_end_with_the_same_bits(tok, tmp_path, root):  # trap 55
    tok.save(tmp_path / "t.model")
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part): folder.mkdir()
    finish(two_processes("resume_ranks", whole, root))
    for kills in (1, 2, 3):
        ranks, until = two_processes("resume_ranks", part, root), time.monotonic() + 60
        while not (part / f"checkpoints/step-{2 * kills:08d}.json").exists() and time.monotonic() < until: time.sleep(.01)
        for p in ranks[::-1 if kills == 2 else 1]: p.kill()
        for p in ranks: p.communicate()
        assert -signal.SIGKILL in [p.returncode for p in ranks], "the kill came too late"
        (part / "store").unlink()
    finish(two_processes("resume_ranks", part, root))
    for rank in (0, 1):
        for a, b in zip(*(torch.load(folder / f"{rank}.pt", weights_only=True) for folder in (whole, part))):
            assert all(torch.equal(x, b[k]) for k, x in a.items())


def untimed(rows): return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


@pytest.mark.parametrize("dies_at", [1, 3, 5, 7])
def test_a_run_that_died_goes_on_to_the_same_bits(tok, tmp_path, dies_at):  # trap 55
    calls = iter(range(dies_at))

    def fails(rows, answers):
        if next(calls, None) is None: raise SystemError("the power fails")
        return like_letter_a(rows, answers)
    whole = go(tok, tmp_path / "whole", dev_rows=ROWS[:4])
    with pytest.raises(SystemError): go(tok, tmp_path / "part", judge=fails, dev_rows=ROWS[:4])
    part = go(tok, tmp_path / "part", dev_rows=ROWS[:4])
    assert same(whole[0], part[0]) and same(whole[1], part[1]) and untimed(whole[2]) == untimed(part[2])
    again = go(tok, tmp_path / "part", judge=lambda *a: 1 / 0, dev_rows=ROWS[:4])
    assert same(again[0], whole[0]), "a finished run trains nothing"


def test_more_iterations_go_on_and_other_settings_are_refused(tok, tmp_path):  # trap 55
    go(tok, tmp_path, replace(CFG, iterations=2))
    longer, _, history = go(tok, tmp_path, replace(CFG, iterations=4, checkpoint_every=1))
    assert len(history) == 4 and same(longer, go(tok, cfg=replace(CFG, iterations=4))[0])
    with pytest.raises(UserError, match="beta: 0.1 -> 0.2"): go(tok, tmp_path, replace(CFG, beta=.2))


CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_ppo_training as t
torch.set_num_threads(1)
t.go(t.Tokenizer(sys.argv[2]), sys.argv[3], t.replace(t.CFG, iterations=200, checkpoint_every=1))
"""


def test_sigkill_and_resume_end_with_the_same_bits(tok, tmp_path, root):  # trap 55
    tok.save(tmp_path / "t.model")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(root / "tests"), str(tmp_path / "t.model"), str(tmp_path / "run")])
    until = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoints/step-*3.json")) and time.monotonic() < until: time.sleep(.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = int(sorted((tmp_path / "run" / "checkpoints").glob("step-*.json"))[-1].stem.split("-")[1])
    cfg = replace(CFG, iterations=done + 3, checkpoint_every=1)
    killed, value, history = go(tok, tmp_path / "run", cfg)
    whole, other, _ = go(tok, None, cfg)
    assert 3 <= done < 200 and same(killed, whole) and same(value, other)
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == list(range(1, done + 4)) and len(history) == done + 3
