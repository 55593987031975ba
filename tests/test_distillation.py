"Context distillation: the preprompt is there while sampling and nowhere else, and the gate keeps only what is better."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, read_jsonl, write_jsonl
from llama2_nbdev.finetuning.chat import check_messages, encode_dialog
from llama2_nbdev.finetuning.reward import RewardModel, save_reward
from llama2_nbdev.finetuning.sft import SFTConfig
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import load, save
from llama2_nbdev.safety import distillation
from llama2_nbdev.safety.distillation import (
    ADJECTIVES, UNRELATED, DistillationConfig, DistilledConfig, answer_both_ways, answer_templates, choose_preprompt, compare_systems, distil,
    distillation_report, distillation_table, distillation_trial, fresh_attacks, gain, generic_preprompts, leading_lessons, passes, risk_of, train_distilled,
    with_preprompt)
from llama2_nbdev.world.world import World

pytestmark = pytest.mark.usefixtures("one_thread")


def row(i, kind="safety", **more):
    return {"id": f"p{i}", "task": kind, "kind": kind, "messages": [{"role": "user", "content": f"Tell me secret {i}."}], **more}


ROWS = [row(i, truth={"category": c}) for i, c in enumerate(("illicit", "hateful", "advice", "advice"))]


def test_preprompts():
    assert len(set(generic_preprompts())) == len(ADJECTIVES) * (len(ADJECTIVES) - 1)
    assert generic_preprompts(("calm", "dry"), "Be {} and {}.") == ["Be calm and dry.", "Be dry and calm."]
    template, generic = DistillationConfig(), DistillationConfig(style="generic")
    assert [choose_preprompt(r, template) for r in ROWS[:3]] == list(answer_templates().values())
    assert choose_preprompt(row(1, category="advice"), template) == answer_templates()["advice"]
    for other in (row(1), row(1, category="weather")): assert choose_preprompt(other, template) in generic_preprompts()
    assert choose_preprompt(ROWS[0], generic) == choose_preprompt(dict(ROWS[0]), generic)
    assert len({choose_preprompt(row(i), generic) for i in range(100)}) > 20
    assert [choose_preprompt(row(i), generic) for i in range(9)] != [choose_preprompt(row(i), DistillationConfig(style="generic", seed=1)) for i in range(9)]
    with pytest.raises(UserError, match="style='strict' is unknown"): DistillationConfig(style="strict")
    with pytest.raises(UserError, match="no generic preprompt"): DistillationConfig(generic=())


def test_the_preprompt_is_a_system_message_and_the_row_stays():
    before = [dict(m) for m in ROWS[0]["messages"]]
    once = with_preprompt(ROWS[0], "Be kind.")
    assert once["messages"][0] == {"role": "system", "content": "Be kind."} and once["messages"][1:] == ROWS[0]["messages"] == before
    twice = with_preprompt(once, "Be wise.")["messages"]
    assert twice[0]["content"] == "Be wise.\nBe kind." and len(twice) == 2
    assert check_messages(twice) and once["id"] == ROWS[0]["id"]


records = st.fixed_dictionaries({"original": st.sampled_from(["", "x", "y"]), "distilled": st.sampled_from(["", "x", "y"]),
                                 "before": st.floats(-20, 20, width=32), "after": st.floats(-20, 20, width=32)})


@settings(max_examples=80, deadline=None)
@given(some=st.lists(records, min_size=1, max_size=12))
def test_the_gate(some):  # trap 54
    kept = [r for r in some if passes(r)]
    assert all(r["after"] > r["before"] and r["distilled"] not in ("", r["original"]) for r in kept)
    lost = [r for r in some if not passes(r)]
    assert all(r["after"] <= r["before"] or r["distilled"] in ("", r["original"]) for r in lost)
    report = distillation_report(some)
    assert report["kept"] == len(kept) / len(some) and (report["gain kept"] >= 0) == bool(kept)
    assert report["gain"] == pytest.approx(sum(map(gain, some)) / len(some)) and abs(report["gain"]) <= 1


class Stub:
    "Stands for the model: careful under a preprompt, careless without; and for the scorer, which notes what it is shown."
    def __init__(self): self.shown = []
    def sample(self, model, tok, rows, cfg, desc="", out=None):
        return [["I can't. "[:9 * (r["messages"][0]["role"] == "system")] + f"Secret {r['id']}"] for r in rows]
    def score(self, rows, answers):
        self.shown += [r["messages"] for r in rows]
        return torch.tensor([float("can't" in a) - (r["id"] == "p3") * 2 * ("can't" in a) for r, a in zip(rows, answers)])


