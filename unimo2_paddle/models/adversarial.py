"""Adversarial training on the inputs of UNIMO: perturbed text embeddings and perturbed region features (VILLA, FreeLB).

K iterations of up to three passes: clean, with a text perturbation, with an image perturbation (never both together). After each
iteration the perturbations climb along their gradient. Two forms, chosen by ``form``:

==================  ==================================================  =================================================
.                   ``authors`` (their released code)                   ``textbook`` (arXiv 1909.11764, 2006.06195)
==================  ==================================================  =================================================
climbs              the pass's cross entropy / K                        its cross entropy / K and its divergence / K
projection (l2)     perturbations whose *gradient* norm exceeds         perturbations whose own norm exceeds the maximum
                    the maximum are scaled by maximum / that norm       are scaled back onto the ball
divergence          summed over iterations                              averaged over iterations, like the cross entropy
==================  ==================================================  =================================================

In both the gradient counts as a constant (no second-order terms), and the step after the last iteration is not taken.
"""
from dataclasses import dataclass, field
from typing import Dict, List

import paddle
import paddle.nn.functional as F

from unimo2_paddle.models import fused
from unimo2_paddle.models.losses import log_softmax

KINDS = ("none", "villa", "freelb_text", "freelb_image")
FORMS = ("authors", "textbook")
NORMS = ("l2", "inf")
SIDES = {"none": (), "villa": ("text", "image"), "freelb_text": ("text",), "freelb_image": ("image",)}


@dataclass
class AdversarialConfig:
    """Adversarial training; the keys are the authors' command-line names, ``form`` is ours.

    ``adv_type``: none, villa (text and image), freelb_text, freelb_image. ``adv_step``: K. ``adv_lr``: length of a step.
    ``adv_init_mag``: size of the random start. ``adv_max_norm``: see the module, 0 for no projection. ``norm_type``: l2 or inf, per
    sample. ``adv_kl_weight``: weight of the divergence from the clean pass. ``with_pure_model``: train on the clean pass too.
    """

    adv_type: str = "none"
    adv_step: int = 4
    adv_lr: float = 0.05
    adv_init_mag: float = 0.4
    adv_max_norm: float = 0.4
    norm_type: str = "l2"
    adv_kl_weight: float = 1.0
    with_pure_model: bool = True
    form: str = "authors"

    def problems(self):
        found = [f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}"
                 for key, choices in (("adv_type", KINDS), ("form", FORMS), ("norm_type", NORMS)) if getattr(self, key) not in choices]
        found += [f"{key}: must be at least 0, is {getattr(self, key)}"
                  for key in ("adv_lr", "adv_init_mag", "adv_max_norm", "adv_kl_weight") if getattr(self, key) < 0]
        if self.adv_step < 1:
            found.append(f"adv_step: must be at least 1, is {self.adv_step}")
        return found

    @property
    def passes(self):
        """Forward passes of a training step."""
        return self.adv_step * (len(self.sides) + self.with_pure_model) if self.sides else 1

    @property
    def sides(self):
        """Which inputs are perturbed."""
        return SIDES[self.adv_type]


@dataclass
class AdversarialLoss:
    """``loss`` to train on; ``terms``: its parts (scalars) by name; ``logits``: of the first clean pass, ``None`` without one;
    ``steps``: per iteration the perturbations, their gradients and logits by side, kept only on demand."""

    loss: paddle.Tensor
    terms: Dict[str, paddle.Tensor]
    logits: paddle.Tensor = None
    steps: List[dict] = field(default_factory=list)


def symmetric_divergence(first, second):
    """Mean over rows of KL(p, q) + KL(q, p) of two logits ``[N, C]``; the gradient flows into both."""
    difference = log_softmax(first) - log_softmax(second)
    return ((F.softmax(first) - F.softmax(second)) * difference).sum(axis=-1).mean()


def sample_norms(values, norm_type):
    """Norm of every sample of ``[B, T, D]``, as ``[B, 1, 1]``: l2, or the largest absolute value for inf."""
    if norm_type == "inf":
        return values.abs().max(axis=[1, 2], keepdim=True)
    return values.square().sum(axis=[1, 2], keepdim=True).sqrt()


