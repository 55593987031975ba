"""The paper's tables of Section 2.3: shapes, agreement between tables, recomputed means, known gaps."""
import pytest

from llama2_nbdev.core import UserError
from llama2_nbdev.pretraining.benchmarks import GROUPS
from llama2_nbdev.pretraining.paper_tables import (AGI_EVAL_QUESTIONS, TABLE3, TABLE4, TABLE19, TABLE20, TABLE21, TABLE22, TABLE23, TABLE24, TABLE25,
                                                   benchmarks, inconsistencies, recomputed)

SIZES = ("7B", "13B", "34B", "70B")


def test_shapes():
    assert len(TABLE3) == 12 and all(list(r) == list(GROUPS) for r in TABLE3.values())
    assert len(TABLE4) == 6
    for t in (TABLE19, TABLE20, TABLE21, TABLE22, TABLE23, TABLE24, TABLE25):
        assert tuple(t) == SIZES and all(0 < v < 100 for r in t.values() for v in r.values())


def test_group_means_are_the_papers():
    printed = {"Commonsense": (63.9, 66.9, 69.9, 71.9), "World knowledge": (48.9, 55.4, 58.7, 63.6), "Reading": (61.3, 65.8, 68.0, 69.4), "Code": (16.8, 24.5, 27.8, 37.5)}
    for group, row in printed.items():  # trap 57
        assert [recomputed()[s][group] for s in SIZES] == pytest.approx(row, abs=.0501)
        assert [TABLE3[f"Llama 2 {s}"][group] for s in SIZES] == list(row)


def test_math_of_the_small_sizes_is_gsm8k_alone():
    math = {r["size"]: r for r in inconsistencies() if r["what"] == "Math"}
    assert set(math) == {"7B", "13B"} and [math[s]["recomputed"] for s in ("7B", "13B")] == [8.55, 16.3]  # trap 57
    assert all(math[s]["printed"] == TABLE25[s]["GSM8K"] for s in math)


def test_agi_eval_is_a_mean_over_questions():
    total = sum(AGI_EVAL_QUESTIONS.values())
    for row in TABLE24.values():
        assert sum(row[t] * n for t, n in AGI_EVAL_QUESTIONS.items()) / total == pytest.approx(row["Average"], abs=.0501)
        assert abs(sum(row[t] for t in AGI_EVAL_QUESTIONS) / 8 - row["Average"]) > .1
    assert {r["size"] for r in inconsistencies() if r["table"] == 24} == set(SIZES)


def test_tables_agree_where_they_repeat_a_measurement():
    row = {b: v["Llama 2 70B"] for b, v in TABLE4.items()}
    assert row == {"MMLU (5)": TABLE19["70B"]["Average"], "TriviaQA (1)": TABLE22["70B"]["TriviaQA 1"], "NaturalQuestions (1)": TABLE22["70B"]["NQ 1"],
                   "GSM8K (8)": TABLE25["70B"]["GSM8K"], "HumanEval (0)": TABLE21["70B"]["HumanEval pass@1"], "BBH (3)": TABLE3["Llama 2 70B"]["BBH"]}
    assert all(TABLE20[s]["MMLU"] == TABLE19[s]["Average"] == TABLE3[f"Llama 2 {s}"]["MMLU"] for s in SIZES)


def test_every_benchmark_has_a_score():
    assert {b for members in GROUPS.values() for b in members} <= set(benchmarks("7B"))
    with pytest.raises(UserError, match="33B"):
        benchmarks("33B")
