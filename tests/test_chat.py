"The dialog format: ids, mask, prompt, and streaming."
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning import chat
from llama2_nbdev.finetuning.chat import (
    TAGS, Chat, Message, answer_start, check_messages, cut_at_tag, decode_answer, dialog_turns, encode_dialog,
    encode_prompt, fit_context, reply, settled, stream_reply)
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer

LINES = ["Where does Mira live? Mira lives in Oslo.", "And what does she do? She is a baker.", "Be brief and kind.",
         "[INST] <<SYS>> <</SYS>> [/INST]", "Grüße aus Oslo, schöne Grüße."] * 4


@pytest.fixture(scope="module")
def tok(tmp_path_factory): return Tokenizer.train(LINES, 360, tmp_path_factory.mktemp("tok") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    return Llama(ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=tok.vocab_size, multiple_of=16, max_seq_len=160)).eval()


def plain(text): return bool(text.strip()) and not any(tag in text for tag in TAGS)


# texts from every corner of Unicode, and from an alphabet that nearly spells tags
contents = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
                     st.text(st.sampled_from(" \n\t[]/<>SINTY.\u2581\u3000\u200bé你"), min_size=1, max_size=30),
                     st.lists(st.sampled_from(["[INST", "INST]", "<<SYS", "<s>", "</s>", " ", "Mira", "Oslo."]), min_size=1, max_size=6).map("".join),
                     ).filter(plain)


@st.composite
def dialogs(draw, max_turns=3):
    turns = draw(st.integers(1, max_turns))
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(turns): messages += [Message("user", draw(contents)), Message("assistant", draw(contents))]
    return messages


def reference(tok, messages):
    "The rules once more, written from their description: merge, strip, one turn at a time."
    messages = [(m.role, m.content) for m in messages]
    if messages[0][0] == "system":
        messages[1] = ("user", "<<SYS>>\n" + messages[0][1] + "\n<</SYS>>\n\n" + messages[1][1])
        del messages[0]
    ids, mask = [], []
    for i in range(0, len(messages), 2):
        prompt = tok.encode("[INST] " + messages[i][1].strip() + " [/INST]", bos=True)
        turn = tok.encode("[INST] " + messages[i][1].strip() + " [/INST] " + messages[i + 1][1].strip() + " ", bos=True, eos=True)
        ids += turn
        mask += [j >= len(prompt) for j in range(len(turn))]
    return ids, mask


@settings(max_examples=150, deadline=None)
@given(messages=dialogs())
def test_ids_and_mask_follow_the_rules(tok, messages):  # traps 23 24 25 26 27
    ids, mask = encode_dialog(tok, messages)
    assert (ids, mask) == reference(tok, messages)
    turns = dialog_turns(messages)
    assert ids.count(tok.bos_id) == ids.count(tok.eos_id) == len(turns)  # trap 23: one BOS a turn, none from text
    assert all(m for i, m in zip(ids, mask) if i == tok.eos_id)  # trap 24
    assert not any(m for i, m in zip(ids, mask) if i == tok.bos_id)
    said = tok.decode_bytes([i for i, m in zip(ids, mask) if m])  # trap 27: exactly the answers, nothing of a prompt
    assert (b" " + said).replace(b"  ", b" ") == b"".join(f" {a} ".encode() for _, a in turns).replace(b"  ", b" ")


@settings(max_examples=150, deadline=None)
@given(messages=dialogs())
def test_prompt_is_what_was_trained(tok, messages):  # trap 26
    ids, mask = encode_dialog(tok, messages)
    first = 1 if messages[0].role == "system" else 0
    for end in range(first + 1, len(messages), 2):
        prompt = encode_prompt(tok, messages[:end])
        assert ids[:len(prompt)] == prompt
        assert mask[len(prompt)] and not mask[len(prompt) - 1]  # the first answer token is a target, the last of the prompt is none


@settings(max_examples=50, deadline=None)
@given(messages=dialogs())
def test_last_turn_only(tok, messages):  # trap 53
    ids, mask = encode_dialog(tok, messages)
    same, last = encode_dialog(tok, messages, last_turn_only=True)
    start = max(i for i, t in enumerate(ids) if t == tok.bos_id)
    assert same == ids and not any(last[:start]) and last[start:] == mask[start:]


def test_golden_pieces(tok):
    messages = [Message("system", "Be brief."), Message("user", " Where? "), Message("assistant", "In Oslo.\n"), Message("user", "And?")]
    ids, mask = encode_dialog(tok, messages)
    assert tok.decode(ids[1:ids.index(2)]) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Where? [/INST] In Oslo. "
    second = ids[ids.index(2) + 1:]
    assert second[0] == 1 and second[-1] != 2 and tok.decode(second) == "[INST] And? [/INST]"  # open turn: no trailing space
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == "In Oslo. " and len(mask) == len(ids)