def initial_perturbation(mask, width, settings, noise=None):
    """A random start ``[B, T, width]``, 0 where ``mask`` ``[B, T]`` is.

    Its entries are uniform in +-``adv_init_mag``, for l2 divided by the square root of the sample's number of entries.
    ``noise`` in [-1, 1] replaces the random numbers.
    """
    if noise is None:
        noise = paddle.uniform([*mask.shape, width], dtype="float32", min=-1.0, max=1.0)
    delta = noise * mask.unsqueeze(2) * settings.adv_init_mag
    if settings.norm_type == "l2":
        delta = delta / (mask.sum(axis=1) * width).clip(min=1.0).sqrt().reshape([-1, 1, 1])
    return delta


def climb(delta, gradient, settings):
    """The perturbation after one normalised step along its gradient, then projected; both ``[B, T, D]``, without graph."""
    norms = sample_norms(gradient, settings.norm_type)
    delta = delta + settings.adv_lr * gradient / norms.clip(min=1e-8)
    limit = settings.adv_max_norm
    if limit <= 0:
        return delta
    if settings.norm_type == "inf":
        return delta.clip(-limit, limit)
    compared = norms if settings.form == "authors" else sample_norms(delta, "l2")
    return delta * paddle.where(compared > limit, limit / compared.clip(min=1e-8), paddle.ones_like(compared))


def _gradient(objective, delta, parameters):
    """The gradient of a pass's objective at its perturbation.

    Parameters are asked for as well. The norms' scales always: on CPU, Paddle (measured: 3.3.1) computes a layer norm's input gradient
    without the scale when the scale's own gradient is not wanted. And all of a fused layer's: Paddle allows its backward pass no
    gradient that nobody asked for.
    """
    return paddle.grad(objective, [delta, *parameters], retain_graph=True, allow_unused=True)[0].detach()


def adversarial_loss(model, forward, loss, masks, widths, settings, noise=None, keep_steps=False):
    """The training loss over all iterations; the graphs of all passes stay in memory until its backward, as in the authors' program.

    Args:
        model: the layer that ``forward`` runs.
        forward: function of keywords ``text_delta``, ``image_delta`` (absent: unperturbed) to logits ``[N, C]``.
        loss: function of logits to a scalar, for example a label-smoothed cross entropy.
        masks: ``{"text": [B, L], "image": [B, N]}``, 1 = real, for the perturbed sides; widths: ``{"text": H, "image": D}``.
        settings: :class:`AdversarialConfig`, not "none".
        noise: see :func:`initial_perturbation`, by side; keep_steps: fill ``steps`` (for tests).

    Returns:
        :class:`AdversarialLoss` with the terms clean, text, image (cross entropies) and divergence, as they enter the sum.
    """
    count, sides, with_clean = settings.adv_step, settings.sides, settings.with_pure_model
    textbook = settings.form == "textbook"
    deltas = {side: initial_perturbation(masks[side], widths[side], settings, (noise or {}).get(side)) for side in sides}
    asked = [p for p in model.parameters() if not p.stop_gradient and (fused.enabled() or p.name.endswith("layer_norm_scale"))]
    divergence_weight = settings.adv_kl_weight / (count if textbook else 1)
    result = AdversarialLoss(None, {})

    def add(name, value):
        result.terms[name] = result.terms[name] + value if name in result.terms else value

    for iteration in range(count):
        step = {}
        if with_clean:
            clean = forward()
            result.logits = clean if iteration == 0 else result.logits
            add("clean", loss(clean) / count)
        for side in sides:
            delta = deltas[side].detach()
            delta.stop_gradient = False
            logits = forward(**{f"{side}_delta": delta})
            climbed = own = loss(logits) / count
            add(side, own)
            if with_clean:
                divergence = divergence_weight * symmetric_divergence(clean, logits)
                add("divergence", divergence)
                climbed = own + divergence if textbook else own
            if iteration + 1 < count or keep_steps:
                gradient = _gradient(climbed, delta, asked)
                deltas[side] = climb(delta.detach(), gradient, settings)
                if keep_steps:
                    step[side] = {"delta": delta.detach(), "gradient": gradient, "logits": logits.detach()}
        result.steps += [step] if keep_steps else []
    result.loss = sum(result.terms.values())
    return result
