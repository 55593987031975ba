"""The counterparts of Table 3 in the world: no leak, right answers marked right, groups averaged over benchmarks."""
from pathlib import Path

import pytest
import torch

from llama2_nbdev.core import UserError, read_jsonl, write_jsonl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.pretraining.benchmarks import few_shot
from llama2_nbdev.pretraining.toy_benchmarks import TOY_GROUPS, kinds, measure, programs, runs, table, toy_tasks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(root) -> Path:
    return root / "data_samples"


def test_every_task_is_there_with_the_papers_shots(data):
    tasks = {t.name: t for t in toy_tasks(data, items=7)}
    assert set(tasks) == {n for names in TOY_GROUPS.values() for n in names}
    assert {n: t.shots for n, t in tasks.items() if t.shots} == {"function": 3, "facts": 5, "people": 5, "sums": 8, "problems": 4, "mixed": 5}  # trap 57
    assert all(t.shots == 0 for t in toy_tasks(data, chat=True, items=7))
    assert all(0 < len(t.items) <= 7 for t in tasks.values())


def test_no_shot_tells_the_answer(data):
    for task in toy_tasks(data):
        for item in task.items:
            shots = few_shot(task.pool, item, task.shots)
            assert all(s.question != item.question and not (item.key and s.key == item.key) for s in shots), (task.name, item)
            assert not item.choices or (item.answers[0] in item.choices and len(set(item.choices)) == len(item.choices))


def test_reference_answers_get_full_marks(data):
    for task in toy_tasks(data, items=6):
        if task.mark and not task.items[0].choices:
            assert task.mark(task.items, [i.answers[0] for i in task.items]) == [1.] * len(task.items), task.name
            assert sum(task.mark(task.items, [""] * len(task.items))) == 0, task.name


def test_programs_and_kinds(data):
    rows = read_jsonl(data / "eval.jsonl")
    made = programs([r for r in rows if r["task"] == "sums"][:1])
    assert runs(made["function"] * 3, [" a + b", " a - b", "\nimport os; os._exit(0)"]) == [1., 0., 0.]
    some = kinds(next(r for r in rows if r["task"] == "describe"))
    assert len(some) == 5 and all(i.answers[0] not in i.question for i in some)


def test_one_column_and_the_table(data, tmp_path):
    tok = Tokenizer.train((r["messages"][0]["content"] for r in read_jsonl(data / "eval.jsonl")), 420, tmp_path / "tokenizer.model")
    torch.manual_seed(0)
    model = Llama(ModelConfig(16, 1, 2, 1, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=1024)).eval()
    column = measure(model, tok, data, items=3)
    for group, names in TOY_GROUPS.items():
        assert column[group]["score"] == pytest.approx(sum(column[n]["score"] for n in names) / len(names))
    pd = pytest.importorskip("pandas")
    shown = table({"m": column})
    assert isinstance(shown, pd.DataFrame) and list(shown.columns) == ["m", "Llama 2 7B (paper)", "Llama 2 70B (paper)"]
    assert shown.loc["Math", "Llama 2 7B (paper)"] == pytest.approx(8.6, abs=.11)


def test_other_data_leaves_groups_out(data, tmp_path):
    rows = [r for r in read_jsonl(data / "eval.jsonl") if r["task"] == "reading"]
    for name in ("eval", "prompts"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert {t.name for t in toy_tasks(tmp_path)} == set(TOY_GROUPS["Reading"])
    write_jsonl(tmp_path / "eval.jsonl", [{"messages": [], "task": "mine", "truth": {}}])
    with pytest.raises(UserError, match="no row of a task"):
        toy_tasks(tmp_path)
