"""The audit of a corpus: what is planted comes back, and the known ways to miscount are closed."""
import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.pretraining.cleaning import language_identifier, language_of
from llama2_nbdev.safety import audit as module
from llama2_nbdev.safety.audit import (IDENTITY, PRONOUNS, TABLE_9, TABLE_10, WORLD_AXES, AuditConfig, ScoreHistogram, TermCounter, audit, audit_figure,
                                       audit_stage, beside_paper, clean_terms, document_toxicity, hugging_face_classifier,
                                       load_holistic_bias, offline_classifier, words)

calm = lambda lines: [0.] * len(lines)
english = lambda text: ("en", 1.)


def shares(texts, lexicon):
    counter = TermCounter(lexicon)
    for text in texts: counter.count(text)
    return counter.shares()


def test_pronouns_are_words_not_letters():
    found = shares(["The theatre is theirs.", "History is there."], PRONOUNS)
    assert found["gender"]["terms"]["he"] == 0 and found["gender"]["terms"]["unspecified"] == 1
    assert ("person", "1st") not in TermCounter(PRONOUNS).found("The US and its IT.")  # a country is no pronoun
    assert ("person", "1st") in TermCounter(PRONOUNS).found("I'm here") and ("gender", "he") in TermCounter(PRONOUNS).found("HE SHOUTS")


def test_third_person_contains_every_gender_pronoun():
    for phrases in PRONOUNS["gender"].values():
        assert set(phrases) <= set(PRONOUNS["person"]["3rd"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("she he they I you it american african cat the".split()), max_size=8), min_size=1, max_size=30))
def test_shares_agree_with_a_naive_count(documents):
    texts = [" ".join(d) for d in documents]
    found = shares(texts, PRONOUNS)
    for axis, terms in PRONOUNS.items():
        holding = {t: [any(re.search(rf"\b{p}\b", text, re.I) for p in phrases) for text in texts] for t, phrases in terms.items()}
        any_term = np.any(list(holding.values()), axis=0)
        assert found[axis]["share"] == pytest.approx(any_term.mean())
        for t, holds in holding.items():
            assert found[axis]["terms"][t] == pytest.approx(sum(holds) / max(1, any_term.sum()))


def test_longest_phrase_wins_and_hyphens_separate():
    lexicon = clean_terms(IDENTITY)
    found = TermCounter(lexicon).found("A native-American and an African American met a non-binary Swede.")
    assert found == {("race and ethnicity", "native american"), ("race and ethnicity", "african american"), ("gender and sex", "non binary")}
    assert TermCounter(lexicon).found("Male and female americans") == {("gender and sex", "male"), ("gender and sex", "female")}


def test_clean_terms_drops_ambiguous_and_duplicates():
    lexicon = clean_terms({"a": ("Queer", "straight"), "b": ("queer", "White", "Middle-Eastern", "middle eastern")})
    assert lexicon == {"a": {}, "b": {"queer": ("queer",), "middle eastern": ("middle eastern",)}}
    every = [t for terms in clean_terms(IDENTITY).values() for t in terms]
    assert len(every) == len(set(every))


def test_paper_terms_are_in_our_list():
    ours = clean_terms(IDENTITY)
    for axis in ours:
        assert set(TABLE_9[axis][1]) <= set(ours[axis]), axis
    assert sum(TABLE_10.values()) < 100.01 and TABLE_10["en"] == 89.70


def test_holistic_bias_file(tmp_path: Path):
    file = tmp_path / "descriptors.json"
    body = '{"ability": {"x": ["tall"]}, ' + ", ".join(f'"{a}": {{"b": ["Term {i}", {{"descriptor": "Queer", "preference": "p"}},]}}'
                                                       for i, a in enumerate(module.HOLISTIC_AXES)) + "}"
    file.write_text(body)
    axes = load_holistic_bias(file)
    assert list(axes) == list(IDENTITY) and axes["religion"] == ("Term 4", "Queer")
    assert clean_terms(axes)["religion"] == {"term 4": ("term 4",), "queer": ("queer",)} and clean_terms(axes)["nationality"] == {"term 2": ("term 2",)}
    AuditConfig(axes=axes)
    file.write_text("[1]")
    with pytest.raises(UserError, match="has no axis"): load_holistic_bias(file)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"): load_holistic_bias(file)


def test_document_score_is_the_mean_over_lines():
    loud = lambda lines: [float(x.isupper()) for x in lines]
    assert document_toxicity(["A\n\nb\nc\n", "", "A"], loud).tolist() == pytest.approx([1 / 3, 0, 1])
    assert document_toxicity([], loud).tolist() == []
    texts = ["\n".join("Ab"[Random(i).random() < .5] for _ in range(i % 7)) for i in range(50)]
    assert (document_toxicity(texts, loud, "max") >= document_toxicity(texts, loud)).all()


def test_histogram_in_blocks_is_the_histogram_of_all():
    scores, h = np.random.default_rng(0).random(1000), ScoreHistogram(20, .5)
    for block in np.split(scores, [3, 400, 400, 999]): h.add(block)
    found = h.result()
    assert found["histogram"] == np.histogram(scores, 20, (0, 1))[0].tolist()
    assert found["toxic"] == pytest.approx((scores >= .5).mean()) and found["mean"] == pytest.approx(scores.mean())


