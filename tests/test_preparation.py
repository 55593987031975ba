"Preparing a corpus: readers, positions, a killed run, constant memory, accounts, messages."
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError, read_jsonl
from llama2_nbdev.pretraining import preparation
from llama2_nbdev.pretraining.cleaning import PersonalConfig, QualityConfig
from llama2_nbdev.pretraining.data import read_documents
from llama2_nbdev.pretraining.deduplication import DedupConfig, Deduplicator
from llama2_nbdev.pretraining.preparation import PrepareConfig, Source, find_sources, mixture, package_corpus, prepare, read_source

LINE = "The {} old men of the village saw {} large fish in the lake near {} houses."
EXACT = PrepareConfig(dedup=DedupConfig(near=False), checkpoint_every=7)

def write(path, n, site="a"):
    rows = [{"text": LINE.format(i % 40, i % 7, i % 40), "source": "web" if i % 3 else "books", "url": f"https://{site}{i % 5}.example/{i}"} for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows

def outputs(folder): return (folder / "pretrain.jsonl").read_bytes(), {**json.loads((folder / "report.json").read_text()), "key": 0}

# ---- readers

@pytest.fixture
def files(tmp_path):
    "The same kind of content in every format, under names that tell nothing."
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = tmp_path / "in"
    folder.mkdir()
    rows = write(folder / "a", 9)
    (folder / "b").write_bytes(gzip.compress((folder / "a").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "c", row_group_size=4)
    (folder / "d").write_text("\n\n".join(r["text"] for r in rows))
    (folder / "e").write_bytes(gzip.compress((folder / "d").read_bytes()))
    return folder, rows

def test_every_format_and_every_position(files):
    folder, rows = files
    for source in find_sources(folder):
        docs = list(read_source(source, piece=200))
        if source.path[-1] in "abc": assert [(d.text, d.source, d.url) for d in docs] == [(r["text"], r["source"], r["url"]) for r in rows]
        else: assert "".join(d.text for d in docs) == "\n\n".join(r["text"] for r in rows) and len(docs) > 3
        for i, d in enumerate(docs): assert list(read_source(source, d.after, 200)) == docs[i + 1:]

@given(st.text(st.sampled_from("ab\n é漢😀"), max_size=200), st.integers(16, 60))
@settings(max_examples=150, deadline=None)
def test_pieces_of_text_are_the_text(tmp_path_factory, text, piece):
    file = tmp_path_factory.getbasetemp() / "text"
    file.write_bytes(text.encode())
    docs = list(read_source(Source(str(file)), piece=piece))
    assert "".join(d.text for d in docs) == text and all(0 < len(d.text.encode()) <= piece for d in docs)
    for i, d in enumerate(docs):
        assert list(read_source(Source(str(file)), d.after, piece)) == docs[i + 1:]
        assert int(d.where.rpartition(":")[2]) == 1 + "".join(x.text for x in docs[:i]).count("\n")

@pytest.mark.parametrize("content, message", [
    (b'{"text": "a"}\n\n{"text": "b\n', "f:3: not valid JSON"), (b'{"text": 7}\n', "f:1: no text"), (b'{"txt": "a"}\n', "f:1: key 'text' is missing"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "f:2: byte .* is not UTF-8"), (b"\x89PNG\0", "neither text nor Parquet"), (gzip.compress(b"words " * 999)[:-9], "cannot be read")])
def test_broken_input_is_named(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=message): prepare(tmp_path / "f", tmp_path / "out")

def test_missing_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty folder"): find_sources(tmp_path / "empty")
    with pytest.raises(UserError, match="neither a file"): find_sources(tmp_path / "no/file")
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "p")
    with pytest.raises(UserError, match=r"no column `text` \(found content\)"): list(read_source(Source(str(tmp_path / "p"))))

def test_hub_datasets_are_streamed(monkeypatch):
    class Rows(list):
        def skip(self, n): return Rows(self[n:])
    monkeypatch.setattr(preparation, "optional_package", lambda *a: type("datasets", (), {"load_dataset": staticmethod(lambda *a, **k: Rows({"text": f"t{i}"} for i in range(4)))}))
    docs = list(read_source(find_sources({"wiki": "owner/data"})[0]))
    assert [d.text for d in docs] == ["t0", "t1", "t2", "t3"] and docs[0].source == "wiki"
    assert list(read_source(Source("owner/data", "wiki"), docs[1].after)) == docs[2:]

# ---- the run

def test_accounts_close_and_the_reasons_are_right(tmp_path):
    rows = write(tmp_path / "a", 60)
    rows += [{"text": "short", "source": "web", "url": ""}, {"text": LINE.format("a", "b", "c") + " All rights reserved.", "source": "web", "url": ""}]
    rows += [{"text": LINE.format(x, x, x) + (f" Write to {x}@mail.example" if x < "d" else ""), "source": "web", "url": "https://phone.example"} for x in "abcdefg"]
    (tmp_path / "a").write_text("".join(json.dumps(r) + "\n" for r in rows))
    report, kept = prepare(tmp_path / "a", tmp_path / "out", EXACT), read_jsonl(tmp_path / "out/pretrain.jsonl")
    assert report["sites"] == {"phone.example": pytest.approx(3 / 7)} and report["without_site"] == 2
    assert {r: x["documents"] for r, x in report["removed"].items()} == {"personal data by site": 7, "quality: few words": 1}
    assert report["read"]["bytes"] == report["kept"]["bytes"] + report["furniture"]["bytes"] + sum(x["bytes"] for x in report["removed"].values())
    assert report["removed"]["quality: few words"]["examples"] == [{"where": f"{tmp_path / 'a'}:61", "text": "short"}]
    assert len(kept) == report["kept"]["documents"] == 61 and kept[-1]["text"] == LINE.format("a", "b", "c")
    assert sum(x["documents"] for x in report["sources"].values()) == 61 and sum(report["mixture"].values()) == pytest.approx(1)
    assert [t for _, t in read_documents(tmp_path / "out")] == [r["text"] for r in kept]

def interrupted(monkeypatch, at, sources, out, cfg):
    "Prepare, and press Ctrl-C at the `at`-th document that reaches the tables of copies."
    calls = []
    def weak(self, text, add=Deduplicator.add):
        calls.append(1)
        if len(calls) == at: raise KeyboardInterrupt
        return add(self, text)
    with monkeypatch.context() as m:
        m.setattr(Deduplicator, "add", weak)
        with pytest.raises(KeyboardInterrupt): prepare(sources, out, cfg)

@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("at", [1, 8, 50, 59])
def test_an_interrupted_run_gives_the_same_bytes(tmp_path, monkeypatch, at, near):
    write(tmp_path / "a", 60); write(tmp_path / "b", 30, "b")
    cfg, sources = PrepareConfig(dedup=DedupConfig(near=near), checkpoint_every=7), [tmp_path / "a", tmp_path / "b"]
    prepare(sources, tmp_path / "whole", cfg)
    interrupted(monkeypatch, at, sources, tmp_path / "out", cfg)
    assert not (tmp_path / "out/pretrain.jsonl").exists()
    prepare(sources, tmp_path / "out", cfg)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole") and not (tmp_path / "out/.prepare").exists()

@pytest.mark.parametrize("near", [False, True])
def test_interrupted_before_the_first_checkpoint_and_after_it(tmp_path, monkeypatch, near):
    "What the first attempt left in the log of copies must not stand before the records of the second."
    write(tmp_path / "a", 30); (tmp_path / "a").write_text((tmp_path / "a").read_text() * 2)   # the second half are copies
    cfg = PrepareConfig(dedup=DedupConfig(near=near), checkpoint_every=7)
    prepare(tmp_path / "a", tmp_path / "whole", cfg)
    for at in (4, 20): interrupted(monkeypatch, at, tmp_path / "a", tmp_path / "out", cfg)
    prepare(tmp_path / "a", tmp_path / "out", cfg)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")

def test_sigkill_while_it_writes(tmp_path, root):
    write(tmp_path / "a", 1500)
    run = ("from llama2_nbdev.pretraining.preparation import *; import sys; print('up', flush=True); "
           f"prepare({str(tmp_path / 'a')!r}, {str(tmp_path / 'out')!r}, PrepareConfig(dedup=DedupConfig(near=False), checkpoint_every=100))")
    child = subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE, cwd=root)
    child.stdout.readline()
    while not (tmp_path / "out/.prepare/documents.jsonl").exists() and child.poll() is None: time.sleep(.01)
    time.sleep(.1)
    child.send_signal(signal.SIGKILL); child.wait()
    cfg = PrepareConfig(dedup=DedupConfig(near=False), checkpoint_every=100)
    prepare(tmp_path / "a", tmp_path / "out", cfg); prepare(tmp_path / "a", tmp_path / "whole", cfg)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")

