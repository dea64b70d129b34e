"""How long training waits for its data: the log's ``reader_cost`` over its ``batch_cost``, from real-size JPEG files."""
import json
import os
import statistics
import tempfile
from pathlib import Path

import subjects
from bench import Line
from pictures import write_photographs
from runs import train_records

from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.data.shards import ShardWriter

# base: two layers per encoder at 384 pixels, a sixth of the real step, so the reader has a sixth of the real time
MODELS = {"tiny": {"config": "unimo2_demo"}, "base": {"config": "unimo2_base", "image_size": 384, "text_vocab_size": 512, **subjects.short(2)}}
BATCH, STEPS = {"tiny": 32, "base": 2}, 8
WORDS = "a small red circle left of a large green square"


def write_sources(directory, count):
    """Photographs with captions as shards of pairs and as a Karpathy file; returns the folder of the vocabulary."""
    write_demo_data(os.path.join(directory, "demo"), size=128, seed=1)
    pictures = os.path.join(directory, "pictures")
    os.mkdir(pictures)
    paths = write_photographs(pictures, count)
    with ShardWriter(os.path.join(directory, "pairs"), "photographs") as writer:
        for number, path in enumerate(paths):
            writer.write(str(number), Path(path).read_bytes(), [WORDS])
    entries = [{"filename": os.path.basename(path), "split": "train" if number else "val", "sentences": [{"raw": WORDS}]} for number, path in enumerate(paths)]
    Path(directory, "dataset.json").write_text(json.dumps({"images": entries}), encoding="utf-8")
    return os.path.join(directory, "demo", "vocab")


def pretraining(directory, vocab, size, workers):
    """Configuration of a pre-training on pairs."""
    return {"task": "pretrain", "model": MODELS[size], "optim": {"learning_rate": 1e-5}, "run": {"evaluate_at_end": False},
            "data": {"vocab": vocab, "max_text_len": 40, "num_workers": workers, "pairs": [{"shards": f"{directory}/pairs/*.tar"}]},
            "mixture": {"weights": {"pairs": 1.0}, "global_batch": {"pairs": BATCH[size]}}, "train": {"steps": STEPS, "matching_group": BATCH[size]}}


def finetuning(directory, vocab, size):
    """Configuration of a retrieval finetuning whose pictures are kept decoded: a caption with 1 + 1 + 1 pairs."""
    data = {"annotations": f"{directory}/dataset.json", "images": f"{directory}/pictures", "vocab": vocab, "max_text_len": 40,
            "num_workers": 1, "picture_cache": f"{directory}/cache"}
    return {"task": "retrieval", "model": MODELS[size], "data": data, "eval": {"split": "val", "every_epochs": 0}, "optim": {"learning_rate": 1e-5},
            "run": {"evaluate_at_end": False}, "train": {"epochs": 2, "batch_size": BATCH[size], "image_negatives": 1, "caption_negatives": 1}}


def measure(options):
    size = options.size
    with tempfile.TemporaryDirectory() as directory:
        vocab = write_sources(directory, 4 * BATCH[size] + 1)  # one for the validation split: two epochs are the steps
        runs = {"pre-training, one data worker": pretraining(directory, vocab, size, 1),
                "pre-training, no data worker": pretraining(directory, vocab, size, 0),
                "retrieval finetuning, one data worker, pictures kept decoded": finetuning(directory, vocab, size)}
        return [_line(name, train_records(directory, values, f"run{number}")[STEPS // 2:], size) for number, (name, values) in enumerate(runs.items())]


def _line(name, records, size):
    """The share of the steps that was waiting, in percent."""
    shares = [100 * record["reader_cost"] / record["batch_cost"] for record in records]
    share, judged = statistics.median(shares), size == "base" and "no data" not in name
    what = "two layers per encoder (a sixth of the real step)" if size == "base" else "the demo's model"
    return Line(f"waiting for data: {name}", share, "% of a step", bar="< 5 %" if judged else "", reached=share < 5 if judged else None,
                note=f"reader_cost over batch_cost of the log, {min(shares):.2g} to {max(shares):.2g} %; steps of "
                     f"{statistics.median(record['batch_cost'] for record in records):.3g} s with {BATCH[size]} captions, JPEG of 500 x 375, {what}, "
                     "one thread.")
