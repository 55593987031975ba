"Side-by-side comparison: blind order, verdicts, win rates, groups, rating sheets, opponents."
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.finetuning import human_evaluation as he
from llama2_nbdev.finetuning.human_evaluation import (
    LABELS, SidePanel, evaluate_labels, hf_chat_opponent, judge_rater, ours_is_left, prompt_groups, quintiles, rating_sheet,
    read_ratings, verdicts, win_tie_loss)
from llama2_nbdev.world.annotators import Judge

NA = np.nan
ROWS = [{"id": f"r{i}", "task": "fact" if i % 3 else "dialog", "kind": "helpful",
         "messages": [{"role": "user", "content": "Where? " * (1 + i % 7)}] + (i % 3 == 0) * [{"role": "assistant", "content": "Here."}, {"role": "user", "content": "Sure?"}],
         "truth": {"type": "answer", "answers": ["Mara lives in Oslo."], "value": "Oslo", "others": ["Lima"]}} for i in range(60)]
GOOD, BAD = ["Mara lives in Oslo."] * 60, ["Mara lives in Lima."] * 60
PANEL = SidePanel(tuple(judge_rater(Judge(.5, s)) for s in range(3)))
labels = st.lists(st.lists(st.sampled_from([-3., -2., -1., 0., 1., 2., 3., NA]), min_size=3, max_size=3), min_size=1, max_size=20)


def test_the_order_is_a_fair_coin_and_depends_on_the_prompt_alone():  # trap 59
    sides = np.array([[ours_is_left(0, r, f"p{i}") for i in range(2000)] for r in range(3)])
    assert (abs(sides.mean(1) - .5) < .04).all()
    assert abs(np.corrcoef(sides)[np.triu_indices(3, 1)]).max() < .08, "raters draw independently"
    assert abs((sides[0] == [ours_is_left(1, 0, f"p{i}") for i in range(2000)]).mean() - .5) < .04, "another seed, another order"
    some = PANEL.label(ROWS[::4], GOOD[::4], BAD[::4])
    assert (some == PANEL.label(ROWS, GOOD, BAD)[:, ::4]).all()


def test_sides_are_taken_out():
    seen = []
    def always_left(row, left, right): seen.append((left, right)); return -3
    found = SidePanel((always_left,), seed=0).label(ROWS, GOOD, BAD)[0]
    assert [(left == GOOD[0]) for left, _ in seen] == [v == 3 for v in found], "A much better is ours where ours is A"
    assert 0 < (found == 3).mean() < 1
    assert (SidePanel((always_left,), seed=None).label(ROWS, GOOD, BAD) == 3).all()
    x = PANEL.label(ROWS, GOOD, BAD)
    assert (x == -PANEL.label(ROWS, BAD, GOOD)).all() and x.mean() > 1


def test_a_biased_rater_is_unfair_until_the_order_is_random():  # trap 59
    rows = [{"id": i} for i in range(600)]
    panel = (lambda row, left, right: -1,) * 3
    fixed, drawn = (win_tie_loss(SidePanel(panel, seed).label(rows, ["a"] * 600, ["b"] * 600)) for seed in (None, 0))
    assert fixed.decided.mean == 1 and drawn.decided.low < .5 < drawn.decided.high


def test_missing_ratings_and_answers():
    def shy(row, left, right): return None if row["id"] == "r1" else 0
    found = SidePanel((shy, shy)).label(ROWS[:3], ["a", "a", None], ["b", "b", "b"])
    assert np.isnan(found).tolist() == [[False, True, True]] * 2
    with pytest.raises(ValueError): PANEL.label(ROWS, GOOD, BAD[:3])


