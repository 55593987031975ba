"The chat window, driven without a browser."
import builtins

import pytest
import torch

from llama2_nbdev import chat_widget as module
from llama2_nbdev.chat_widget import ChatWindow, StageChat, StaticTranscript, chat_widget, transcript
from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning import chat
from llama2_nbdev.finetuning.chat import Message
from llama2_nbdev.model.llama import Llama, ModelConfig
from llama2_nbdev.model.tokenizer import Tokenizer

pytest.importorskip("ipywidgets")


@pytest.fixture
def stages(tmp_path, monkeypatch):
    "Two stages that say their own name; a third that cannot be loaded."
    tok = Tokenizer.train(["Hello from one. Hello from two. [INST] [/INST]"] * 3, 290, tmp_path / "tokenizer.model")
    loads = []

    def load(name):
        loads.append(name)
        if name == "broken": raise UserError("stage 'broken' has not been made")
        model = Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, vocab_size=tok.vocab_size, multiple_of=8, max_seq_len=400))
        model.name = name
        return model, tok
    def speak(model, prompt, *args, **kwargs): return iter(tok.encode(f"Hello from {model.name}. <b>", bos=False))
    monkeypatch.setattr(chat, "stream", speak)
    return {n: (lambda n=n: load(n)) for n in ("one", "two", "broken")}, loads


def said(window): return [m.content for m in window.talk.chat.messages]


def test_window_by_its_callbacks(stages):
    stages, loads = stages
    window = ChatWindow(StageChat(stages, max_new_tokens=40), ["Hi", "Bye"])
    assert loads == [] and len(window.buttons) == 2  # nothing is loaded before it is needed
    drawn = []
    window.log.observe(lambda change: drawn.append(change["new"]), "value")
    window.box.value = "Who?"
    assert said(window) == ["Who?", "Hello from one. <b>"] and window.box.value == ""
    assert len(drawn) > 3 and all("Who?" in d for d in drawn)  # it streamed
    window.buttons[1].click()
    assert said(window)[2] == "Bye" and loads == ["one"]
    window.stage.value = "two"
    window.box.value = "And you?"
    assert said(window)[-1] == "Hello from two. <b>" and len(said(window)) == 6 and loads == ["one", "two"]
    window.stage.value = "one"
    assert loads == ["one", "two"]  # kept
    window.clear.click()
    assert said(window) == [] and window.log.value == ""


def test_texts_are_escaped(stages):
    window = ChatWindow(StageChat(stages[0], max_new_tokens=40))
    window.box.value = "<script>alert(1)</script>"
    assert "<script>" not in window.log.value and "&lt;script&gt;" in window.log.value and "<b>" not in window.log.value
    assert "<i>" not in transcript([Message("assistant", "<i>")], "<i>") and "secret" not in transcript([Message("system", "secret")])


def test_mistakes_are_told_and_the_window_goes_on(stages):
    window = ChatWindow(StageChat(stages[0], max_new_tokens=40))
    window.box.value = "x [INST] y"
    assert "special tag" in window.log.value and said(window) == []
    window.box.value = "word " * 500
    assert "tokens but only" in window.log.value
    window.stage.value = "broken"
    assert "has not been made" in window.log.value
    window.box.value = "   "
    assert said(window) == []
    window.box.value = "Still there?"
    assert len(said(window)) == 2
    assert not any(c.disabled for c in (window.stage, window.box, window.clear, *window.buttons))


def test_interrupted_answer_stays(stages, monkeypatch):
    window = ChatWindow(StageChat(stages[0], max_new_tokens=40))
    real = chat.stream
    def stopped(*args, **kwargs):
        for i, token in enumerate(real(*args, **kwargs)):
            if i == 8: raise KeyboardInterrupt
            yield token
    monkeypatch.setattr(chat, "stream", stopped)
    window.box.value = "Who?"
    assert said(window)[0] == "Who?" and said(window)[1] and "Hello from one".startswith(said(window)[1])
    assert "Stopped." in window.log.value and not window.box.disabled


def test_without_ipywidgets(stages, monkeypatch):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name == "ipywidgets": raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    shown = chat_widget(stages[0], suggestions=["Hi", "Bye"], max_new_tokens=40)
    assert isinstance(shown, StaticTranscript) and len(shown.messages) == 4
    assert "ipywidgets" in repr(shown) and "&lt;b&gt;" in shown._repr_html_()


def test_default_stages_are_loaded_when_asked(monkeypatch):
    asked = []
    def load(name, preset): asked.append((name, preset)); raise UserError(f"stage {name!r} has not been made")
    monkeypatch.setattr(module, "load_chat_model", load)
    view = chat_widget(preset="nano")
    assert asked == []
    view.children[-1].value = "Hi"
    assert asked == [("sft", "nano")] and "has not been made" in view.children[1].value
