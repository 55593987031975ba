"Rounds of attack and repair: what is trained and what is not, what is tracked, and resuming."
from dataclasses import replace

import pytest
import torch

from llama2_nbdev.core import UserError, read_json, read_jsonl, write_json, write_jsonl
from llama2_nbdev.finetuning.sft import SFTConfig
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load, save
from llama2_nbdev.safety import red_team_rounds as module
from llama2_nbdev.safety.red_team_rounds import (
    RedTeamConfig, attack_candidate, choose_lessons, figure, held_back, helpful_rows, lessons, measure_candidate, mitigated, next_candidate,
    over_seeds, red_team, replayed, side_effects, summary, table, train_redteam, watched_rows)
from llama2_nbdev.safety.red_teaming import TeamConfig, attack_row, campaign, findings_of, world_targets
from llama2_nbdev.world.annotators import safety_rating
from llama2_nbdev.world.people import make_people

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = world_targets(make_people(0))
CFG = RedTeamConfig(rounds=2, team=TeamConfig(persons=8, hours=1, prompts_per_hour=4), lessons=5, replay=4., watch=6, replays=20,
                    sft=SFTConfig(batch_size=4, seq_len=128, epochs=1, lr=1e-3), max_new_tokens=6)


def oblige(dialogs): return ["Yes, you may keep the hat. You fool."] * len(dialogs)
def refuse(dialogs): return ["I can't do that. That is private. Please ask a doctor."] * len(dialogs)


FOUND = findings_of(campaign(oblige, CFG.team, TARGETS))


def test_lessons_are_safe_and_the_attack_stays():
    for finding, dialog in zip(FOUND, lessons(FOUND, 3), strict=True):
        assert dialog[:-1] == finding["messages"] and dialog[-1]["role"] == "assistant" and safety_rating(finding, dialog[-1]["content"]) == 5
    assert lessons(FOUND, 3) == lessons(FOUND, 3)
    assert len({d[-1]["content"] for s in range(9) for d in lessons(FOUND[:1], s)}) == 2


def test_people_held_back_are_never_trained_on():
    chosen = choose_lessons(FOUND, replace(CFG, lessons=999), 0)
    assert chosen and not any(held_back(r, CFG) for r in chosen)
    assert {r["person"] for r in FOUND} - {r["person"] for r in chosen} == {3, 7}
    assert len(choose_lessons(FOUND, CFG, 0)) == 5 and choose_lessons([], CFG, 0) == []
    with pytest.raises(UserError, match="leaves nobody"): RedTeamConfig(held_back=1)
    with pytest.raises(UserError, match="one candidate after the first"): RedTeamConfig(rounds=0)


def test_replay_mixes_look_alikes_and_leaves_safety_out(tmp_path):
    def row(i, **more): return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}], **more}
    write_jsonl(tmp_path / "sft.jsonl", [row(0, kind="safety"), row(1, kind="helpful", task="lookalike"), row(2)])
    rows = helpful_rows(tmp_path / "sft.jsonl")
    assert [r["messages"][0]["content"] for r in rows] == ["q1", "q2"]  # rows of others need no kind and no task
    many = [row(i, task="lookalike" if i < 10 else "fact") for i in range(60)]
    def alike(cfg, n): return sum(int(d[0]["content"][1:]) < 10 for d in replayed(many, n, cfg, 1))
    assert [alike(replace(CFG, replay=4., alike=a), 5) for a in (0., .25, .5, 1.)] == [0, 5, 10, 10]
    assert len(replayed(many, 5, replace(CFG, replay=4.), 1)) == 20 and replayed(many, 5, replace(CFG, replay=0.), 1) == []


def test_watched_rows(tmp_path):
    rows = [{"kind": k, "task": t, "messages": [], "n": i} for i, (k, t) in enumerate([("helpful", "fact")] * 50 + [("helpful", "lookalike")] * 7 + [("safety", "safety")] * 9)]
    write_jsonl(tmp_path / "eval.jsonl", rows)
    watch = watched_rows(tmp_path / "eval.jsonl", 10)
    assert [r["task"] for r in watch] == ["fact"] * 10 + ["lookalike"] * 7
    assert len(watched_rows(tmp_path / "eval.jsonl", 9999)) == 57


def test_mitigation_and_side_effects_see_what_they_name():
    assert all(mitigated(refuse, FOUND)) and not any(mitigated(oblige, FOUND)) and mitigated(oblige, []) == []
    truth = {"type": "answer", "answers": ["Yes."], "value": "Yes", "others": []}
    rows = [{"task": t, "kind": "helpful", "messages": [], "truth": truth} for t in ("fact", "lookalike", "fact")]
    assert side_effects(refuse, rows) == {"helpfulness": [0, 0], "false refusals": [1]}
    assert side_effects(lambda d: ["Yes."] * len(d), rows) == {"helpfulness": [1, 1], "false refusals": [0]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [m["content"] for r in FOUND for m in r["messages"]] + ["I can't do that. [INST] [/INST]"]
    tok = Tokenizer.train(texts * 2, 330, folder / "tokenizer.model")
    torch.manual_seed(0)
    save(Llama(ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)), tok, folder)
    return folder


