"A round's choice: which samples a version is trained on."
from dataclasses import replace

import pytest
import torch
from test_rejection import CFG, ROWS, length, model, tok  # noqa: F401 (two are fixtures)

from llama2_nbdev import versions
from llama2_nbdev.finetuning.rejection import anchored_scorer, answer_likelihood
from llama2_nbdev.versions import RoundConfig, sample_and_select

pytestmark = pytest.mark.usefixtures("one_thread")
ROUND = RoundConfig(sampling=replace(CFG, k=24, max_new_tokens=16, batch_size=48), temperatures=(1.,), seed=3)


def chosen(model, tok, anchor, scorer=length):
    rows = sample_and_select("v1", model, tok, ROWS, scorer, replace(ROUND, anchor=anchor), None)
    return {r["id"]: r["messages"][-1]["content"] for r in rows}


def test_the_anchor_moves_the_choice_from_reward_to_likelihood(model, tok):
    asked = {r["id"]: r for r in ROWS}
    bare, firm = (chosen(model, tok, anchor) for anchor in (0., 1e6))
    assert bare != firm
    def mean(measure, said): return measure([asked[i] for i in said], list(said.values())).mean().item()
    assert mean(length, bare) > mean(length, firm)
    likely = lambda rows, answers: answer_likelihood(model, tok, rows, answers)
    assert mean(likely, firm) > mean(likely, bare)


def test_distilled_answers_carry_the_same_kind_of_score(model, tok, monkeypatch):
    said = {"id": "p0", "messages": [*ROWS[0]["messages"], {"role": "assistant", "content": "She lives in Oslo."}], "task": "fact", "kind": "safety"}
    monkeypatch.setattr(versions, "distil", lambda model, tok, rows, scorer: [said])
    rows = [ROWS[0] | {"kind": "safety"}, *ROWS[1:]]
    found = [r for r in sample_and_select("v1", model, tok, rows, length, replace(ROUND, anchor=.5), None) if r["version"] == "v1 distilled"]
    wanted = anchored_scorer(length, model, tok, .5)(rows[:1], ["She lives in Oslo."])
    assert torch.allclose(torch.tensor([r["reward"] for r in found]), wanted)