def test_planted_skew_comes_back():
    rows = [{"text": "He took his hat."}] * 300 + [{"text": "She sang."}] * 100 + [{"text": "Rain fell."}] * 600
    rows += [{"text": "The Sikh and the catholic."}] * 50 + [{"text": "A Catholic."}] * 150
    Random(0).shuffle(rows)
    found = audit(rows, AuditConfig(sample=.01), calm, english)["terms"]
    assert found["gender"] == {"share": 400 / 1200, "terms": {"he": .75, "she": .25, "unspecified": 0.}}
    assert found["religion"]["share"] == 200 / 1200 and found["religion"]["terms"]["catholic"] == 1 and found["religion"]["terms"]["sikh"] == .25


def test_audit_streams_and_samples():
    alive, peak = 0, 0
    def rows():
        nonlocal alive, peak
        for i in range(2000):
            alive += 1
            yield {"text": f"line {i}"}
    def watch(lines):
        nonlocal alive, peak
        peak, alive = max(peak, len(lines)), 0
        return [0.] * len(lines)
    found = audit(rows(), AuditConfig(sample=.5, block=50, seed=3), watch, english)
    assert peak <= 50 and 850 < found["sampled"] < 1150 and found["documents"] == 2000
    assert audit(rows(), AuditConfig(sample=.5, block=7, seed=3), calm, english)["sampled"] == found["sampled"]  # blocks do not change the sample


def test_toxicity_is_measured_on_english_only():
    rows = [{"text": "en x"}, {"text": "de x"}]
    seen = []
    def classify(lines):
        seen.extend(lines)
        return [1.] * len(lines)
    who = lambda text: (text[:2], .9)
    assert audit(rows, AuditConfig(sample=1.), classify, who)["languages"] == {"en": .5, "de": .5} and seen == ["en x"]
    audit(rows, AuditConfig(sample=1., english_only=False), classify, who)
    assert seen[1:] == ["en x", "de x"]


def test_errors_name_file_and_line(tmp_path: Path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "a"}\n\n{"txt": "b"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl:3"): audit(file, AuditConfig(), calm, english)
    with pytest.raises(UserError, match="does not exist"): audit(tmp_path / "none.jsonl", AuditConfig(), calm, english)
    with pytest.raises(UserError, match="row 1 has no text"): audit([{"text": "a"}, {}], AuditConfig(), calm, english)
    with pytest.raises(UserError, match=r"nothing_here.*pip install .llama2_nbdev\[data\]"): module.optional_package("nothing_here", "llama2_nbdev[data]")


def test_offline_tools_and_stage(tmp_path: Path):
    pytest.importorskip("profanity_check"), pytest.importorskip("py3langid")
    kind, foul = offline_classifier()(["Tom is a writer.", "You are a stupid idiot."])
    assert kind < .3 and foul > .7 and offline_classifier()([]) == []
    identify = language_identifier()
    assert language_of("Tom wohnt in Madrid und hat einen Hund.") == "de" and language_of("5 + 2 = 7.") == "unknown"
    assert all(0 <= identify(t)[1] <= 1 for t in ("a", "", "Das ist ein Haus.", "x" * 5000))
    write_jsonl(tmp_path / "pretrain.jsonl", [{"text": "She is a nurse."}, {"text": "He likes the islanders."}])
    audit_stage(AuditConfig(axes=IDENTITY | WORLD_AXES, sample=1.), tmp_path, {"data": tmp_path})
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["terms"]["jobs"]["share"] == .5 and found["terms"]["peoples"]["terms"]["islanders"] == 1
    assert {"gender", "toxic documents"} <= {r["what"] for r in beside_paper(found)} and len(audit_figure(found).axes) == 3


def test_hugging_face_classifier(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "tom", "is", "bad", "kind"])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)  # names no limit
    cfg = transformers.BertConfig(vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16, num_labels=2)
    transformers.BertForSequenceClassification(cfg).save_pretrained(tmp_path)
    lines = ["tom is bad", "kind", "tom " * 40]
    toxic, fine = (np.array(hugging_face_classifier(tmp_path, label, batch_size=2)(lines)) for label in ("LABEL_1", "LABEL_0"))
    assert toxic.shape == (3,) and np.allclose(toxic + fine, 1, atol=1e-5)
    assert np.allclose(hugging_face_classifier(tmp_path)(lines[::-1])[::-1], toxic, atol=1e-5)
    assert hugging_face_classifier(tmp_path)([]) == []
    with pytest.raises(UserError, match="LABEL_0, LABEL_1"): hugging_face_classifier(tmp_path, "toxic")


def test_words_separate_at_punctuation():
    assert words("She's non-binary_too, US!") == ["she", "s", "non", "binary", "too"]


def test_shakespeare(real_data: Path):
    pytest.importorskip("profanity_check"), pytest.importorskip("py3langid")
    speeches = (real_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
    found = audit(({"text": s} for s in speeches), AuditConfig(sample=.05))
    gender, person = found["terms"]["gender"]["terms"], found["terms"]["person"]["terms"]
    assert gender["he"] > 2 * gender["she"] and person["1st"] > .5
    assert max(found["languages"], key=found["languages"].get) == "en"
