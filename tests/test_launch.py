"Launch plans: the paper's settings, layouts that cannot work, and a Slurm job that puts itself back into the queue."
import ast
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from llama2_nbdev.core import UserError
from llama2_nbdev.model.llama import ModelConfig
from llama2_nbdev.pretraining.launch import PEAK_LR, Launch, launch_files, paper_launch
from llama2_nbdev.pretraining.scaling import ParallelConfig
from llama2_nbdev.pretraining.training import PretrainConfig, TrainConfig

TOY = Launch(PretrainConfig(model="nano", batch_size=8, seq_len=64, train=TrainConfig(steps=2, lr=1e-3, warmup=1, micro_batch=1)),
             ParallelConfig(tensor=2), nodes=1, gpus_per_node=2)

@pytest.mark.parametrize("model", PEAK_LR)
def test_settings_are_the_papers(model):  # Section 2.2, Table 1; trap 15
    plan = paper_launch(model)
    train, layout = plan.run.train, plan.layout
    assert (train.lr, train.warmup, train.floor) == ({"7b": 3e-4, "13b": 3e-4, "34b": 1.5e-4, "70b": 1.5e-4}[model], 2000, .1)
    assert (train.betas, train.eps, train.weight_decay, train.clip) == ((.9, .95), 1e-5, .1, 1.)
    assert plan.run.batch_size * plan.run.seq_len == 2**22 and train.steps == 476_837
    assert layout.replicate * layout.shard * layout.tensor == plan.nodes * 8
    assert 16 * ModelConfig.preset(model).n_params() / (layout.shard * layout.tensor) < 20e9, "room for activations on 80 GB"
    assert ModelConfig.preset(model).n_kv_heads % layout.tensor == 0

@pytest.mark.parametrize("change, says", [
    (dict(nodes=3), "do not divide into micro-batches"), (dict(layout=ParallelConfig(shard=4)), "does not fill"),
    (dict(layout=ParallelConfig(tensor=4), nodes=2), "reaches over machines"), (dict(layout=ParallelConfig(tensor=4)), "does not fill"),
    (dict(run=replace(TOY.run, seq_len=2048)), "do not fit into nano's context of 1024"), (dict(run=replace(TOY.run, model="8b")), "no model preset"),
    (dict(run=replace(TOY.run, batch_size=9, train=replace(TOY.run.train, micro_batch=2))), "9 rows do not divide")])
def test_plans_that_cannot_work(change, says):
    with pytest.raises(UserError, match=says): replace(TOY, **change)

def test_the_plan_is_in_the_file(tmp_path):
    train, _ = launch_files(TOY, tmp_path, "shards", "runs/x")
    names = dict(PretrainConfig=PretrainConfig, TrainConfig=TrainConfig, ParallelConfig=ParallelConfig)
    values = {s.targets[0].id: eval(ast.unparse(s.value), names) for s in ast.parse(train.read_text()).body if isinstance(s, ast.Assign)}
    assert values == dict(run=TOY.run, layout=TOY.layout)

@pytest.mark.parametrize("asked", [True, False])
def test_a_job_whose_time_is_up_is_queued_again(tmp_path, asked):
    "With stand-ins for Slurm's commands: the step gets the signal, ends in peace, and only then the job is queued again."
    _, job = launch_files(TOY, tmp_path, "shards", "runs/x")
    for name, text in dict(srun="trap 'echo saved >>log; exit 1' TERM; echo started >>log; for i in $(seq $TENTHS); do sleep .1; done",
                           scontrol='[ "$1" = show ] && echo node0 || echo "$@" >>log').items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="77", SLURM_NNODES="1", TENTHS="100" if asked else "2")
    shell = subprocess.Popen(["bash", str(job)], cwd=tmp_path, env=env)
    log = tmp_path / "log"
    while not log.exists(): time.sleep(.02)
    if asked: shell.send_signal(signal.SIGTERM)
    shell.wait(20)
    assert log.read_text().split("\n")[:-1] == (["started", "saved", "requeue 77"] if asked else ["started"])
