"""How time and memory grow with batch, text length, pairs, pictures and picture size: exponents over four sizes each."""
import numpy as np
import paddle
import subjects
from bench import Line, clock
from finetune import peak_bytes

from unimo2_paddle.tasks.base import normalise_tensor
from unimo2_paddle.tasks.retrieval_scoring import encode_images, encode_texts, matching_logits

SIZES = {"tiny": {"hidden_size": 128, "text_hidden_size": 128, "vit_hidden_size": 128, "text_max_position_embeddings": 520},
         "base": {"image_size": 224, **subjects.short(2)}}


def training_step(model, image, texts):
    """A function that runs a pair forward and backward."""
    def run():
        out = model(image, *texts)
        (model.retrieval_score(out).sum() + out.grounding_loss).backward()
        for parameter in model.parameters():
            parameter.clear_gradient(set_to_zero=False)
    return run


def pair_step(model, batch, length):
    image = normalise_tensor(paddle.to_tensor(subjects.pixels(model.config, batch)))
    return training_step(model, image, [paddle.to_tensor(a) for a in subjects.text_arrays(model.config, [length] * batch)])


def text_step(model, batch, length):
    ids, positions, mask = (paddle.to_tensor(a) for a in subjects.text_arrays(model.config, [length] * batch))

    def run():
        model.encode_text(ids, positions, mask).sum().backward()
        for parameter in model.parameters():
            parameter.clear_gradient(set_to_zero=False)
    return run


def scoring(model, pairs):
    """Pairs through the grounded encoder, in blocks as the evaluation has them."""
    dataset = subjects.MadeUpDataset(model.config, 4, 8)
    with paddle.no_grad():
        images, texts = next(iter(encode_images(model, dataset))), encode_texts(model, dataset)[0].texts

    @paddle.no_grad()
    def run():
        for first in range(0, pairs, 16):
            rows = np.arange(first, min(first + 16, pairs))
            matching_logits(model, images.take(rows % 4), texts.take(rows % 8)).numpy()
    return run


def encoding(model, pictures):
    dataset = subjects.MadeUpDataset(model.config, pictures, 1)

    @paddle.no_grad()
    def run():
        for block in encode_images(model, dataset, 16):
            block.features.numpy()
    return run


def exponent(sizes, costs):
    """Slope of the costs over the sizes, both as logarithms, over the larger three (the smallest pays fixed costs most)."""
    return float(np.polyfit(np.log(sizes[1:]), np.log(costs[1:]), 1)[0])


def measure(options):
    model = subjects.build(options.size, **SIZES[options.size])
    model.train()
    small = options.size == "tiny"
    kinds = {
        "training step by batch": ([8, 16, 32, 64] if small else [1, 2, 4, 8], lambda n: pair_step(model, n, 16), 1.1),
        "training step of the text encoder by length": ([64, 128, 256, 512] if small else [16, 32, 64, 128], lambda n: text_step(model, 4, n), 2.0),
        "scoring by number of pairs": ([32, 64, 128, 256] if small else [4, 8, 16, 32], lambda n: scoring(model, n), 1.1),
        "encoding by number of pictures": ([16, 32, 64, 128] if small else [2, 4, 8, 16], lambda n: encoding(model, n), 1.1),
    }
    lines = []
    for name, (sizes, make, limit) in kinds.items():
        runs = [make(size) for size in sizes]
        memory, seconds = [], [[] for _ in sizes]
        for run in runs:
            run()
            memory.append(peak_bytes(run))
        for _ in range(options.repeats):
            for place, run in enumerate(runs):
                started = clock()
                run()
                seconds[place].append(clock() - started)
        middle = [float(np.median(times)) for times in seconds]
        grown = exponent(sizes, middle)
        held = f", memory as the power {exponent(sizes, memory):.2f}" if all(memory) else ""
        lines.append(Line(f"growth: {name} ({', '.join(map(str, sizes))})", grown, "power", bar=f"<= {limit:g}" + " (attention is square)" * (limit > 1.1),
                          reached=grown <= limit,
                          note=f"Time grows as this power of the size{held}, fitted to the larger three; medians "
                               + ", ".join(f"{1e3 * s:.3g}" for s in middle) + " ms."))
    return lines