def by_hand(column, rule):
    rated = sorted(v for v in column if v == v)
    if not rated: return NA
    if rule == "majority": return next((s for s in (1, -1) if 2 * sum(v * s > 0 for v in rated) > len(rated)), 0)
    middle = (rated[(len(rated) - 1) // 2] + rated[len(rated) // 2]) / 2
    return 0 if abs(middle) < 1 else np.sign(middle)


@settings(deadline=None, max_examples=100)
@given(labels, st.sampled_from(["median", "majority"]))
def test_verdicts(columns, rule):  # trap 59: the tie rule
    x = np.array(columns).T
    assert np.array_equal(verdicts(x, rule), [by_hand(c, rule) for c in columns], equal_nan=True)
    assert np.array_equal(verdicts(-x, rule), -verdicts(x, rule), equal_nan=True), "swapping the systems swaps the verdict"
    if not np.isnan(x).any(): assert np.array_equal(verdicts(x, "median"), verdicts(x, "majority"))


def test_win_tie_loss():
    w = win_tie_loss([3, 1, 0, -2, NA, 1])
    assert (w.win.mean, w.tie.mean, w.loss.mean, w.decided.mean) == pytest.approx((.6, .2, .2, .75))
    assert (w.win.n, w.decided.n, w.unrated) == (5, 4, 1)
    ties = win_tie_loss([0, 0, 0])
    assert ties.tie.mean == 1 and np.isnan(ties.decided.mean) and ties.decided.n == 0 and str(ties).endswith("nothing decided")
    small = win_tie_loss([1, 1, 1, -1])
    assert 0 <= small.decided.low and small.decided.high <= 1, "shares stay between 0 and 1"


def test_intervals_count_clusters_not_copies():  # trap 59
    v = np.random.default_rng(0).integers(-1, 2, 80)
    alone, copies, grouped = win_tie_loss(v), win_tie_loss(np.tile(v, 4)), win_tie_loss(np.tile(v, 4), np.tile(np.arange(80), 4))
    def width(w): return w.decided.high - w.decided.low
    assert width(copies) < .65 * width(alone) and width(grouped) == pytest.approx(width(alone), rel=.1)


def test_the_interval_covers():
    rng = np.random.default_rng(0)
    found = [win_tie_loss(rng.choice([1, 0, -1], 100, p=[.4, .3, .3])) for _ in range(60)]
    assert np.mean([w.win.low <= .4 <= w.win.high for w in found]) > .85
    assert np.mean([w.decided.low <= 4 / 7 <= w.decided.high for w in found]) > .85


@settings(deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=200))
def test_quintiles_are_ordered_and_equal_values_stay_together(values):
    names = quintiles(values)
    assert len({(v, n) for v, n in zip(values, names)}) == len(set(values)) and len(set(names)) <= 5
    for v, n in zip(values, names): assert int(n.split("-")[0]) <= v <= int(n.split("-")[1])


def test_quintiles_of_distinct_values_are_equal(): assert sorted(map(quintiles(range(100)).count, quintiles(range(100)))) == [20] * 100


def test_groups_and_evaluation():
    groups = prompt_groups(ROWS, GOOD)
    assert groups["kind"][:2] == ["multi-turn", "single-turn"] and groups["turns"][:2] == ["2", "1"] and groups["category"][:2] == ["dialog", "fact"]
    x = PANEL.label(ROWS, GOOD, BAD)
    x[:, 5] = NA
    e = evaluate_labels(ROWS, GOOD, x)
    assert e.overall.decided.low > .9 and e.overall.unrated == 1 and e.agreement.raters == 3
    for split in e.by.values(): assert sum(w.win.n for w in split.values()) == 59
    assert list(e.by["words"]) == sorted(e.by["words"], key=lambda g: int(g.split("-")[0]))
    assert e.by["kind"]["multi-turn"].win.n == 20
    assert evaluate_labels(ROWS, GOOD, x[:1]).agreement is None
    x[:2] = NA
    assert evaluate_labels(ROWS, GOOD, x).agreement is None
    x[2, :3] = NA
    assert evaluate_labels(ROWS[:4], GOOD[:4], x[:, :4]).by["category"].keys() == {"dialog"}, "a group without ratings is left out"


def fill(sheet, raters=PANEL.raters):
    rows = {r["id"]: r for r in ROWS}
    return [r | {"label": LABELS[raters[r["rater"]](rows[r["id"]], r["A"], r["B"]) + 3]} for r in sheet]


def test_sheet_round_trip(tmp_path):
    sheet = rating_sheet(ROWS, GOOD, BAD, seed=3)
    assert len(sheet) == 180 and all(r["label"] is None for r in sheet) and "ours" not in json.dumps(sheet)
    for r in range(3): write_jsonl(tmp_path / f"{r}.jsonl", [row for row in fill(sheet) if row["rater"] == r])
    found = read_ratings(*(tmp_path / f"{r}.jsonl" for r in range(3)))
    assert (found.labels == SidePanel(PANEL.raters, seed=3).label(ROWS, GOOD, BAD)).all()
    assert [r["ours"] for r in found.rows] == GOOD and [r["theirs"] for r in found.rows] == BAD and found.raters == [0, 1, 2]
    write_jsonl(tmp_path / "half.jsonl", [r | {"label": None} if i % 2 else r for i, r in enumerate(fill(sheet))])
    assert np.isnan(read_ratings(tmp_path / "half.jsonl").labels).sum() == 90
    assert len(rating_sheet(ROWS, GOOD, [None, *BAD[1:]])) == 177


@pytest.mark.parametrize("change, message", [
    ({"label": "A wins"}, r"sheet.jsonl:2: label 'A wins' is none of 'A much better'"),
    ({"rater": 1}, "sheet.jsonl:2: something else than the label"), ({"A": "changed"}, "sheet.jsonl:2: something else"),
    ({"seed": 9}, "sheet.jsonl:2: something else"), ({"id": "r7"}, "sheet.jsonl:2: something else")])
def test_a_damaged_sheet_names_file_and_line(tmp_path, change, message):
    rows = fill(rating_sheet(ROWS[:3], GOOD[:3], BAD[:3]))
    write_jsonl(tmp_path / "sheet.jsonl", [rows[0], rows[1] | change])
    with pytest.raises(UserError, match=message): read_ratings(tmp_path / "sheet.jsonl")


def test_other_errors(tmp_path):
    rows = fill(rating_sheet(ROWS[:2], GOOD[:2], BAD[:2], raters=1))
    write_jsonl(tmp_path / "twice.jsonl", rows + rows)
    with pytest.raises(UserError, match=r"twice.jsonl:3: rater 0 rates prompt 'r0' a second time"): read_ratings(tmp_path / "twice.jsonl")
    write_jsonl(tmp_path / "no_seal.jsonl", [{k: v for k, v in rows[0].items() if k != "seal"}])
    with pytest.raises(UserError, match="no_seal.jsonl:1: key 'seal' is missing"): read_ratings(tmp_path / "no_seal.jsonl")
    with pytest.raises(UserError, match="all different"): rating_sheet([ROWS[0], ROWS[0]], GOOD[:2], BAD[:2])
    with pytest.raises(UserError, match="choose 'median' or 'majority'"): verdicts([1, 2], "mean")
    with pytest.raises(UserError, match="2 cluster ids for 3 prompts"): win_tie_loss([1, 0, 1], [1, 2])
    with pytest.raises(UserError, match="none of the 2 prompts has a rating"): win_tie_loss([NA, NA])


def test_real_prompts(real_data, tmp_path):
    "People's comparisons of others become a sheet and come back."
    with gzip.open(real_data / "hh_rlhf" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as f: rows = [json.loads(line) for _, line in zip(range(20), f)]
    prompts = [{"id": i, "messages": [{"role": "user", "content": r["chosen"].split("\n\nHuman: ")[1].split("\n\nAssistant:")[0]}]} for i, r in enumerate(rows)]
    ours, theirs = ([r[k].rsplit("\n\nAssistant:", 1)[1].strip() for r in rows] for k in ("chosen", "rejected"))
    sheet = [r | {"label": "A better" if r["A"] == ours[r["id"]] else "B better"} for r in rating_sheet(prompts, ours, theirs)]
    write_jsonl(tmp_path / "sheet.jsonl", sheet)
    assert (read_ratings(tmp_path / "sheet.jsonl").labels == 2).all()


def test_plot():
    plt = pytest.importorskip("matplotlib.pyplot")
    fig = he.plot_win_rates({"a": win_tie_loss([1, 1, 0, -1]), "b": win_tie_loss([0, 0])}, "title")
    assert len(fig.axes[0].patches) == 6
    plt.close(fig)


TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}")


@pytest.fixture(scope="module")
def tiny_chat():
    "A random Llama with a tokenizer of whole words, as `transformers` makes them."
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<s>", "</s>", "<unk>", "system", "user", "assistant", *"hello be kind a b c d e f g h".split()]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>"])
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, bos_token_id=0, eos_token_id=1, initializer_range=.6)
    return transformers.LlamaForCausalLM(shape).eval(), tok


