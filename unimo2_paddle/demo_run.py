"""The main job from nothing: demo corpora, pre-training, zero-shot retrieval (``unimo2 demo``)."""
import os
import time

from unimo2_paddle.config import bundled_config
from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.training.loop import evaluate_from_config, train_from_config

SIZE = 4000


def run_demo(out="output/demo", seed=1, size=SIZE, train_overrides=()):
    """Generate, pre-train, evaluate; each part that is already done is kept, an interrupted training goes on.

    Args:
        out: directory for data, runs and reports; seed: of data and training; size: training pairs.
        train_overrides: further ``key=value`` overrides of the pre-training config.

    Returns:
        the test metrics.
    """
    data, pretrain, retrieval = (os.path.join(out, name) for name in ("data", "pretrain", "retrieval"))
    config, evaluation = bundled_config("pretrain/demo.yaml"), bundled_config("retrieval/demo.yaml")
    _headline(1, "demo corpora", f"unimo2 demo-data --out {data} --size {size} --seed {seed}")
    print(write_demo_data(data, size=size, seed=seed), flush=True)

    _headline(2, "pre-training on pairs, images and texts", f"unimo2 train -c {config} --resume auto")
    started = time.perf_counter()
    train_from_config(config, [
        f"data.vocab={data}/vocab", f"data.pairs=[{{shards: '{data}/pairs/*.tar'}}]", f"data.images=[{{shards: '{data}/images/*.tar'}}]",
        f"data.texts=[{{shards: '{data}/texts/*.tar'}}]", f"eval.annotations={data}/retrieval/dataset_shapes.json",
        f"eval.images={data}/retrieval/images", f"run.output={pretrain}", f"run.seed={seed}", *train_overrides], resume="auto")
    print(f"training part: {time.perf_counter() - started:.0f} s", flush=True)

    _headline(3, "zero-shot retrieval on unseen combinations", f"unimo2 eval -c {evaluation}")
    results = evaluate_from_config(evaluation, [
        f"model.init={pretrain}/best", f"data.annotations={data}/retrieval/dataset_shapes.json", f"data.images={data}/retrieval/images",
        f"data.vocab={data}/vocab", f"run.output={retrieval}"])
    print(f"""
report      {retrieval}/predictions/retrieval.png (queries with their top five), results.json, retrieval.jsonl
board       visualdl --logdir {pretrain}/vdl --language en
checkpoint  {pretrain}/best (unimo2 inspect {pretrain}/best)
next        your own data: write tar shards (key.jpg + key.txt), copy {config} and change the paths;
            the ablation without the dictionary: unimo2 train -c {config} -o model.model_type=baseline -o run.output={out}/baseline""")
    return results


def _headline(number, what, command):
    print(f"\n[{number}/3] {what}\n      {command}", flush=True)