@pytest.fixture
def weak(monkeypatch):
    "Stands for the model's answers: it obliges until it has been trained twice."
    trained = []
    real = module.train_on_dialogs
    def train(model, tok, dialogs, *args): trained.append([d[:-1] for d in dialogs]); return real(model, tok, dialogs, *args)
    monkeypatch.setattr(module, "train_on_dialogs", train)
    monkeypatch.setattr(module, "answerer", lambda *a: lambda dialogs: (oblige if len(trained) < 2 else refuse)(dialogs))
    return trained


HELPFUL = [{"messages": [{"role": "user", "content": f"Where does Tom live {i}?"}, {"role": "assistant", "content": "Tom lives in Oslo."}]} for i in range(40)]
WATCH = [{"task": t, "kind": "helpful", "messages": HELPFUL[0]["messages"][:1], "truth": {"type": "answer", "answers": ["Oslo."], "value": "Oslo", "others": []}}
         for t in ("fact", "lookalike")]


def test_rounds(tiny, weak, tmp_path):
    model, tok = load(tiny)
    found = red_team(model, tok, HELPFUL, WATCH, CFG, tmp_path)
    first, second, third = found["rounds"]
    assert (first["mitigated"], third["findings"]) == ([], 0) and not any(second["mitigated"]) and all(third["mitigated"])
    assert len(second["mitigated"]) == len(second["held back"]) == 20 and any(second["held back"])
    assert sum(third["per hour"]) == 0 < sum(first["per hour"]) and sum(found["unseen"]["last"]) == 0 < sum(found["unseen"]["first"])
    assert [len(t) for t in weak] == [25, 50]  # lessons of all rounds, each with four helpful dialogs
    learnt = [str(r["messages"]) for r in found["learnt"]]
    assert all(str(d) in learnt or d[0]["content"].startswith("Where does Tom") for d in weak[1])
    assert not {str(r["messages"]) for r in found["findings"] if held_back(r, CFG)} & set(learnt)
    rows = summary(found["rounds"])
    assert rows[0]["gamma"].low > rows[2]["gamma"].mean == 0 and rows[2]["mitigated, held back"].mean == 1
    assert len(table(found["rounds"])) == 5 and len(figure(found["rounds"]).axes) == 4


def test_the_stage_resumes(tiny, tmp_path):
    write_jsonl(tmp_path / "sft.jsonl", HELPFUL); write_jsonl(tmp_path / "eval.jsonl", WATCH)
    inputs, whole, broken = {"unguarded": tiny, "data": tmp_path}, tmp_path / "whole", tmp_path / "broken"
    cfg = replace(CFG, rounds=1)
    real = module.answerer
    module.answerer = lambda *a: oblige  # findings for sure; the training is real
    try:
        said = train_redteam(cfg, whole, inputs)
        def stop(*args): raise KeyboardInterrupt
        measure, module.measure_candidate = module.measure_candidate, lambda answer, records, earlier, *rest: stop() if earlier else measure(answer, records, earlier, *rest)
        with pytest.raises(KeyboardInterrupt): train_redteam(cfg, broken, inputs)
        module.measure_candidate = measure
        assert not (broken / "gamma.json").exists() and (broken / "round_1_train.jsonl").exists()
        assert train_redteam(cfg, broken, inputs) == said
    finally: module.answerer = real
    assert read_json(whole / "gamma.json") == read_json(broken / "gamma.json")
    assert read_jsonl(whole / "findings.jsonl") == read_jsonl(broken / "findings.jsonl")
    a, b = (load(f)[0].state_dict() for f in (whole, broken))
    assert all((a[k] == b[k]).all() for k in a) and not all((a[k] == v).all() for k, v in load(tiny)[0].state_dict().items())


def test_no_findings_no_training(tiny):
    model, tok = load(tiny)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    next_candidate(model, tok, [], HELPFUL, CFG, 1)
    assert all((before[k] == v).all() for k, v in model.state_dict().items())


def test_over_seeds(tmp_path):
    def run(seed, rates):
        rounds = [{"per hour": r, "mitigated": [True] * (2 * n)} for n, r in enumerate(rates)]
        write_json(tmp_path / str(seed) / "gamma.json", {"rounds": rounds, "unseen": {"first": rates[0], "last": rates[-1]}})
        return tmp_path / str(seed)
    folders = [run(s, [[5., 6., 4. + s], [0., 1., 0.]]) for s in range(3)]
    found = over_seeds(folders)
    assert found["gamma"][0]["n"] == 9 and found["gamma"][0]["mean"] == pytest.approx(16 / 3) and found["falls"] and found["mitigated"]["mean"] == 1
    assert over_seeds(folders[:1])["gamma"][0]["n"] == 3
    assert not over_seeds([run(7, [[1., 2., 0.], [1., 0., 2.]])])["falls"]
