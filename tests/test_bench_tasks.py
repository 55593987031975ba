"""Benchmarks: shots that leak nothing, ranking and generation equal to naive loops, metrics, group means."""
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_nbdev.core import UserError, read_jsonl, token_logprobs
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer
from llama2_nbdev.pretraining.benchmarks import (GROUPS, Item, Prompt, Task, chat_format, cut, dialog_format, encode_pair, exact_match, f1, few_shot,
                                                 final_number, generate_texts, group_means, rank, run_task, same_number, score_pairs, shared_prefix)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    words = ["Tom lives in Oslo and has a cat.", "Where does Mara live? Lars: Petra:", "3 + 4 = 7."] * 20
    return Tokenizer.train(words, 300, tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tok) -> Llama:
    torch.manual_seed(0)
    made = Llama(ModelConfig(32, 2, 4, 2, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=64))
    made.init_weights(std=.3)
    return made.eval()


@torch.inference_mode()
def naive(model, pairs):
    def one(context, continuation):
        ids = torch.tensor([[*context, *continuation]])
        return token_logprobs(model(ids[:, :-1]), ids[:, 1:])[0][len(context) - 1:].sum().item()
    return [one(*p) for p in pairs]


ids = st.lists(st.integers(3, 299), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(head=st.lists(st.integers(3, 299), max_size=40), rest=st.lists(st.tuples(st.lists(st.integers(3, 299), max_size=12), ids), min_size=1, max_size=7),
       size=st.integers(1, 9))
def test_batched_scores_equal_the_naive_loop(model, head, rest, size):
    pairs = [([1, *head, *context], continuation) for context, continuation in rest]
    assert [s.logprob for s in score_pairs(model, pairs, size)] == pytest.approx(naive(model, pairs), abs=2e-4)


def test_a_wide_choice_beside_a_context_that_fills_the_model(model):
    rng = random.Random(0)
    pairs = [([1] + [rng.randrange(3, 300) for _ in range(n)], [rng.randrange(3, 300) for _ in range(t)]) for n, t in ((61, 3), (3, 40), (60, 1), (0, 60), (30, 2))]
    assert [s.logprob for s in score_pairs(model, pairs)] == pytest.approx(naive(model, pairs), abs=2e-4)
    with pytest.raises(UserError, match="needs 65 positions"):
        score_pairs(model, [([1] * 60, [3] * 6)])
    assert score_pairs(model, []) == []


def test_greedy_flag_is_greedy_decoding(model):
    context = [1, 5, 9]
    with torch.inference_mode():
        best = model(torch.tensor([context]))[0, -1].argmax().item()
    flags = [s.greedy for s in score_pairs(model, [(context, [best]), (context, [(best + 1) % 300]), (context, [best, best, best, 7])])]
    assert flags[:2] == [True, False]


def test_generation_equals_a_loop_without_cache(model, tok):
    prompts = [Prompt((1,), t) for t in ("Tom lives", "Where", "3 + 4 = 7. 3 + 4 =")]
    for prompt, text in zip(prompts, generate_texts(model, tok, prompts, 8)):
        row = [*prompt.ids, *tok.encode(prompt.text, bos=False)]
        start = len(row)
        with torch.inference_mode():
            for _ in range(8):
                row.append(model(torch.tensor([row]))[0, -1].argmax().item())
        new = row[start:]
        new = new[:next((i for i, t in enumerate(new) if t in (tok.eos_id, tok.bos_id)), 8)]
        assert text == cut(b"".join(map(tok.token_bytes, new)).decode(errors="replace"), ["\n"])


def test_context_and_continuation_are_encoded_together(tok):
    prompt = Prompt((1,), "Tom lives in")
    context, continuation = encode_pair(tok, prompt, " Oslo")
    assert context[1:] + continuation == tok.encode("Tom lives in Oslo", bos=False)
    assert encode_pair(tok, replace(prompt, text="Tom lives in "), "Oslo") == (context, continuation)
    with pytest.raises(UserError, match="nothing to score"):
        encode_pair(tok, prompt, "")


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=5))
def test_shared_prefix(rows):
    n = len(shared_prefix(rows))
    assert all(r[:n] == rows[0][:n] for r in rows)
    assert any(len(r) == n for r in rows) or len({r[n] for r in rows}) > 1


