"""Beam search over a batch of pictures, against no cache of keys and values and against one picture after the other."""
import numpy as np
import paddle
import subjects
from bench import alternate, clock, compare

from unimo2_paddle.models.generation import Decoding, PrefixCache, generate, search
from unimo2_paddle.tasks.base import normalise_tensor

BATCH, START, END = 16, 0, 2
LENGTH = {"tiny": 20, "base": 10}
WITHOUT_CACHE = {"tiny": 16, "base": 1}  # pictures of the side without cache, whose cost is linear in them


class Recomputed:
    """Decoding without cache: every step runs the text and grounded encoders over all that has been written (the picture is encoded once)."""

    def __init__(self, model, image):
        self.model, self.image = model, model.encode_image(image)
        self.written = None  # int64 [B, K, T]

    def step(self, tokens, step):
        self.written = tokens.unsqueeze(2) if self.written is None else paddle.concat([self.written, tokens.unsqueeze(2)], axis=2)
        images, beams, length = self.written.shape
        ids = self.written.reshape([-1, length])
        mask = paddle.tril(paddle.ones([length, length])).unsqueeze(0).expand([images * beams, length, length])
        positions = (paddle.arange(length) + 2).unsqueeze(0).expand([images * beams, length])
        image = paddle.repeat_interleave(self.image, beams, axis=0)
        out = self.model.fuse(image, self.model.encode_text(ids, positions, mask), mask, layout="caption", with_grounding_loss=False)
        return self.model.mlm_logits(out.fused_text[:, -1]).reshape([images, beams, -1])

    def select(self, images, parents):
        if images is not None:
            self.image = paddle.index_select(self.image, images)
        length = self.written.shape[2]
        self.written = paddle.index_select(self.written.reshape([-1, length]), parents.reshape([-1])).reshape([*parents.shape, length])


@paddle.no_grad()
def without_cache(model, image, options):
    """As ``generate``."""
    return search(Recomputed(model, image), len(image), START, END, options, None)


@paddle.no_grad()
def _encoding_seconds(model, image):
    """Seconds until the first token: the picture through its encoder, and the prefix through the grounded one."""
    started = clock()
    PrefixCache.encode(model, model.encode_image(image))
    return clock() - started


def measure(options):
    model, few = subjects.build(options.size), WITHOUT_CACHE[options.size]
    image = normalise_tensor(paddle.to_tensor(subjects.pixels(model.config, BATCH)))
    decoding = Decoding(beam_size=5, min_length=LENGTH[options.size], max_length=LENGTH[options.size])  # no caption ends early: all sides do the same
    found = {}

    def side(name, function):
        def run():
            found[name] = function()
        return run

    times = alternate({
        "ours": side("ours", lambda: generate(model, image, START, END, decoding)),
        "no cache": side("no cache", lambda: without_cache(model, image[:few], decoding)),
        "one by one": side("one by one", lambda: [generate(model, image[row: row + 1], START, END, decoding)[0] for row in range(BATCH)]),
    }, options.repeats)
    best = {name: [beams[0].ids for beams in hypotheses] for name, hypotheses in found.items()}
    equal = best["ours"] == best["one by one"] and best["ours"][:few] == best["no cache"]
    difference = max(np.abs(a[0].scores[-1] - b[0].scores[-1]) for a, b in zip(found["ours"], found["no cache"]))
    what = (f"{BATCH} pictures, 5 beams, {LENGTH[options.size]} tokens; best captions {'identical' if equal else 'NOT all identical'}, scores differ "
            f"by at most {difference:.1e}.")
    prefix = 1 + (model.config.image_size // model.config.resolution) ** 2 + model.config.topk_value
    saved = f" What the cache saves is the prefix of {prefix} positions (picture and grounded tokens; 677 at base size and 384 pixels)."
    scaled = [seconds * BATCH / few for seconds in times["no cache"]]
    encoding = _encoding_seconds(model, image)
    share = f" Encoding the pictures, which a batch does not make cheaper, is {encoding:.3g} s of both sides."
    return [
        compare("caption beam search, batch of 16, against no cache", times["ours"], scaled, "s", at_least=5,
                note=what + saved + ("" if few == BATCH else f" The side without cache was measured on {few} pictures and scaled.")),
        compare("caption beam search, batch of 16, against a loop over pictures", times["ours"], times["one by one"], "s", at_least=1.5, note=what + share),
    ]
