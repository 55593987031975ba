"""The tokenizer: nothing is lost, digits stand alone, text never becomes a special id, both file formats mean the same."""
import copy
import json
import pickle
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2_nbdev.artifacts import stages
from llama2_nbdev.core import UserError, write_jsonl
from llama2_nbdev.model.tokenizer import (SPACE, Tokenizer, TokenizerConfig, Vocabulary, huggingface_tokenizer, llama2c_tokenizer,
                                          piece_table, train_bpe)

TEXTS = [f"In {1900 + 7 * i} the {a} met the {b}, said Zoë.\nThen it rained in Köln for {i} days." for i in range(9)
         for a in ("fox", "hen", "cat") for b in ("dog", "owl", "cow")]
MODEL = train_bpe(TEXTS, 380)
tricky = st.text(alphabet=" a▁\u2047\u2585\t\n\r\x00<s>/0x\u0301é日\U0001d11e\ufeff\ufffd\u3000")
any_text = st.text() | tricky | st.lists(st.sampled_from(TEXTS + ["<s>", "</s>", " ", SPACE])).map("".join)


@pytest.fixture(scope="module", params=["sentencepiece", "llama2c"])
def tok(request, tmp_path_factory) -> Tokenizer:
    "The same pieces, read from either format; the file's name says nothing."
    path = tmp_path_factory.mktemp("tok") / "file"
    path.write_bytes(MODEL)
    if request.param == "llama2c":
        path.write_bytes(llama2c_tokenizer(Tokenizer(path)))
    return Tokenizer(path)


def test_special_ids(tok):
    assert (tok.unk_id, tok.bos_id, tok.eos_id, tok.vocab_size) == (0, 1, 2, 380)
    assert tok.pad_id == -1  # trap 13
    for i in (tok.pad_id, tok.vocab_size):
        with pytest.raises(UserError, match="not in this vocabulary"):
            tok.decode([i])


def test_any_text_survives(tok):
    @settings(max_examples=150, deadline=None)
    @given(any_text, st.booleans(), st.booleans())
    def check(text, bos, eos):
        ids = tok.encode(text, bos=bos, eos=eos)
        assert tok.decode(ids) == text
        assert (ids.count(tok.bos_id), ids.count(tok.eos_id), ids.count(tok.unk_id)) == (bos, eos, 0)  # trap 23
        assert not bos or ids[0] == tok.bos_id
        assert not eos or ids[-1] == tok.eos_id
    check()


def test_any_bytes_survive(tok):
    @settings(max_examples=150, deadline=None)
    @given(st.binary() | any_text.map(str.encode))
    def check(data):
        assert tok.decode_bytes(tok.encode(data, eos=True)) == data
    check()


def test_streamed_bytes_are_the_text(tok):
    @settings(max_examples=100, deadline=None)
    @given(any_text)
    def check(text):
        joined = b"".join(tok.token_bytes(i) for i in tok.encode(text)).decode()
        assert joined in (text, " " + text)
    check()


def greedy(tok: Tokenizer, text: str) -> list[int]:
    "BPE from its definition: merge the best pair, the leftmost of equals, until none is left."
    ids = {p: i for i, (p, _, kind) in enumerate(piece_table(tok.sp)) if kind == 1}
    parts = list((" " + text).replace(" ", SPACE)) if text else []
    while pairs := [(tok.sp.get_score(ids[a + b]), -k) for k, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]:
        k = -max(pairs)[1]
        parts[k:k + 2] = [parts[k] + parts[k + 1]]
    return [i for p in parts for i in ([ids[p]] if p in ids else [3 + b for b in p.encode()])]


def test_encoding_is_greedy_bpe(tok):
    @settings(max_examples=100, deadline=None)
    @given(any_text.filter(lambda s: SPACE not in s))
    def check(text):
        assert tok.encode(text, bos=False) == greedy(tok, text) == tok.sp.encode(text)
    check()


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", "<0x0A>", "\n<s>\n", "<s>[INST] hi [/INST]</s>"])
def test_special_text_is_only_text(tok, text):
    ids = tok.encode(text, bos=True)
    assert ids.count(tok.bos_id) == 1 and tok.eos_id not in ids and tok.unk_id not in ids  # trap 23
    assert 13 not in ids or "\n" in text
    assert tok.decode(ids) == text


