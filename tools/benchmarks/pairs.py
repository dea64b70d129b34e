"""Retrieval evaluation: every picture with every caption, against the authors' procedure (each pair through all three encoders).

The procedure runs on our layers twice: as they are written, which is what Paddle offers, and fused (models/fused.py), which speeds it up as well.
"""
import os

import numpy as np
import paddle
import subjects
from bench import clock, compare, gemm_rate

from unimo2_paddle.models.flops import fusion_flops, image_flops, patches, text_flops
from unimo2_paddle.models.onednn import PRECISIONS, InferenceEngine
from unimo2_paddle.tasks.base import normalise_tensor
from unimo2_paddle.tasks.retrieval_scoring import contrastive_shortlist, encode_images, encode_texts, score_matrix

SAMPLE = {"tiny": (8, 12), "base": (1, 4)}  # pictures and captions that are timed
FULL, LARGE, RERANK = (20, 100), (1000, 5000), 16
NAMES = {"dynamic": "dynamic graph", "fp32": "oneDNN fp32", "bf16": "oneDNN bf16"}

HALF = (" A processor with AVX-512 multiplies bfloat16 at most twice as fast as float32, which with the operations allows twice that ratio; one with AMX "
        "about eight times.")


def our_scores(model, dataset):
    """Scores ``[T, I]`` with every input encoded once, and the seconds of a picture, of a caption and of a pair."""
    images, texts = len(dataset), len(dataset.captions)
    with paddle.no_grad():
        times = [clock()]
        blocks = list(encode_images(model, dataset))
        times.append(clock())
        groups = encode_texts(model, dataset)
        times.append(clock())
        scores = score_matrix(model, blocks, groups).retrieval
        times.append(clock())
    return scores, np.diff(times) / (images, texts, images * texts)


def authors_scores(model, dataset):
    """Scores ``[T, I]`` by a full forward of every pair, all captions of a picture in a batch, and the seconds of a pair."""
    scores, started = [], clock()
    with paddle.no_grad():
        ids, positions, mask = (paddle.to_tensor(array) for array in dataset.text_batch(range(len(dataset.captions))))
        for number in range(len(dataset)):
            image = normalise_tensor(paddle.to_tensor(np.repeat(dataset.chosen_pictures([number], 0), len(ids), axis=0)))
            out = model.fuse(model.encode_image(image), model.encode_text(ids, positions, mask), mask, with_grounding_loss=False)
            scores.append(model.retrieval_score(out).numpy())
    return np.stack(scores, axis=1), (clock() - started) / (len(dataset) * len(dataset.captions))


def plain(function, *arguments):
    """``function(*arguments)`` with the layers as they are written."""
    before = os.environ.get("UNIMO2_KERNELS")
    os.environ["UNIMO2_KERNELS"] = "plain"
    try:
        return function(*arguments)
    finally:
        os.environ.pop("UNIMO2_KERNELS")
        if before is not None:
            os.environ["UNIMO2_KERNELS"] = before


def measure(options):
    parts, authors, off = {name: [] for name in PRECISIONS}, {"plain": [], "fused": []}, {}
    model = subjects.build(options.size)
    config, engines = model.config, {name: InferenceEngine(model, name) for name in PRECISIONS}
    dataset = subjects.MadeUpDataset(config, *SAMPLE[options.size])
    for turn in range(options.repeats + 1):  # the first turn makes the programs and is not counted
        expected, fused = authors_scores(model, dataset)
        authors["fused"] += [fused] * bool(turn)
        authors["plain"] += [plain(authors_scores, model, dataset)[1]] * bool(turn)
        for name, engine in engines.items():
            with engine:
                scores, found = our_scores(model, dataset)
            parts[name] += [found] * bool(turn)
            off[name] = float(np.abs(scores - expected).max())
    spread = float(expected.std())
    work = fusion_flops(config, 1, True, 16, first_only=True, with_loss=False)
    floor = f"A pair is {work / 1e9:.3g} GFLOP; {gemm_rate():.0f} GFLOP/s of matrix products here."
    return [*_full(parts, authors, off, spread, floor, config, judged=options.size == "base"), *_shortlist(parts, authors)]


def _full(parts, authors, off, spread, floor, config, judged):
    """Lines of the evaluation of all pairs of 20 pictures and 100 captions."""
    images, texts = FULL
    whole = image_flops(config, 1) + text_flops(config, 1, 16) + fusion_flops(config, 1, True, 16, with_loss=False)
    ours = fusion_flops(config, 1, True, 16, first_only=True, with_loss=False) + image_flops(config, 1) / texts + text_flops(config, 1, 16) / images
    work = fusion_flops(config, 1, True, 16, first_only=True, with_loss=False)
    for name, at_least in (("dynamic", None), ("fp32", 2.5), ("bf16", 8)):
        mine = [float(found @ (images, texts, images * texts)) for found in parts[name]]
        exact = name == "bf16" or off[name] <= 1e-5 * max(1.0, spread)
        for layers, seconds in authors.items():
            yield compare(
                f"retrieval evaluation, all pairs of {images} x {texts}, {NAMES[name]}, against {layers} layers", mine,
                [one * images * texts for one in seconds], "pairs/s", amount=images * texts, at_least=at_least if judged else None, floor=floor,
                note="Put together from the measured time of a picture, a caption and a pair. Scores differ from the authors' procedure by at most "
                f"{off[name]:.1e} (their spread: {spread:.2g}){'' if exact else ', TOO MUCH'}. By operations alone the ratio would be "
                f"{whole / ours:.2f}; {_left(config, work)}"
                + HALF * (name == "bf16"))


def _left(config, work):
    """What a pair could still do without and stay exact, in words: shares of its operations."""
    image, text, hidden = 1 + patches(config), 16, config.hidden_size
    shared = 2.0 * 3 * image * hidden ** 2
    unseen = 4.0 * 2 * image * text * hidden * config.num_hidden_layers
    return (f"what is left and exact: the first layer's projections of a picture's own rows, which its captions could share ({100 * shared / work:.1f} %), "
            f"and scores between picture and words, which the mask hides ({100 * unseen / work:.1f} %).")


def _shortlist(parts, authors):
    """The line of a shortlist among 1,000 pictures and 5,000 captions."""
    images, texts = LARGE
    similarity = np.random.default_rng(0).standard_normal([texts, images]).astype("float32")  # unrelated scores: the longest shortlist there can be
    started = clock()
    pairs = int(contrastive_shortlist(similarity, RERANK).sum())
    choosing = clock() - started
    for name in ("fp32", "bf16"):
        mine = [float(found @ (images, texts, pairs)) + choosing for found in parts[name]]
        yield compare(
            f"retrieval evaluation with a shortlist of {RERANK}, {images:,} x {texts:,}, {NAMES[name]}", mine,
            [seconds * images * texts for seconds in authors["fused"]], "hours", scale=1 / 3600, at_least=10,
            note=f"Extrapolated from the measured time of a picture, a caption and a pair: {pairs:,} pairs against {images * texts:,} of the authors' "
                 f"procedure; choosing them took {choosing:.2f} s. Recall on the demo's test split is in the row demo_recall.")
