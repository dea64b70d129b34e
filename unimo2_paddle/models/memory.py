"""Memory that UNIMO-2's parts need while they are trained, from a config and shapes alone (for planning; operations: models/flops.py).

Bytes of float32, of what the dynamic graph keeps for the backward pass. The factors were read off Paddle 3.3.1's own count of allocated memory
(``host_memory_stat_peak_value``), which they fit to 0.1 % for stacks of layers; tests compare whole training steps.
"""
from typing import NamedTuple

from unimo2_paddle.models.flops import patches

FLOAT = 4
# kept per layer: so many times [B, T, H] and [B, heads, T, T], and what dropout adds to them (a mask of bytes; the kept product's second copy)
STATES, SCORES, HIDDEN_DROPOUT, ATTENTION_DROPOUT = 16.0, 1.0, 0.5, 1.25
BACKWARD = 8.0  # times [B, T, H]: gradients inside one layer that exist at once (both sides of the activation)


class Kept(NamedTuple):
    """Bytes of one or several passes: ``kept`` until the backward pass, ``layer``: of the largest layer when it is computed anew, ``passing``:
    gradients inside the largest layer."""

    kept: float = 0.0
    layer: float = 0.0
    passing: float = 0.0

    def with_(self, other):
        """Both, one after the other."""
        return Kept(self.kept + other.kept, max(self.layer, other.layer), max(self.passing, other.passing))


def layer_bytes(samples, positions, hidden, heads, hidden_dropout=False, attention_dropout=False):
    """What one Transformer layer keeps."""
    states = FLOAT * samples * positions * hidden * (STATES + HIDDEN_DROPOUT * bool(hidden_dropout) + 4.0 / hidden)
    return states + FLOAT * samples * heads * positions ** 2 * (SCORES + ATTENTION_DROPOUT * bool(attention_dropout))


def encoder_memory(samples, positions, hidden, heads, layers, hidden_dropout=0.0, attention_dropout=0.0, rows=None, recompute=False, masked=True):
    """:class:`Kept` of a stack of layers with its input.

    Args:
        rows: positions computed in the last layer; default: all. recompute: the others keep their input only. masked: under a visibility mask.
    """
    states = FLOAT * samples * positions * hidden
    one = layer_bytes(samples, positions, hidden, heads, hidden_dropout, attention_dropout)
    whole = layers if rows is None else layers - 1
    kept = states + whole * (states if recompute else one)
    if rows is not None:  # keys, values, and the rest for the rows alone
        kept += 2 * states + layer_bytes(samples, rows, hidden, heads, hidden_dropout, attention_dropout)
    if recompute and masked:
        kept += FLOAT * samples * heads * positions ** 2  # the mask in the form of all heads is an argument of every layer
    return Kept(kept, one if recompute else 0.0, BACKWARD * states)


def pass_memory(config, one, recompute=False):
    """:class:`Kept` of a ``Pass``."""
    hidden, flat = config.hidden_size, patches(config)
    if one.part == "image":
        inputs = FLOAT * one.samples * (flat * 3 * config.resolution ** 2 + (1 + flat) * hidden)
        return Kept(inputs).with_(encoder_memory(one.samples, 1 + flat, hidden, config.vit_num_attention_heads, config.vit_num_hidden_layers,
                                                 config.vit_hidden_dropout_prob, config.vit_attention_probs_dropout_prob, recompute=recompute,
                                                 masked=False))
    if one.part == "text":
        inputs = FLOAT * one.samples * one.length * hidden * (1.25 if config.text_hidden_dropout_prob else 1.0)
        return Kept(inputs).with_(encoder_memory(one.samples, one.length, hidden, config.text_num_attention_heads, len(config.text_enc_layers),
                                                 config.text_hidden_dropout_prob, config.text_attention_probs_dropout_prob, recompute=recompute))
    if one.part == "fusion":
        return _fusion_memory(config, one, recompute)
    classes = config.text_vocab_size if one.part == "words" else config.num_codebook
    # the softmax, its gradient and that of the logits; four states of the head
    return Kept(FLOAT * one.samples * (classes + 4 * hidden), 0.0, 2 * FLOAT * one.samples * classes)


def _fusion_memory(config, one, recompute):
    hidden, own = config.hidden_size, 1 + patches(config) if one.image else 0
    inputs, codes = 0.0, 0
    if config.model_type == "grounded":
        choosing = max(own - 1, 0) + (one.length - 1 if one.length and not (one.layout == "caption" and one.image) else 0)
        codes = config.topk_value if config.grounding_method == "topk" else choosing
        inputs += codes * hidden * (1.25 if config.hidden_dropout_prob else 1.0)
        if one.with_loss:
            inputs += 7 * choosing * codes + 3 * (choosing + codes) * hidden if config.grounding_method == "topk" else 3 * choosing * hidden
    rows = (1 if one.image else 0) + (1 if one.length else 0) if one.first_only else None
    masked = bool(one.length)
    return Kept(FLOAT * one.samples * inputs).with_(encoder_memory(
        one.samples, own + codes + one.length, hidden, config.num_attention_heads, len(config.grounding_enc_layers), config.hidden_dropout_prob,
        config.attention_probs_dropout_prob, rows, recompute, masked))


def _gradient_bytes(config, part):
    """Gradients that exist once a pass through this part has gone backward; the word table counts with text and words alike."""
    layer = 12 * config.hidden_size ** 2 + 13 * config.hidden_size
    if part in ("words", "text"):
        table = {"table": FLOAT * config.text_vocab_size * config.hidden_size}
        return table if part == "words" else {**table, "text": FLOAT * layer * len(config.text_enc_layers)}
    layers = {"image": config.vit_num_hidden_layers, "fusion": len(config.grounding_enc_layers)}
    return {part: FLOAT * layer * layers.get(part, 0)}


def step_peak(config, parameters, passes, recompute=False, shared=1, averaged=False):
    """The most bytes that one worker holds in a training step, by part.

    Backward passes go through ``passes`` from the last to the first: what these keep goes, gradients come.

    Args:
        parameters: their number; passes: of one micro-batch; shared: workers that share the optimizer's state (1: each has all);
        averaged: a running average of the weights is kept too.

    Returns:
        dict of bytes: parameters, gradients, optimizer, average, activations (the most at a time), peak.
    """
    weights, found = FLOAT * parameters, [pass_memory(config, one, recompute) for one in passes]
    left, come, moving, activations = sum(kept.kept for kept in found), {}, weights, 0.0
    for one, kept in zip(reversed(passes), reversed(found)):
        now = left + kept.layer + kept.passing
        activations, moving = max(activations, now), max(moving, now + sum(come.values()))
        left -= kept.kept
        come.update(_gradient_bytes(config, one.part))
        moving = max(moving, left + sum(come.values()))
    parts = {"parameters": weights, "gradients": weights, "optimizer": 2.0 * weights / shared, "average": weights * bool(averaged),
             "activations": activations}
    return {**parts, "peak": parts["parameters"] + parts["optimizer"] + parts["average"] + moving}