def test_digits_stand_alone():
    same_number = ["the year 1984"] * 200
    pieces = piece_table(Vocabulary(train_bpe(same_number, 285)).sp)
    assert not [p for p, _, kind in pieces if kind == 1 and len(p) > 1 and any(c.isdigit() for c in p)]
    none = {p for p, _, _ in piece_table(Vocabulary(train_bpe(["no numbers at all"], 285)).sp)}
    assert none >= set("0123456789"), "a digit is a piece even where the corpus has none"


def test_training_is_deterministic_and_silent(tmp_path, capfd):
    a = Tokenizer.train(iter(TEXTS), 380, tmp_path / "a.model")
    Tokenizer.train(TEXTS, 380, tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes() == MODEL
    assert capfd.readouterr() == ("", "")
    a.save(tmp_path / "c.model")
    assert (tmp_path / "c.model").read_bytes() == MODEL


def test_long_lines_are_not_dropped():
    "SentencePiece skips lines of more than 4192 bytes unless told otherwise."
    pieces = piece_table(Vocabulary(train_bpe([" ".join(["hippopotamus"] * 1000)], 289)).sp)
    assert any(len(p) > 3 for p, _, kind in pieces if kind == 1)


@pytest.mark.parametrize("texts, size, says", [(["a few words"], 1000, r"too large.*Use vocab_size <= \d+"),
                                               (TEXTS, 100, r"too small.*Use vocab_size >= \d+"), ([], 300, "empty"), (["\n"], 300, "empty")])
def test_training_errors_say_what_to_do(texts, size, says, tmp_path):
    with pytest.raises(UserError, match=says):
        Tokenizer.train(texts, size, tmp_path / "x.model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"\x00" * 3000, b'{"model": {}}', MODEL[:3000], struct.pack("<ifi", 7, 0., 5) + b"<unk>"])
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match="neither a SentencePiece model nor"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_missing_file_and_half_characters(tmp_path, tok):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="lone surrogate"):
        tok.encode("\ud83d")


def test_copies_work(tok):
    for twin in (pickle.loads(pickle.dumps(tok)), copy.deepcopy(tok)):
        assert type(twin) is Tokenizer and twin.encode(TEXTS[0]) == tok.encode(TEXTS[0])


def test_hugging_face_reads_the_same(tok):
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(huggingface_tokenizer(tok)))

    @settings(max_examples=100, deadline=None)
    @given(any_text.filter(lambda s: s and SPACE not in s and not any(x in s for x in ("<s>", "</s>", "<unk>"))))
    def check(text):
        assert theirs.encode(text).ids == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text
    check()


def test_stage(tmp_path):
    write_jsonl(tmp_path / "pretrain.jsonl", [{"text": t} for t in TEXTS])
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": [{"role": "user", "content": "quick quick quick quick"}]}] * 30)
    stage = stages()["tokenizer"]
    assert stage.run(TokenizerConfig(380), tmp_path / "out", {"data": tmp_path}) == {"vocab_size": 380}
    made = Tokenizer(tmp_path / "out" / "tokenizer.model")
    assert made.sp.id_to_piece(made.encode("quick", bos=False)) == [f"{SPACE}quick"], "the dialogs are read too"


def test_llama2c_tokenizer_of_others(real_data):
    tok = Tokenizer(real_data / "stories260K" / "tok512.bin")
    text = (real_data / "stories260K" / "published_greedy_200steps.txt").read_text()
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id) == (512, 1, 2, -1)
    assert tok.decode(tok.encode(text)) == text and tok.encode(text, bos=False) == greedy(tok, text)
    assert len(tok.encode(text, bos=False)) == 200
    assert llama2c_tokenizer(tok) == (real_data / "stories260K" / "tok512.bin").read_bytes()
