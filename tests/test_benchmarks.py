"""The benchmarks run on tiny shapes and record what they say. No time is asserted."""
import json
import math

import pytest
import torch

from benchmarks import cost, decoding, gpu, measure, training
from benchmarks.__main__ import main
from benchmarks.peers import SHAPES, ours, small, theirs
from llama2_nbdev.model.generate import OneToken  # the step that decoding measures


def fake(seconds):
    return measure.Row("work", "ours", seconds, amount=10, unit="things/s")


def test_ratio_is_taken_turn_by_turn():
    "A machine that is twice as slow for one turn slows both, and the ratio stays."
    row = fake({"ours": [1., 2., 1.], "peer": [3., 6., 3.]})
    assert row.ratio("peer") == (3., 3., 3.) and row.rate("ours") == 10.
    middle, low, high = fake({"ours": [1.] * 5, "peer": [1., 2., 3., 4., 5.]}).ratio("peer")
    assert (low, middle, high) == (2., 3., 4.)
    assert fake({"ours": [2.], "peer": [1.]}).ratio("peer") == (.5, .5, .5)


def test_jobs_take_turns_and_each_round_begins_with_another():
    order = []
    seconds = measure.take_turns({n: lambda n=n: order.append(n) for n in "ab"}, rounds=3, warmup=1)
    assert order == list("ba" "ab" "ba" "ab") and [len(s) for s in seconds.values()] == [3, 3]


def test_record_names_hardware_and_versions(tmp_path):
    path = measure.record("x", [fake({"ours": [1., 1.], "peer": [2., 2.]})], tmp_path, more=1)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["rows"][0]["ratios"] == {"peer": {"median": 2., "low": 2., "high": 2.}} and found["more"] == 1
    assert found["machine"]["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert path.parent.name == measure.slug(found["machine"]) and "2.00" in measure.table([fake({"ours": [1.], "peer": [2.]})])


def test_fitted_exponent():
    assert cost.exponent([1, 10, 100], [2., 20., 200.]) == pytest.approx(1)
    assert cost.exponent([1, 10, 100], [1., 100., 10_000.]) == pytest.approx(2)


def test_both_sides_compute_the_same():
    pytest.importorskip("transformers")
    model = ours(small(SHAPES["tiny"]))
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(model)(ids).logits, atol=1e-5, rtol=0)
    assert OneToken(model)


def test_both_steps_make_the_same_products():
    "The share of a step that no program can save (22f_speed): as many products, of the same sizes."
    pytest.importorskip("transformers")
    model, ids = ours(small(SHAPES["tiny"])), torch.randint(256, (2, 17))
    steps = training.our_step(model, ids, torch.float32), training.their_step(theirs(model).train(), ids[:, :-1], torch.float32)
    for step in steps: step()
    found = []
    for step in steps:
        with torch.autograd.profiler.profile(record_shapes=True) as p: step()
        sizes = [torch.Size(s).numel() for e in p.key_averages(True) if e.key in ("aten::mm", "aten::addmm") for s in e.input_shapes[-2:] for _ in range(e.count)]
        found.append((len(sizes) // 2, sum(sizes)))
    assert found[0] == found[1] and found[0][0] == 3 * (7 * model.cfg.n_layers + 1)


def test_the_c_program_is_asked_for_its_speed(tmp_path, real_data):
    "A stand-in that says what llama2.c says; the real one is compiled by whoever has it."
    program = tmp_path / "run"
    program.write_text('#!/bin/sh\necho "Once upon a time"\necho "achieved tok/s: 50.0" >&2\necho "$@" > "${0}.asked"\n')
    program.chmod(0o755)
    one, many = decoding.llama2c(str(program), real_data / "stories260K", n=5, rounds=2)
    assert one.seconds["llama2.c"] == [.1, .1] and many.seconds["llama2.c"] == [1.6, 1.6] and len(many.seconds["ours"]) == 2
    assert one.rate("llama2.c") == many.rate("llama2.c") == 50.
    assert (tmp_path / "run.asked").read_text().split()[1:] == ["-z", str(real_data / "stories260K" / "tok512.bin"), "-t", "0", "-n", "5"]


@pytest.mark.parametrize("name", ["training", "decoding", "reward", "cost"])
def test_every_measurement_runs_on_tiny_shapes(name, tmp_path, capsys):
    for package in {"training": ["transformers"], "decoding": ["transformers"], "reward": ["trl", "datasets"]}.get(name, []):
        pytest.importorskip(package)
    main([name, "--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert rows and all(s > 0 for r in rows for job in r["seconds"].values() for s in job)
    assert rows[0]["what"] in capsys.readouterr().out
    if name == "cost":
        assert [r["extra"]["counts"][1] / r["extra"]["counts"][0] for r in rows] == [2, 2, 2] and path.with_suffix(".png").exists()


def test_gpu_benchmarks_run_on_tiny_shapes(tmp_path):
    found = gpu.main(["--tiny", "--out", str(tmp_path)])
    assert {r["checkpointing"] for r in found["training"]} == {True, False} and all(0 < r["mfu"] for r in found["training"])
    assert {r["batch"] for r in found["decoding"]} == {1, 2}
    (ppo,) = found["ppo"]
    assert ppo["generation"] + ppo["scoring"] + ppo["training"] == pytest.approx(ppo["seconds"])
    assert len(list(tmp_path.glob("*/gpu-*.json"))) == 3


def test_static_decoder_writes_what_the_model_writes():
    "The step that becomes a CUDA graph chooses the tokens that plain decoding chooses."
    model = ours(gpu.TINY.model).eval()
    model.init_weights(std=.15)
    decoder = gpu.Decoder(model, 2, 12, 0)
    said = []
    for _ in range(8):
        decoder.step()
        said.append(decoder.tokens[:, 0].tolist())
    ids = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        for step in said:
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            assert ids[:, -1].tolist() == step
    weights = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    assert decoder.bytes_read() == 4 * (weights + 2 * 2 * 2 * 2 * 12 * 16)  # k and v, layers, rows, kv heads, slots, head dim


def test_an_unknown_part_is_refused(capsys):
    for run in (main, gpu.main):
        with pytest.raises(SystemExit):
            run(["nonsense"])
        assert "'nonsense' is not one of" in capsys.readouterr().err
    assert math.isfinite(gpu.bandwidth(torch.device("cpu"), 4096))
