"Cleaning: furniture, rules, personal data by site, language."
import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.pretraining.cleaning import (BOILERPLATE, CODE_RULES, PROSE_RULES, Page, PersonalConfig, QualityConfig, SiteCounts, broken_rule,
                                               language_of, personal_items, site_of, strip_boilerplate)

TEN = "The old man went down to the sea with his dog."
FURNITURE = ["Click here to read more.", "We use cookies on this page.", "Sign up for our letter.", "All rights reserved.", "Share this page.",
             "Home | About us | Contact", "Please enable JavaScript.", "Privacy policy"]

# ---- furniture

@pytest.mark.parametrize("line", FURNITURE)
@pytest.mark.parametrize("form", ["{} {}", "{}\n{}", "{}\n\n{}\n"])
def test_furniture_goes_and_text_stays(line, form):
    text, removed = strip_boilerplate(form.format(TEN, line))
    assert text == TEN and removed == [line]
    assert strip_boilerplate(form.format(line, TEN))[0] == TEN if "\n" in form or line[-1] in ".!" else True

@pytest.mark.parametrize("text", ["The cookies that Tom bakes are good.", "All men have rights, and some are reserved.", "She clicked here and there.",
                                  "| a | b | c |\n|---|---|---|", "They share this view, and so the page turned.", ""])
def test_text_that_only_sounds_like_furniture(text):
    assert strip_boilerplate(text) == (text, [])

@given(st.lists(st.sampled_from([TEN, "Tom has a dog.", "x = 1", "", *FURNITURE]), max_size=8), st.sampled_from([" ", "\n", "\n\n"]))
@settings(max_examples=100, deadline=None)
def test_stripping_twice_is_stripping_once(parts, gap):
    once, removed = strip_boilerplate(gap.join(parts))
    assert strip_boilerplate(once)[0] == once
    assert sum(map(len, removed)) + len(once) <= len(gap.join(parts))

def test_long_sentences_are_text():
    text = "We use cookies on this page " + "and much else that is told here at length " * 3
    assert strip_boilerplate(text) == (text, []) and strip_boilerplate(text, max_words=99)[0] == ""
    assert strip_boilerplate(FURNITURE[0], phrases=()) == (FURNITURE[0], [])

# ---- rules

def test_every_rule_can_fire():
    pages = {"word length": "a b c d e f g h i j k l", "symbols": TEN + " #sea #dog #man", "bullets": "\n".join(f"- {w} together with others" for w in TEN.split()),
             "cut lines": f"{TEN}\nThe dog ran after...\n{TEN[4:]}\nThen it...", "few letters": TEN + " 2010 2011 2012 2013",
             "repeated lines": "\n".join([TEN] * 3), "repeated words": "cheap red shoes " * 8 + TEN, "placeholder": TEN + " Lorem ipsum dolor sit amet."}
    code = {"long lines": "table = [" + "17, " * 400 + "]", "few letters": "+ - * / % = ( ) { } [ ] < > ! ? ; a", "generated": "# Auto-generated file\n" + "x = 1\n" * 9}
    assert pages.keys() == PROSE_RULES.keys() and code.keys() == CODE_RULES.keys()
    assert [broken_rule(t) for t in pages.values()] == list(pages) and [broken_rule(t, "code") for t in code.values()] == list(code)
    assert broken_rule(TEN) is None

@given(st.text(max_size=200), st.sampled_from(["web", "code"]))
@settings(max_examples=200, deadline=None)
def test_rules_survive_any_text(text, source):
    for cfg in (QualityConfig(), QualityConfig(min_words=0)):
        assert broken_rule(text, source, cfg) in {None, "few words", "many words", *PROSE_RULES, *CODE_RULES}

def test_lengths():
    assert broken_rule("word " * 9) == "few words" and broken_rule("word " * 11, cfg=QualityConfig(max_words=10)) == "many words"
    assert Page.of("a\n\n b \n").lines == ["a", "b"]

# ---- personal data

@pytest.mark.parametrize("text, kind", [
    ("jo@mail.example.org", "email"), ("(jo.doe+x@a-b.example)", "email"), ("+49 30 1234567", "phone"), ("+1 (415) 555-0132", "phone"), ("(415) 555-0132", "phone"),
    ("415-555-0132.", "phone"), ("030 1234 5678", "phone"), ("0170/1234567", "phone"), ("12 Old Mill Road", "address"), ("at 221b Baker Street,", "address"), ("Bergstraße 7", "address")])
def test_private_shapes(text, kind):
    found = personal_items(f"You find it: {text}")
    assert found and all(name.startswith(kind) for name in found)

@pytest.mark.parametrize("text", ["2023-07-19", "19.07.2023", "10 20 30 40", "version 3.12.1", "0.1234 5678", "x @ y", "@decorator", "a@b", "1,000,000,000", "5 Great Years",
                                  "f(0, 1)", "1415-555-01321", "3 + 415", "ISBN 978-3-16-148410-0", "127.0.0.1", "0x1234567"])
def test_harmless_shapes(text):
    assert personal_items(f"You find it: {text} there") == {}

def test_sites_not_pages():
    cfg, sites = PersonalConfig(share=.5, documents=2), SiteCounts()
    for url, text in [("https://a.example/1", "jo@x.example"), ("https://www.a.example/2", "al@x.example"), ("http://A.example:8/3", TEN),
                      ("https://b.example/1", "jo@x.example"), ("https://c.example/1", TEN), ("", "jo@x.example"), ("", "al@x.example")]:
        sites.add(url, text, cfg)
    assert sites.excluded(cfg) == {"a.example": 2 / 3}                     # b has one page only; no address, no site
    assert site_of("file://My-Package/a/b.py") == "my-package"

@given(st.permutations([("https://a.example", "jo@x.example")] * 3 + [("https://a.example", TEN)] * 5 + [("https://b.example", TEN)] * 2))
@settings(max_examples=20, deadline=None)
def test_order_of_pages_does_not_matter(pages):
    sites = SiteCounts()
    for url, text in pages: sites.add(url, text, PersonalConfig())
    assert sites.excluded(PersonalConfig()) == {"a.example": 3 / 8}

# ---- language

def test_language():
    pytest.importorskip("py3langid")
    assert language_of("Der Hund schläft in dem alten Haus am Fluss.") == "de" and language_of(TEN * 3) == "en"
    assert language_of("xq zzt 17", .99) == "unknown"

def test_real_text_is_left_alone(real_data):
    text = next((real_data / "tinyshakespeare").rglob("*.txt")).read_text()
    parts = [text[i:i + 5000] for i in range(0, 200_000, 5000)]
    assert sum(broken_rule(p) is None for p in parts) > .9 * len(parts)
    assert all(strip_boilerplate(p)[1] == [] and personal_items(p) == {} for p in parts)
