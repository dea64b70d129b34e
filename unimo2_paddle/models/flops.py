"""Floating-point operations of UNIMO-2's parts and of UNIMO, from a config and shapes alone (for utilisation in the log, and for planning).

Only matrix products count, two operations per multiply-add; norms, activations, softmax and embedding look-ups are left out. That is
the convention of "model FLOPs utilisation" (PaLM, arXiv 2204.02311, appendix B): what the model needs, not what recomputation or an
implementation adds. A backward pass needs twice a forward one.
"""
from typing import NamedTuple


def encoder_flops(hidden, layers, positions, rows=None):
    """Forward operations of one sample in a Transformer encoder with 4H feed-forward layers.

    Args:
        hidden: H; layers: how many; positions: T.
        rows: positions computed in the last layer; default: all.
    """
    if not layers:
        return 0.0
    square = hidden * hidden
    full = 24.0 * positions * square + 4.0 * positions ** 2 * hidden
    if rows is None:
        return layers * full
    # all keys and values; query, output, attention and feed-forward of the rows alone
    last = 4.0 * positions * square + 20.0 * rows * square + 4.0 * rows * positions * hidden
    return (layers - 1) * full + last


def patches(config):
    """Patches of a picture."""
    return (config.image_size // config.resolution) ** 2


def image_flops(config, images):
    """Forward operations of the visual encoder on ``images`` pictures."""
    embedding = 2.0 * patches(config) * 3 * config.resolution ** 2 * config.hidden_size
    return images * (embedding + encoder_flops(config.hidden_size, config.vit_num_hidden_layers, 1 + patches(config)))


def text_flops(config, texts, length):
    """Forward operations of the text encoder on ``texts`` texts padded to ``length``."""
    return texts * encoder_flops(config.hidden_size, len(config.text_enc_layers), length)


def fusion_flops(config, samples, image=True, length=0, first_only=False, with_loss=True, layout="pair"):
    """Forward operations of grounding and of the grounded encoder.

    Args:
        samples: how many; image: whether they have a picture; length: of their padded texts, 0 for none.
        first_only, with_loss, layout: as in ``Unimo2Model.fuse``.
    """
    hidden, own = config.hidden_size, (1 + patches(config) if image else 0)
    total, codes = 0.0, 0
    if config.model_type == "grounded":
        choosing = (patches(config) if image else 0) + (length - 1 if length and not (layout == "caption" and image) else 0)
        codes = config.topk_value if config.grounding_method == "topk" else choosing
        total += 2.0 * choosing * config.num_codebook * hidden                      # relevance of every code to every state
        if with_loss and config.grounding_method == "topk":
            total += 3 * 2.0 * choosing * codes * hidden                            # relevance of the chosen, and both weighted means
    rows = (1 if image else 0) + (1 if length else 0) if first_only else None
    return samples * (total + encoder_flops(hidden, len(config.grounding_enc_layers), own + codes + length, rows))


def unimo_flops(config, samples, regions=0, objects=0, length=0, first_only=False):
    """Forward operations of UNIMO's encoder on ``samples`` sequences of regions, object tags and text, padded to these lengths.

    Args:
        config: ``UnimoConfig``; first_only: as in ``UnimoModel.forward``.
    """
    rows = (1 if regions else 0) + (1 if length else 0) if first_only else None
    embedding = 2.0 * regions * (config.image_embedding_size + 5) * config.hidden_size
    return samples * (embedding + encoder_flops(config.hidden_size, config.num_hidden_layers, regions + objects + length, rows))


def prediction_flops(config, positions, classes):
    """Forward operations of the tied output layer (words, or grounded tokens) at ``positions`` places."""
    return positions * (2.0 * config.hidden_size ** 2 + 2.0 * config.hidden_size * classes)


class Pass(NamedTuple):
    """One trip of a batch through a part of UNIMO-2; what it costs is reckoned from it (operations here, memory in ``models/memory.py``).

    ``part``: image, text, fusion, words or codes (the tied output layers, where ``samples`` counts positions). ``image``, ``length``, ``first_only``,
    ``with_loss``, ``layout``: of a fusion, as in :func:`fusion_flops`.
    """

    part: str
    samples: int
    length: int = 0
    image: bool = True
    first_only: bool = False
    with_loss: bool = True
    layout: str = "pair"


def pass_flops(config, one):
    """Forward operations of a :class:`Pass`."""
    if one.part == "image":
        return image_flops(config, one.samples)
    if one.part == "text":
        return text_flops(config, one.samples, one.length)
    if one.part == "fusion":
        return fusion_flops(config, one.samples, one.image, one.length, one.first_only, one.with_loss, one.layout)
    return prediction_flops(config, one.samples, config.text_vocab_size if one.part == "words" else config.num_codebook)
