"""TruthfulQA, ToxiGen and BOLD: what is scored, how it is averaged, and what the paper's own tables say about both."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_nbdev.core import UserError, read_jsonl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.safety import benchmarks as module
from llama2_nbdev.safety.benchmarks import (SIX_PAIRS, TABLE_11, TABLE_14, TABLE_44, TABLE_45, TABLE_49, TABLES_46_48, Prompt, SafetyTask, bold, by_group,
                                            chatting, continuing, load_bold, load_toxigen, load_truthfulqa, model_judge, overall, qa_prompt,
                                            reference_judge, run_task, toxicity_scorer, toxigen, truth_scorer, truthfulqa, vader, world_bold,
                                            world_informative, world_toxigen, world_truthful, world_truthfulqa)
from llama2_nbdev.world.people import make_people

HEAD = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"


@pytest.fixture(scope="module")
def rows(root: Path) -> list[dict]:
    return read_jsonl(root / "data_samples" / "eval.jsonl")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Llama, Tokenizer]:
    "An untrained model and a tokenizer."
    tok = Tokenizer.train(["Is it true? yes no True: Q: A: Tom lives in Lima."] * 20, 300, tmp_path_factory.mktemp("tok") / "tok.model")
    torch.manual_seed(0)
    return Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=8, max_seq_len=256)), tok


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_both_is_at_most_either(votes):
    task = truthfulqa([{"question": "?", "votes": v} for v in votes], lambda r, a: r["votes"][0], lambda r, a: r["votes"][1])
    records = run_task(task, lambda texts: ["x"] * len(texts))
    true, informative = (np.mean([r["scores"][m] for r in records]) for m in ("true", "informative"))
    assert overall(task, records) <= min(true, informative) + 1e-12
    assert overall(task, records) >= true + informative - 1 - 1e-12


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=1, max_size=40))
def test_macro_mean_does_not_see_the_size_of_groups(items):
    def value(items):
        task = SafetyTask("t", [Prompt(str(i), (g,), {"z": z}) for i, (g, z) in enumerate(items)], lambda p, a: [{"z": float(x.row["z"])} for x in p], "z", macro=True)
        return overall(task, run_task(task, lambda texts: texts))
    assert value(items) == pytest.approx(value([x for x in items for _ in range(5 if x[0] == "a" else 1)]))


def test_a_prompt_on_two_groups_counts_for_both_and_an_answer_too_few_is_an_error():
    task = toxigen([{"text": "t", "groups": ("x", "y")}], lambda lines: [.5 for _ in lines])
    assert by_group(run_task(task, lambda texts: ["a"]), "toxic") == {"x": 1., "y": 1.}
    with pytest.raises(ValueError): run_task(task, lambda texts: [])


def test_truthfulqa_file(tmp_path: Path):
    file = tmp_path / "TruthfulQA.csv"
    file.write_text("\ufeff" + HEAD + 'A,Sky,"Is it ""far"", really?",Yes,Yes; It is;,"No; Never, ever",u\nB,Sea,Why?,Rain,Rain,,u\n', encoding="utf-8")
    first, second = load_truthfulqa(file)
    assert first["question"] == 'Is it "far", really?' and first["category"] == "Sky" and first["correct"] == ["Yes", "It is"]
    assert first["incorrect"] == ["No", "Never, ever"]
    assert second["incorrect"] == [] and reference_judge(second, "Rain.")
    file.write_text(HEAD + "A,Sky,Why?\n")
    with pytest.raises(UserError, match=r"TruthfulQA\.csv:2: the row is cut off"): load_truthfulqa(file)
    file.write_text("")
    with pytest.raises(UserError, match="found nothing"): load_truthfulqa(file)
    with pytest.raises(UserError, match="does not exist"): load_truthfulqa(tmp_path / "none.csv")


def test_toxigen_and_bold_files(tmp_path: Path):
    items = [{"id": 1, "text": " x", "target_groups": ["a", "b"], "label": "hate"}, {"id": 2, "text": "y", "target_groups": ["a"]}]
    (tmp_path / "t.json").write_text(json.dumps(items))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, items)))
    assert load_toxigen(tmp_path / "t.json") == load_toxigen(tmp_path / "t.jsonl") == [{"text": "x", "groups": ("a", "b")}, {"text": "y", "groups": ("a",)}]
    (tmp_path / "t.json").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="item 0"): load_toxigen(tmp_path / "t.json")
    (tmp_path / "race_prompt.json").write_text(json.dumps({"G": {"N": ["N was ", "N is"], "M": ["M"]}, "H": {"K": ["K"]}}))
    assert [(r["group"], r["text"], r["domain"]) for r in load_bold(tmp_path)] == [("G", "N was", "race"), ("G", "N is", "race"), ("G", "M", "race"), ("H", "K", "race")]
    assert {p.groups[0] for p in bold(load_bold(tmp_path), len, minimum=2).prompts} == {"G"}  # H has one prompt
    with pytest.raises(UserError, match="largest: 3"): bold(load_bold(tmp_path), len)
    (tmp_path / "race_prompt.json").write_text('{"G": ["N was"]}')
    with pytest.raises(UserError, match="subgroup 'G'"): load_bold(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file"): load_bold(tmp_path / "empty")


def test_toxigen_reads_the_answer_and_bold_the_prompt_too():
    seen = []
    toxicity_scorer(lambda lines: seen.extend(lines) or [0.] * len(lines))([Prompt("bad prompt")], ["two\nlines"])
    assert seen == ["two lines"]
    task = bold([{"text": "begin", "group": "g"}], lambda text: seen.append(text) or 0., minimum=1)
    run_task(task, lambda texts: ["end"])
    assert seen[1:] == ["begin end"]


def test_six_pairs_then_the_question():
    assert len(SIX_PAIRS) == 6 and qa_prompt("Why?").endswith("\n\nQ: Why?\nA:") and qa_prompt("Why?", ()) == "Q: Why?\nA:"
    assert not any(q in qa_prompt("Why?").split("Q: Why?")[1] for q, _ in SIX_PAIRS)


def test_world_judges(rows):
    fact = next(r for r in rows if r["task"] == "fact")
    lie, nobody = fact["truth"]["others"][0], next(r for r in rows if r["task"] == "unknown")
    assert world_truthful(fact, fact["truth"]["answers"][0]) and world_informative(fact, fact["truth"]["answers"][0])
    assert not world_truthful(fact, f"It is {lie}.") and world_informative(fact, lie)
    assert world_truthful(fact, "I don't know.") and not world_informative(fact, "I don't know.")
    assert world_informative(nobody, "I don't know.") and not world_truthful(nobody, nobody["truth"]["made_up"])
    task = world_truthfulqa(rows)
    assert overall(task, run_task(task, lambda texts: [p.row["truth"]["answers"][0] for p in task.prompts])) == 1
    assert overall(task, run_task(task, lambda texts: [""] * len(texts))) == 0  # silence does not win


def test_world_tasks():
    people = make_people()
    toxic, tone = world_toxigen(people, per_group=20), world_bold(people, len)
    assert [p.text for p in toxic.prompts] == [p.text for p in world_toxigen(people, 20).prompts] != [p.text for p in world_toxigen(people, 20, seed=1).prompts]
    assert overall(toxic, run_task(toxic, lambda texts: ["You are a fool."] * len(texts))) == 1
    assert overall(toxic, run_task(toxic, lambda texts: ["I can't help with that."] * len(texts))) == 0
    assert set(by_group(run_task(tone, lambda texts: texts), "sentiment")) == {"she", "he"}


def test_answerers(tiny):
    model, tok = tiny
    texts = ["Tom lives", "Q: Is it true?\nA:"]
    for ask in (continuing(model, tok, 5, seed=1), chatting(model, tok, 5, seed=1)):
        assert ask(texts) == ask(texts) and len(ask(texts)) == 2
    assert all("e" not in a for a in continuing(model, tok, 20, temperature=1., end="e")(texts))


def test_model_judge_compares_yes_with_no(tiny):
    model, tok = tiny
    row, ids = {"question": "Is it true?"}, []
    judge = model_judge(model, tok)
    assert judge(row, "yes") in (True, False)
    yes, no = (tok.encode(f"True: {w}", bos=False)[-1] for w in ("yes", "no"))
    class Sure(torch.nn.Module):
        def __init__(self, favourite):
            super().__init__()
            self.favourite, self.p = favourite, torch.nn.Parameter(torch.zeros(1))
        def forward(self, tokens):
            ids.append(tokens[0].tolist())
            return torch.nn.functional.one_hot(torch.full_like(tokens, self.favourite), tok.vocab_size).float()
    assert yes != no and model_judge(Sure(yes), tok)(row, "it is") is True and model_judge(Sure(no), tok)(row, "it is") is False
    assert tok.decode(ids[0]).endswith("Q: Is it true?\nA: it is\nTrue:")


def test_vader_scores_feeling():
    pytest.importorskip("vaderSentiment")
    feel = vader()
    assert feel("happy and kind") > .3 > 0 > feel("sad and ugly") and abs(feel("a table")) < .05 and feel("not happy") < 0


def test_printed_tables_agree_with_each_other():
    printed = TABLE_11 | TABLE_14
    for model, groups in TABLE_45.items():
        assert len(groups) == 13 and np.mean(list(groups.values())) == pytest.approx(printed[model]["ToxiGen"], abs=.0051), model
    for model, x in TABLE_44.items():
        assert x["both"] == printed[model]["TruthfulQA"] and x["both"] <= min(x["true"], x["informative"]), model
        assert x["both"] >= x["true"] + x["informative"] - 100 - .02, model  # no negative share is neither
    old, new = TABLE_11["Llama 1 7B"], TABLE_11["Llama 2 7B"]
    assert 100 * (new["TruthfulQA"] / old["TruthfulQA"] - 1) == pytest.approx(21.37, abs=.06)     # relative, not points
    assert 100 * (1 - new["ToxiGen"] / old["ToxiGen"]) == pytest.approx(7.61, abs=.01)
    assert all(len(t) == 8 for t in (TABLES_46_48, TABLE_49)) and all(-1 <= x <= 1 for t in (TABLES_46_48, TABLE_49) for r in t.values() for x in r.values())
    with pytest.raises(ValueError): module.table("a, b", x="1")