def test_an_opponent_uses_its_own_template_once(tiny_chat):
    model, tok = tiny_chat
    dialog = [{"role": "user", "content": "hello a b"}]
    words = tok.convert_ids_to_tokens(he.chat_ids(tok, dialog, "be kind"))
    assert words == ["<s>", "system", "be", "kind", "user", "hello", "a", "b", "assistant"], "one BOS, the generation prompt at the end"
    own = [{"role": "system", "content": "c"}, *dialog]
    assert he.chat_ids(tok, own, "be kind") == he.chat_ids(tok, own), "a system message of the dialog wins"


def test_an_opponents_answers_do_not_depend_on_the_batch(tiny_chat):
    model, tok = tiny_chat
    prompts = [[{"role": "user", "content": " ".join("abcdefgh"[:n])}] for n in (1, 6, 3, 8, 2)]
    one_by_one, batched = (hf_chat_opponent(model, tok, max_new_tokens=8, batch_size=n)(prompts) for n in (1, 5))
    assert one_by_one == batched and len(set(batched)) > 1
    ids = tok.apply_chat_template(prompts[1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, ids["input_ids"].shape[1]:]
    assert batched[1] == tok.decode(plain, skip_special_tokens=True).strip()


def test_long_prompts_are_dropped_and_cost_no_rating(tiny_chat):
    model, tok = tiny_chat
    prompts = [[{"role": "user", "content": "a " * n}] for n in (3, 30)]
    answers = hf_chat_opponent(model, tok, max_prompt_tokens=10, max_new_tokens=4)(prompts)
    assert isinstance(answers[0], str) and answers[1] is None
    assert win_tie_loss(SidePanel((lambda *_: 0,)).label([{"id": 0}, {"id": 1}], ["x", "x"], answers)).unrated == 1


def test_an_opponent_from_a_folder(tiny_chat, tmp_path):
    model, tok = tiny_chat
    model.save_pretrained(tmp_path / "chat"), tok.save_pretrained(tmp_path / "chat")
    prompts = [[{"role": "user", "content": "hello a b"}]]
    assert hf_chat_opponent(str(tmp_path / "chat"), max_new_tokens=8)(prompts) == hf_chat_opponent(model, tok, max_new_tokens=8)(prompts)
    with pytest.raises(UserError, match="could not be loaded"): hf_chat_opponent(str(tmp_path / "nothing"))
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"): hf_chat_opponent(str(tmp_path / "chat"))
