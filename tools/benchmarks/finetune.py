"""A step of retrieval finetuning (each caption with 1 + 10 + 10 pairs): inputs encoded once, against every pair encoded anew."""
import gc

import numpy as np
import paddle
import subjects
from bench import Line, alternate, compare

from unimo2_paddle.models.flops import fusion_flops, image_flops, text_flops
from unimo2_paddle.models.losses import retrieval_circle_loss
from unimo2_paddle.tasks.base import normalise_tensor, to_tensors
from unimo2_paddle.tasks.retrieval_training import CirclePairs, RetrievalTrain, circle_terms, collate_pairs

# base: 224 pixels; at 384 the 21 separate pairs and what the allocator keeps of both sides fill 23 GB
MODELS = {"tiny": {}, "base": {"image_size": 224}}


def separate_terms(model, batch, train):
    """The authors' procedure: the picture and the caption of every pair go through all three encoders."""
    images, texts = (batch[name].reshape([-1]) for name in ("pair_image", "pair_text"))
    ids, positions, mask = (paddle.index_select(batch[name], texts) for name in ("input_ids", "position_ids", "text_mask"))
    image = normalise_tensor(paddle.index_select(batch["image"].astype("float32"), images))
    out = model.fuse(model.encode_image(image), model.encode_text(ids, positions, mask), mask, with_grounding_loss=False)
    scores = model.retrieval_score(out).reshape(batch["pair_image"].shape)
    return {"loss": retrieval_circle_loss(scores, train.margin, train.scale, train.image_negatives)[0]}


def peak_bytes(function):
    """Peak of Paddle's memory on CPU while ``function()`` runs, over what stood before; 0 where Paddle does not count."""
    core = paddle.base.core
    if not hasattr(core, "host_memory_stat_reset_peak_value"):
        return 0
    gc.collect()
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    function()
    return core.host_memory_stat_peak_value("Allocated", 0) - before


def _by_operations(config, batch):
    """Operations of the separate encodes over those of ours."""
    images, (texts, length), pairs = len(batch["image"]), batch["input_ids"].shape, batch["pair_image"].size
    separate = pairs * (image_flops(config, 1) + text_flops(config, 1, length) + fusion_flops(config, 1, True, length, with_loss=False))
    ours = images * image_flops(config, 1) + texts * text_flops(config, 1, length) + fusion_flops(config, pairs, True, length, first_only=True, with_loss=False)
    return separate / ours


def measure(options):
    model, train = subjects.build(options.size, **MODELS[options.size]), RetrievalTrain()
    model.train()
    dataset = subjects.MadeUpDataset(model.config, 16, 64)
    dataset.text_image, dataset._counts = np.repeat(np.arange(16), 4), [4] * 16
    rng = np.random.default_rng(0)
    pairs = CirclePairs(dataset, train.image_negatives, train.caption_negatives)
    batch = to_tensors(collate_pairs([pairs.sample(int(rng.integers(64)), rng)], dataset, model.config.image_size))

    losses = {}

    def step(name, terms):
        def run():
            loss = terms(model, batch, train)["loss"]
            loss.backward()
            for parameter in model.parameters():
                parameter.clear_gradient(set_to_zero=False)
            losses[name] = float(loss)
        return run

    ours, separate = step("ours", circle_terms), step("separate", separate_terms)
    peaks = peak_bytes(ours), peak_bytes(separate)  # their first turns, so that no other warms them up
    times = alternate({"ours": ours, "separate": separate}, options.repeats, warmup=0)
    what = (f"1 caption, 21 pairs at {model.config.image_size} pixels; forward and backward. Losses {losses['ours']:.6f} and {losses['separate']:.6f} "
            f"(no dropout). By operations alone the ratio would be {_by_operations(model.config, batch):.2f}.")
    if options.size == "base":
        what += (" At 384 pixels, the real size, both sides in one process fill this machine's memory; the one round that came through, with memory "
                 "short, took 71.5 s and 84.1 s (1.18), with a peak of 9.2 GB and 12.4 GB.")
    lines = [compare("retrieval finetuning step, against separate encodes", times["ours"], times["separate"], "s", at_least=1.3, note=what)]
    if all(peaks):
        ratio = peaks[1] / peaks[0]
        lines.append(Line("retrieval finetuning step, peak memory over the weights", peaks[0] / 1e6, "MB", peaks[1] / 1e6, ratio, ratio, ratio,
                          bar="less", reached=ratio > 1.0, note="Paddle's own count of allocated memory."))
    return lines
