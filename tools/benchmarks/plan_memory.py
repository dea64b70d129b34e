"""``unimo2 plan``'s memory against Paddle's own count over whole pre-training steps."""
import os
import tempfile

import numpy as np
import subjects  # noqa: F401  zlib before paddle
import yaml
from bench import Line
from finetune import peak_bytes

from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.models.memory import step_peak
from unimo2_paddle.tasks.base import Shard, task_class, to_tensors
from unimo2_paddle.tasks.work import pretraining_passes
from unimo2_paddle.training.optim import build_optimizer

WIDE = {"tiny": {}, "base": {"hidden_size": 384, "text_hidden_size": 384, "vit_hidden_size": 384, "image_size": 128, "position_grid": 8}}
CASES = (("pairs", False, 8), ("pairs", False, 16), ("pairs", True, 16), ("images", False, 16), ("texts", False, 16), ("texts", True, 16))


def step_of(directory, size, corpus, recompute, batch):
    """(measured bytes of a step over weights and optimizer, planned)."""
    data = os.path.join(directory, "data")
    values = {"task": "pretrain", "model": {"config": "unimo2_demo", **WIDE[size]},
              "data": {"vocab": f"{data}/vocab", "max_text_len": 40, corpus: [{"shards": f"{data}/{corpus}/*.tar"}]},
              "mixture": {"weights": {corpus: 1.0}, "global_batch": {corpus: batch}}, "train": {"steps": 9, "matching_group": 8}, "optim": {},
              "run": {"output": os.path.join(directory, "run"), "recompute": recompute}}
    path = os.path.join(directory, "run.yaml")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
    config = load_run_config(path)
    task = task_class("pretrain")(config)
    model = task.build_model()
    model.train()
    model.set_recompute(recompute)
    optimizer, batches, seen = build_optimizer(model.parameters(), config.optim), task.train_batches(Shard()), []

    def step():
        seen.append(next(batches))
        task.loss(model, to_tensors(seen[-1]))["loss"].backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)

    step()  # makes the optimizer's state
    measured = peak_bytes(step)
    batches.close()
    parameters = int(sum(np.prod(parameter.shape) for parameter in model.parameters()))
    planned = step_peak(model.config, parameters, pretraining_passes(model.config, seen[-1], config.train), recompute)
    return measured, planned["peak"] - planned["parameters"] - planned["optimizer"], planned["parameters"] + planned["optimizer"]


def measure(options):
    os.environ["UNIMO2_KERNELS"] = "plain"  # the plan is of the layers as they are written, which GPUs run
    lines = []
    with tempfile.TemporaryDirectory() as directory:
        write_demo_data(os.path.join(directory, "data"), size=64, seed=1)
        for corpus, recompute, batch in CASES:
            measured, planned, standing = step_of(directory, options.size, corpus, recompute, batch)
            if not measured:
                return "this Paddle does not count the memory of the CPU"
            ratio = planned / measured
            name = f"memory of a step on {corpus}, batch of {batch}{', recomputed' * recompute}: plan against measured"
            lines.append(Line(name, planned / 1e6, "MB", measured / 1e6, ratio, ratio, ratio, bar="within 15 %", reached=0.85 <= ratio <= 1.15,
                              note=f"Over weights and optimizer state ({standing / 1e6:.1f} MB); layers as they are written (UNIMO2_KERNELS=plain)."))
    return lines
