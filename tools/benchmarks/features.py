"""Zero-shot classification among 1,000 classes and feature extraction, against the bare visual Transformer."""
import numpy as np
import paddle
import subjects
from bench import alternate, compare

from unimo2_paddle.tasks.base import normalise_tensor
from unimo2_paddle.tasks.retrieval_scoring import encode_pictures

BATCH, CLASSES = {"tiny": 32, "base": 2}, 1000


@paddle.no_grad()
def measure(options):
    model = subjects.build(options.size)
    pictures, pixels = BATCH[options.size], subjects.pixels(model.config, BATCH[options.size])
    classes = paddle.to_tensor(np.random.default_rng(0).standard_normal([model.config.hidden_size, CLASSES]).astype("float32"))
    ready = normalise_tensor(paddle.to_tensor(pixels))
    times = alternate({
        "classes": lambda: paddle.matmul(encode_pictures(model, paddle.to_tensor(pixels)).features, classes).numpy(),
        "features": lambda: encode_pictures(model, paddle.to_tensor(pixels)).features.numpy(),
        "bare": lambda: model.vision(ready)[:, 0].numpy(),
    }, max(5, options.repeats))
    what = (f"{pictures} pictures of {model.config.image_size} px; ours from 8-bit pixels, with features and code scores, of which the other side "
            "has nothing: their share is what is missing, and shrinks as the model grows.")
    return [compare(f"{name}, against the bare visual Transformer", times[key], times["bare"], "pictures/s", amount=pictures, at_least=0.9, note=what)
            for name, key in ((f"zero-shot classification of {CLASSES:,} classes", "classes"), ("feature extraction", "features"))]
