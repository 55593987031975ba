"Context distillation: the preprompt is there while sampling and nowhere else, and the gate keeps only what is better."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.chat import check_messages, encode_dialog
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.safety import distillation
from llama2_nbdev.safety.distillation import (
    ADJECTIVES, DistillationConfig, answer_both_ways, answer_templates, choose_preprompt, distil, distillation_report, gain, generic_preprompts,
    passes, with_preprompt)

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