def test_another_job_starts_anew_and_a_finished_one_is_reused(tmp_path, monkeypatch):
    write(tmp_path / "a", 30)
    first = prepare(tmp_path / "a", tmp_path / "out", EXACT)
    monkeypatch.setattr(preparation, "_clean", lambda *a: pytest.fail("was done before"))
    assert prepare(tmp_path / "a", tmp_path / "out", EXACT) == first
    monkeypatch.undo()
    other = PrepareConfig(QualityConfig(min_words=18), dedup=DedupConfig(near=False))
    with pytest.raises(UserError, match="nothing is left"): prepare(tmp_path / "a", tmp_path / "out", other)
    os.utime(tmp_path / "a", (1, 1)); write(tmp_path / "a", 40)
    assert prepare(tmp_path / "a", tmp_path / "out", EXACT)["read"]["documents"] == 40

def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(n):
        (tmp_path / "big").write_text("".join(json.dumps({"text": f"few {i} " + "x" * 200, "url": f"https://s{i % 9}.example"}) + "\n" for i in range(n)))
        tracemalloc.start()
        try: prepare(tmp_path / "big", tmp_path / f"out{n}", PrepareConfig(dedup=DedupConfig(near=False), checkpoint_every=50))
        except UserError: pass                                              # nothing is kept: no table of copies
        finally: size = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return size
    small = peak(150)
    assert peak(1500) < 1.3 * small + 200_000

def test_messages(tmp_path):
    write(tmp_path / "pretrain.jsonl", 3); (tmp_path / "s").write_text("short")
    with pytest.raises(UserError, match="would be replaced"): prepare(tmp_path, tmp_path, EXACT)
    with pytest.raises(UserError, match="nothing is left of 1 documents.*few words"): prepare(tmp_path / "s", tmp_path / "out", EXACT)
    with pytest.raises(UserError, match="upsample names wiki"): mixture({"web": 1}, {"wiki": 2})
    with pytest.raises(UserError, match="factors >= 0"): mixture({"web": 1}, {"web": -1})

def test_packages_are_a_corpus(tmp_path):
    found = package_corpus(limit=300_000)
    assert {s.name for s in found} <= {"docs", "code"} and all(s.url.startswith("file://") for s in found)
    assert prepare(found, tmp_path / "out", EXACT)["read"]["documents"] >= len(found)

def test_real_text(real_data, tmp_path):
    file = next((real_data / "tinyshakespeare").rglob("*.txt"))
    report = prepare({"plays": file}, tmp_path / "out", PrepareConfig())
    assert report["read"]["bytes"] == file.stat().st_size and report["kept"]["bytes"] > .98 * file.stat().st_size