@given(st.integers(0, 99), st.integers(0, 6))
def test_shots_never_give_the_question_away(seed, k):
    pool = [Item(f"q{i} {w}", (f"a{i}",), key=f"fact {i}") for i in range(5) for w in "xy"]
    item = random.Random(seed).choice(pool)
    shots = few_shot(pool, item, k, seed)
    assert len(shots) == k and all(s.key != item.key for s in shots)
    same = few_shot([replace(i, key="") for i in pool], replace(item, key=""), k, seed)
    assert all(s.question != item.question for s in same)


def test_too_small_a_pool_is_an_error():
    with pytest.raises(UserError, match="only 0 items"):
        few_shot([Item("q", ("a",))], Item(" q ", ("a",)), 1)


def test_groups_are_those_of_table_3():
    shots = {b: s for members in GROUPS.values() for b, (s, _) in members.items()}
    assert shots == {**dict.fromkeys("PIQA SIQA HellaSwag WinoGrande ARC-e ARC-c OBQA SQuAD QuAC BoolQ HumanEval".split(), "0"), "MBPP": "3", "CSQA": "7",
                     "NQ": "5", "TriviaQA": "5", "GSM8K": "8", "MATH": "4", "MMLU": "5", "BBH": "3", "AGI Eval": "3-5"}  # trap 57
    with pytest.raises(UserError, match="'G' lacks b"):
        group_means({"a": 1.}, {"G": ("a", "b")})  # trap 57
    assert group_means({"a": 0., "b": 1., "c": .2}, {"G": ("a", "b"), "H": ("c",)}) == {"G": .5, "H": .2}


def test_metrics():
    assert exact_match("The cat.", ["a Cat"]) == 1 and exact_match("cats", ["cat"]) == 0
    assert f1("the red cat", ["a red dog"]) == pytest.approx(.5)
    assert f1("red", ["blue", "red hat"]) == pytest.approx(2 / 3)
    assert [final_number(t) for t in ("a 1,234.5", "#### 7 apples of 9", "-3", "no", "1\n#### x")] == [1234.5, 7., -3., None, 1.]
    assert same_number("x", ["y"]) == 0 and same_number("$12.00", ["#### 12"]) == 1


def test_a_task_from_end_to_end(model, tok):
    items = tuple(Item(f"Where {w}?", ("Oslo",), ("Oslo", "Tom lives")) for w in "ab")
    marks = run_task(model, tok, Task("t", items))
    scores = rank(model, tok, [dialog_format(tok, (), i.question) for i in items], [i.choices for i in items])
    assert marks == [float(a > b) for a, b in scores]
    by_bytes = rank(model, tok, [dialog_format(tok, (), "Where a?")], [("Oslo", "Tom lives")], "bytes")[0]
    assert by_bytes == pytest.approx([scores[0][0] / 4, scores[0][1] / 9])
    chat = chat_format(tok, items[:1], "Where?")
    assert chat.ids.count(tok.bos_id) == 2 and chat.ids[0] == tok.bos_id and chat.ids[-2] == tok.eos_id


def test_real_gsm8k_answers_end_with_a_number(real_data):
    rows = read_jsonl(real_data / "gsm8k" / "test.jsonl", required=("question", "answer"))
    numbers = [final_number(r["answer"]) for r in rows]
    assert len(rows) == 1319 and None not in numbers and numbers[0] == 18.
    assert all(float(r["answer"].rsplit("#### ", 1)[1].replace(",", "")) == n for r, n in zip(rows, numbers))
    assert all(same_number(r["answer"], [r["answer"]]) for r in rows)