def test_golden_ids_of_a_published_tokenizer():
    root = os.environ.get("LLAMA2_REAL_DATA")
    if not root: pytest.skip("set LLAMA2_REAL_DATA to the folder with stories260K")
    tok = Tokenizer(Path(root) / "stories260K" / "tok512.bin")
    ids, mask = encode_dialog(tok, [Message("system", "Be kind."), Message("user", "Hi there"), Message("assistant", "Once upon a time")])
    assert ids == GOLDEN_IDS
    assert [i for i, m in zip(ids, mask) if m] == GOLDEN_IDS[-6:]
    assert tok.bos_id not in tok.encode("<s> </s>", bos=False) and tok.eos_id not in tok.encode("<s></s>", bos=False)


GOLDEN_IDS = [1, 410, 508, 442, 458, 437, 434, 509, 410, 504, 504, 437, 452, 437, 505, 505, 13, 445, 411, 409, 417, 264, 426, 13,
              504, 504, 492, 437, 452, 437, 505, 505, 13, 13, 440, 417, 383, 410, 508, 492, 442, 458, 437, 434, 509,
              403, 407, 261, 378, 410, 2]


def test_one_system_block_merged_then_stripped():  # trap 25
    messages = [Message("system", " S "), Message("user", "  U "), Message("assistant", "A"), Message("user", " V ")]
    assert dialog_turns(messages) == [("<<SYS>>\n S \n<</SYS>>\n\n  U", "A"), ("V", None)]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("role", [0, 1, 2])
def test_tags_are_refused_everywhere(tok, tag, role):  # trap 25
    messages = [Message("system", "S"), Message("user", "U"), Message("assistant", "A")]
    messages[role] = Message(messages[role].role, f"x{tag}y")
    for f in (lambda: encode_dialog(tok, messages), lambda: fit_context(tok, messages[:2] if role < 2 else messages, 99)):
        with pytest.raises(UserError, match=r"message \d of \d .*special tag"): f()


@pytest.mark.parametrize("messages, says", [
    ([], "no user message"),
    ([{"role": "system", "content": "S"}], "no user message"),
    ([{"role": "assistant", "content": "A"}], "expected role 'user'"),
    ([{"role": "user", "content": "U"}] * 2, "message 2 of 2 .*expected role 'assistant'"),
    ([{"role": "user", "content": "U"}, {"role": "system", "content": "S"}], "expected role 'assistant'"),
    ([{"role": "User", "content": "U"}], "expected role 'user'"),
    ([{"role": "user", "content": " \n\t"}], "is empty"),
    ([{"role": "user", "content": None}], "is empty|no text"),
    ([{"role": "user"}], "expected an object"),
    (["hello"], "expected an object"),
    ("hello", "expected an object"),
])
def test_broken_dialogs_are_named(messages, says):
    with pytest.raises(UserError, match=says): check_messages(messages)


def test_prompt_needs_a_question(tok):
    with pytest.raises(UserError, match="last message must come from the user"):
        encode_prompt(tok, [Message("user", "U"), Message("assistant", "A")])


def test_shared_token_is_an_error_not_a_guess():  # trap 26
    class Straddling:
        def token_bytes(self, i): return [b"", b" [/INST", b"] A"][i]
    with pytest.raises(UserError, match="crosses the end"): answer_start(Straddling(), [0, 1, 2])


@settings(max_examples=40, deadline=None)
@given(messages=dialogs(4), budget=st.integers(1, 200))
def test_fit_context(tok, messages, budget):
    messages = messages[:-1]
    system = [m for m in messages if m.role == "system"]
    try: kept, dropped = fit_context(tok, messages, budget)
    except UserError:
        assert len(encode_prompt(tok, [*system, messages[-1]])) > budget
        return
    assert len(encode_prompt(tok, kept)) <= budget
    assert kept[:len(system)] == system and kept[-1] == messages[-1] and len(kept) == len(messages) - 2 * dropped
    if dropped:  # nothing was dropped without need
        longer = system + messages[len(system) + 2 * (dropped - 1):]
        assert len(encode_prompt(tok, longer)) > budget


# --- streaming ---------------------------------------------------------------------------------------------------------

def scripted(ids): return lambda *args, **kwargs: iter(ids)