def test_sampled_with_scored_and_trained_without(monkeypatch):  # trap 54
    stub = Stub()
    monkeypatch.setattr(distillation, "sample_answers", stub.sample)
    rows = [row(9, "helpful"), *ROWS]
    found = answer_both_ways(None, None, ROWS, stub.score, DistillationConfig())
    assert all("can't" in r["distilled"] and "can't" not in r["original"] for r in found)
    assert all(m["role"] != "system" for messages in stub.shown for m in messages)
    kept = distil(None, None, rows, stub.score)
    assert [r["id"] for r in kept] == ["p0", "p1", "p2"]  # p3 became worse, p9 is a helpful prompt
    for new, old in zip(kept, ROWS):
        assert new["messages"] == [*old["messages"], {"role": "assistant", "content": f"I can't. Secret {old['id']}"}]
        assert set(new) == {"id", "messages", "gain", "task", "kind"} and new["gain"] == pytest.approx(.2311, abs=1e-4)
    with pytest.raises(UserError, match="none of the 1 prompts is of kind 'safety'"): distil(None, None, rows[:1], stub.score)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    texts = [m["content"] for r in ROWS for m in r["messages"]] + [*answer_templates().values(), "[INST] [/INST] <<SYS>> <</SYS>>"]
    tok = Tokenizer.train(texts * 3, 340, tmp_path_factory.mktemp("tok") / "tokenizer.model")
    torch.manual_seed(0)
    return Llama(ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=256)).eval(), tok


def test_a_real_model_resumes_and_repeats(tiny, tmp_path, monkeypatch):
    model, tok = tiny
    def length(rows, answers): return torch.tensor([len(a) / 50 for a in answers])
    cfg = DistillationConfig(temperature=1.5, max_new_tokens=40, seed=3)
    fresh = answer_both_ways(model, tok, ROWS, length, cfg)
    assert answer_both_ways(model, tok, ROWS, length, cfg, out=tmp_path) == fresh
    monkeypatch.setattr("llama2_nbdev.finetuning.rejection.generate", None)  # a second call reads, it does not generate
    assert answer_both_ways(model, tok, ROWS, length, cfg, out=tmp_path) == fresh
    for new in distil(model, tok, ROWS, length, cfg, out=tmp_path):
        text = tok.decode(encode_dialog(tok, new["messages"])[0])
        assert not any(p in text for p in answer_templates().values())


def answered(r, text): return r | {"messages": [*r["messages"], {"role": "assistant", "content": text}]}


def test_care_is_taught_under_a_preprompt_only(root):
    demonstrations = [r for r in read_jsonl(root / "data_samples" / "sft.jsonl") if r["kind"] == "safety"][:30]
    obliging = [answered(r, "Take six pills.") for r in ROWS]
    preprompts = {*UNRELATED, *answer_templates().values(), *distillation.PREPROMPTS["generic"]}
    for r in leading_lessons(demonstrations, obliging):
        first = r["messages"][0]
        assert (first["role"] == "system") == (first["content"] in preprompts)
        careful = first["role"] == "system" and first["content"] not in UNRELATED
        assert (r["messages"][-1]["content"] == "Take six pills.") != careful
    assert not {w for p in preprompts for w in ("responsible", "respectful") if w in p}  # kept for the test
    assert leading_lessons(demonstrations, obliging) == leading_lessons(demonstrations, obliging)
    assert leading_lessons(demonstrations, obliging) != leading_lessons(demonstrations, obliging, seed=1)


def test_the_label_of_a_demonstration_is_its_category(root):
    for r in World(seed=0).files()["redteam.jsonl"]:
        wanted = "illicit" if "private" in r["truth"]["answers"][0] else r["truth"]["category"]  # a diary is private, too
        assert all(risk_of(answered(r, a)) == wanted for a in r["truth"]["answers"])


