"""Our adapter and lm-eval's own Hugging Face model give the same answers on the same weights."""
import os
import sys

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from llama2_nbdev.core import UserError, read_jsonl
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.model.weights import save_hf
from llama2_nbdev.pretraining.benchmarks import GROUPS
from llama2_nbdev.pretraining.lm_eval_adapter import TABLE3_TASKS, lm_eval_model, run_lm_eval, write_task

pytestmark = pytest.mark.usefixtures("one_thread")


class Request:
    def __init__(self, *args):
        self.args = args


def hflm(both, **settings):
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM
    model, tok = both
    return HFLM(pretrained=model, tokenizer=tok, batch_size=3, device="cpu", **settings)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    pytest.importorskip("lm_eval")
    tok = Tokenizer.train(["Tom lives in Oslo and has a cat.", "Question: Where? Answer: there.", "3 + 4 = 7."] * 20, 300, tmp_path_factory.mktemp("tok") / "tokenizer.model")
    torch.manual_seed(0)
    model = Llama(ModelConfig(32, 2, 4, 2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=64))
    model.init_weights(std=.3)
    with torch.no_grad():
        model.output.weight[:259] = 0  # greedy texts then hold no half characters, which decoders show in different ways
    return model.eval(), tok


@pytest.fixture(scope="module")
def hf(own, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    save_hf(*own, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


PAIRS = [("Tom lives in", " Oslo"), ("Tom lives in ", "Oslo"), ("Question: Where?\nAnswer:", " there."), ("Question:\n\n", "Where?"), ("", "Tom has a cat."),
         ("3 + 4 =", " 7.\nand more"), ("Tom has a cat. " * 20, "Where?"), ("x", "  two spaces"), ("Tom", "é")]


def test_log_likelihoods_and_greedy_flags(own, hf):
    ours, theirs = (lm.loglikelihood([Request(*p) for p in PAIRS], disable_tqdm=True) for lm in (lm_eval_model(*own, batch_size=4), hflm(hf)))
    assert [lp for lp, _ in ours] == pytest.approx([lp for lp, _ in theirs], abs=1e-4)
    assert [bool(g) for _, g in ours] == [bool(g) for _, g in theirs]


def test_whole_texts(own, hf):
    texts = [Request(t) for t in ("Tom has a cat.", "3 + 4 = 7. " * 40, "x")]
    ours = lm_eval_model(*own).loglikelihood_rolling(texts)
    assert ours == pytest.approx(hflm(hf, add_bos_token=False).loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3, rel=1e-5)
    assert all(a > b for a, b in zip(ours, hflm(hf).loglikelihood_rolling(texts, disable_tqdm=True)))  # BOS twice costs


def test_greedy_texts(own, hf):
    asked = [Request(c, {"until": ["\n", "ca"], "max_gen_toks": n, "do_sample": False}) for n in (4, 9) for c, _ in PAIRS if c]
    assert lm_eval_model(*own).generate_until(asked) == hflm(hf).generate_until(asked, disable_tqdm=True)


def test_tables_from_a_local_task(own, hf, tmp_path):
    rows = [{"q": f"{a} + {b} =", "choices": [f"{a + b}.", f"{a * b + 9}.", "a cat."], "gold": 0} for a in range(1, 4) for b in range(1, 4)]
    write_task(tmp_path, "sums", rows, {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
                                        "fewshot_split": "test", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    tables = [run_lm_eval(lm, {"sums": 2}, tmp_path) for lm in (lm_eval_model(*own), hflm(hf))]
    assert tables[0] == tables[1] and set(tables[0]["sums"]) >= {"acc", "acc_norm"}


def test_real_gsm8k_runs_from_the_local_file(own, real_data, tmp_path):
    rows = read_jsonl(real_data / "gsm8k" / "test.jsonl")[:3]
    write_task(tmp_path, "gsm8k_local", rows, {"output_type": "generate_until", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "{{answer.split('####')[-1].strip()}}",
                                               "generation_kwargs": {"until": ["Question:"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}]})
    assert run_lm_eval(lm_eval_model(*own), {"gsm8k_local": 0}, tmp_path)["gsm8k_local"]["exact_match"] == 0.


def test_tasks_are_those_of_table_3_with_its_shots():
    for members in GROUPS.values():
        for name, (shots, _) in members.items():
            assert TABLE3_TASKS[name] is None or str(TABLE3_TASKS[name][1]) == shots.split("-")[0]  # trap 57
    assert [b for b, t in TABLE3_TASKS.items() if t is None] == ["QuAC"]


def test_without_lm_eval_the_message_says_what_to_install(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"llama2_nbdev\[eval\]"):
        lm_eval_model(*own)