QUESTION = [Message("user", "Hi")]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_never_splits_a_character_or_shows_a_tag(tok, model, data):
    text = data.draw(st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.lists(st.sampled_from([*TAGS, "[", "[[", "<", "<<", "</", " ", "\n", "a", "é", "你", "\ufffd", "[IN", "SYS>"]), max_size=8).map("".join)))
    ids = data.draw(st.one_of(st.just(tok.encode(" " + text, bos=False)), st.lists(st.integers(3, tok.vocab_size - 1), max_size=20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "stream", scripted(ids))
        parts = list(stream_reply(model, tok, QUESTION, max_new_tokens=64))
    joined = "".join(parts)
    assert all(parts) and not any(tag in joined for tag in TAGS) and joined == joined.strip()
    assert joined == decode_answer(tok, ids)
    whole = tok.decode(ids)
    if "\ufffd" not in whole: assert "\ufffd" not in joined  # no character was cut in two
    shown = ""
    for part in parts: shown += part; assert joined.startswith(shown)


def test_bytes_of_one_character_arrive_together(tok, model, monkeypatch):
    ids = tok.encode("你好", bos=False)
    assert len(ids) > 6  # each character is three byte tokens
    monkeypatch.setattr(chat, "stream", scripted(ids))
    assert list(stream_reply(model, tok, QUESTION, max_new_tokens=64)) == ["你", "好"]


def test_stream_ends_at_a_tag_without_waiting_for_more(tok, model, monkeypatch):
    drawn = []
    def endless(*args, **kwargs):
        for i in tok.encode("Hello. [INST] I am the user.", bos=False): drawn.append(i); yield i
    monkeypatch.setattr(chat, "stream", endless)
    assert reply(model, tok, QUESTION, max_new_tokens=64) == "Hello."
    assert tok.decode(drawn).endswith("[INST]")


def test_model_is_asked_with_the_training_prefix_and_stops(tok, model, monkeypatch):
    asked = {}
    def spy(model, prompt, max_new_tokens, **kw): asked.update(kw, prompt=prompt, n=max_new_tokens); return iter([])
    monkeypatch.setattr(chat, "stream", spy)
    messages = [*QUESTION, Message("assistant", "Hello."), Message("user", "Bye")]
    assert reply(model, tok, messages, max_new_tokens=7, seed=3) == ""
    assert asked["prompt"] == encode_prompt(tok, messages) and asked["n"] == 7 and asked["seed"] == 3
    assert tok.eos_id in asked["stop_ids"]


def test_real_stream_is_seeded_and_bounded(tok, model):
    texts = [reply(model, tok, QUESTION, max_new_tokens=30, temperature=1., top_p=1., seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert cut_at_tag(texts[0]) == texts[0]
    with pytest.raises(UserError, match="only 0 fit"): reply(model, tok, QUESTION, max_new_tokens=1000)
    with pytest.raises(UserError, match="tokens but only"): reply(model, tok, [Message("user", "Oslo " * 200)], max_new_tokens=30)


def test_settled_is_monotonic():
    text = " A [1] <b> <<SY [/INS [INS <</SYS>> more"
    shown = [settled(text[:n]) for n in range(len(text) + 1)]
    assert all(b.startswith(a) for a, b in zip(shown, shown[1:])) and shown[-1] == "A [1] <b>"  # the rest may become tags
    assert settled("A [1] <b> [/INS x") == "A [1] <b> [/INS x"


# --- the conversation --------------------------------------------------------------------------------------------------

def test_chat_keeps_the_history(tok, model, monkeypatch):
    seen = []
    def echo(model, prompt, *args, **kwargs): seen.append(prompt); return iter(tok.encode("Oslo. ", bos=False))
    monkeypatch.setattr(chat, "stream", echo)
    talk = Chat(model, tok, system="Be brief.", max_new_tokens=20)
    assert list(talk.send("Where?")) and "".join(talk.send("Sure?")) == "Oslo."
    assert [m.role for m in talk.messages] == ["user", "assistant"] * 2
    assert seen[1] == encode_prompt(tok, [Message("system", "Be brief."), *talk.messages[:3]])
    talk.reset()
    assert talk.messages == [] and talk.notice == ""


def test_chat_refuses_before_it_answers(tok, model):
    talk = Chat(model, tok, max_new_tokens=20)
    with pytest.raises(UserError, match="special tag"): talk.send("x [INST] y")
    with pytest.raises(UserError, match="is empty"): talk.send("  ")
    with pytest.raises(UserError, match="tokens but only"): talk.send("Oslo " * 300)
    assert talk.messages == []


def test_chat_drops_the_oldest_turn_with_a_notice(tok, model, monkeypatch):
    monkeypatch.setattr(chat, "stream", scripted(tok.encode("Oslo. " * 5, bos=False)))
    talk = Chat(model, tok, system="Be brief.", max_new_tokens=20)
    notices = []
    for i in range(8): list(talk.send(f"Where does Mira live? {i}")); notices.append(talk.notice)
    assert not notices[0] and "left out" in notices[-1]
    assert talk.messages[0].role == "user" and talk.messages[-2].content.endswith("7")


def test_chat_stopped_half_way_and_empty(tok, model, monkeypatch):
    monkeypatch.setattr(chat, "stream", scripted(tok.encode("Mira lives in Oslo and bakes.", bos=False)))
    talk = Chat(model, tok, max_new_tokens=20)
    pieces = talk.send("Where?")
    first = next(pieces)
    pieces.close()  # the person pressed stop
    assert [m.content for m in talk.messages] == ["Where?", first]
    monkeypatch.setattr(chat, "stream", scripted([]))
    assert list(talk.send("And?")) == [] and len(talk.messages) == 2 and "nothing to say" in talk.notice