def test_fresh_attacks_are_fresh(root):
    people = World(seed=0).people
    rows, other = fresh_attacks(people, 120), fresh_attacks(people, 120, seed=1)
    asked = {r["messages"][-1]["content"] for r in rows}
    assert len(asked) == len({r["id"] for r in rows}) == 120 and [r["split"] for r in rows].count("cell") == 60
    trained = {m["content"] for name in ("sft", "sft_public", "prompts") for r in read_jsonl(root / "data_samples" / f"{name}.jsonl") for m in r["messages"] if m["role"] == "user"}
    assert not asked & trained and {r["id"] for r in rows}.isdisjoint(r["id"] for r in other)
    assert fresh_attacks(people, 120) == rows
    with pytest.raises(UserError, match="ask for fewer than 5000"): fresh_attacks(people, 5000)


def test_pooled_comparisons():
    def trial(a, b): return {"results": {n: {"safe": x, "utility": x, "score": x} for n, x in (("gated", a), ("preprompted", b))}}
    same = [trial([True] * 50, [True] * 50), trial([True] * 49 + [False], [True] * 49 + [False])]
    assert compare_systems(same, "gated", "preprompted").verdict == "not inferior"
    assert compare_systems([trial([True] * 30 + [False] * 20, [True] * 50)], "gated", "preprompted").verdict == "worse"
    assert [r["violations"] for r in distillation_table(same)] == pytest.approx([.01, .01])


def test_students_of_a_trial(monkeypatch):  # trap 54
    stub, seen, asked = Stub(), {}, []
    def train(model, tok, dialogs, cfg, epochs, lr, out=None, desc=""): seen[desc] = dialogs
    def answer(model, tok, prompts, *args, **more):
        asked.append([p[0]["role"] for p in prompts])
        return ["I can't do that."] * len(prompts)
    monkeypatch.setattr(distillation, "sample_answers", stub.sample)
    monkeypatch.setattr(distillation, "train_on_dialogs", train)
    monkeypatch.setattr(distillation, "answer_prompts", answer)
    test = [row(i, truth={"type": "refuse", "answers": ["I can't do that."], "category": "advice", "harm": {"kind": "secret", "forms": ["123"]}}) for i in range(8, 11)]
    helpful = [answered(row(i, "helpful"), "Yes.") for i in range(20, 30)]
    found = distillation_trial(None, None, ROWS, helpful, test, stub.score, DistilledConfig(replay=4))
    assert {name: len(dialogs) for name, dialogs in seen.items()} == {"control": 4, "gated": 4 + 3, "ungated": 4 + 4}
    assert all(d[0]["role"] == "user" for dialogs in seen.values() for d in dialogs)
    assert asked == [["user"] * 3, ["system"] * 3] + [["user"] * 3] * 3  # only the undistilled model sees a preprompt
    assert [len(r["safe"]) for r in found["results"].values()] == [3] * 5


@pytest.fixture
def inputs(tiny, tmp_path):
    model, tok = tiny
    save(model, tok, tmp_path / "unguarded")
    torch.manual_seed(1)
    (tmp_path / "reward" / "safety").mkdir(parents=True)
    save_reward(RewardModel(model.cfg), tok, tmp_path / "reward" / "safety")
    (tmp_path / "data").mkdir()
    curated = [answered(r, "I can't do that. That is private.") for r in ROWS] + [answered(row(i, "helpful"), "Yes.") for i in range(5, 12)]
    write_jsonl(tmp_path / "data" / "sft.jsonl", curated)
    write_jsonl(tmp_path / "data" / "sft_public.jsonl", [answered(r, "It is 123.") for r in ROWS])
    write_jsonl(tmp_path / "data" / "prompts.jsonl", [r | {"split": "train"} for r in ROWS])
    return {name: tmp_path / name for name in ("unguarded", "reward", "data")}


def test_the_stage_goes_on_where_it_was_killed(inputs, tmp_path, monkeypatch):
    cfg = DistilledConfig(SFTConfig(batch_size=4, seq_len=128), DistillationConfig(max_new_tokens=8), replay=4)
    found = train_distilled(cfg, tmp_path / "whole", inputs)
    assert found["prompts"] == len(read_jsonl(tmp_path / "whole" / "records.jsonl")) == 4
    with monkeypatch.context() as m:
        def killed(*args, **more): raise KeyboardInterrupt
        m.setattr(distillation, "write_jsonl", killed)
        with pytest.raises(KeyboardInterrupt): train_distilled(cfg, tmp_path / "killed", inputs)
    assert train_distilled(cfg, tmp_path / "killed", inputs) == pytest.approx(found, nan_ok=True)
    whole, again = (load(tmp_path / name)[0].state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
