"""Time of a training step in the three forms of ``run.graph``, alternated so that other load hits all alike.

    env OMP_NUM_THREADS=1 nice -n 10 python tools/benchmarks/graph_forms.py --batch 8 --rounds 20

Prints the median of every form per corpus of the demo pre-training, its ratio to the dynamic graph, and what the first steps cost.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from unimo2_paddle.runtime import prepare_process

prepare_process()
import zlib  # noqa: E402,F401  before paddle (see tests/conftest.py)

import paddle  # noqa: E402
import yaml  # noqa: E402

from unimo2_paddle.config import load_run_config  # noqa: E402
from unimo2_paddle.data.demo import write_demo_data  # noqa: E402
from unimo2_paddle.tasks.base import Shard, task_class, to_tensors  # noqa: E402
from unimo2_paddle.training.optim import build_optimizer  # noqa: E402
from unimo2_paddle.training.static import StaticGraph  # noqa: E402
from unimo2_paddle.training.traced import trace_encoders  # noqa: E402

FORMS = ("dynamic", "to_static", "static")


class Form:
    """One model trained in one form; ``step(batch)`` trains it."""

    def __init__(self, name, task, config):
        self.task, self.model = task, task.build_model()
        self.model.train()
        self.optimizer = build_optimizer(self.model.parameters(), config.optim)
        self.static = StaticGraph(task, self.model, self.optimizer, config.optim) if name == "static" else None
        if self.static:
            self.optimizer = self.static.optimizer
        elif name == "to_static":
            trace_encoders(self.model)

    def step(self, batch):
        if self.static:
            self.static.backward(batch)
        else:
            losses = self.task.loss(self.model, to_tensors(batch))
            losses["loss"].backward()
            {name: float(value) for name, value in losses.items()}  # as the loop reads them
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)


def config_of(directory, args):
    """The pre-training run that is timed."""
    write_demo_data(os.path.join(directory, "data"), size=4 * args.batch, seed=1)
    values = {
        "task": "pretrain", "model": {"config": "unimo2_demo", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        "data": {"vocab": f"{directory}/data/vocab", "max_text_len": 40,
                 **{c: [{"shards": f"{directory}/data/{c}/*.tar"}] for c in ("pairs", "images", "texts")}},
        "mixture": {"weights": {c: 1 for c in ("pairs", "images", "texts")}, "global_batch": {c: args.batch for c in ("pairs", "images", "texts")}},
        "train": {"steps": 1000, "matching_group": min(8, args.batch)}, "optim": {}, "run": {"output": f"{directory}/run"},
    }
    if args.hidden:
        values["model"].update({key: args.hidden for key in ("hidden_size", "text_hidden_size", "vit_hidden_size")})
    path = os.path.join(directory, "run.yaml")
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
    return load_run_config(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=0, help="width of the model (default: that of unimo2_demo)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of every form and corpus")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(directory, args)
        task = task_class("pretrain")(config)
        forms = {name: Form(name, task, config) for name in FORMS}
        batches, count, first, times = task.train_batches(Shard()), {}, {}, {}
        while len(count) < 3 or min(count.values()) < args.rounds + 3:
            batch = next(batches)
            corpus = batch["corpus"]
            count[corpus] = count.get(corpus, 0) + 1
            if count[corpus] > args.rounds + 3:
                continue
            for name, form in forms.items():
                start = time.perf_counter()
                form.step(batch)
                seconds = time.perf_counter() - start
                if count[corpus] <= 3:  # tracing, and the second tracing that opens the sizes that vary
                    first[name] = first.get(name, 0.0) + seconds
                else:
                    times.setdefault((corpus, name), []).append(seconds)
        batches.close()
    print(f"Paddle {paddle.__version__}, {os.environ['OMP_NUM_THREADS']} thread(s), batch {args.batch}, width {task.model_config.hidden_size}")
    print(f"{'':10}" + "".join(f"{name:>22}" for name in FORMS))
    for corpus in ("pairs", "images", "texts"):
        medians = {name: statistics.median(times[corpus, name]) for name in FORMS}
        print(f"{corpus:10}" + "".join(f"{1e3 * medians[n]:>10.1f} ms ({medians[n] / medians['dynamic']:5.2f})" for n in FORMS))
    print(f"{'first 9':10}" + "".join(f"{first[name]:>20.1f} s" for name in FORMS))


if __name__ == "__main__":
    main()
