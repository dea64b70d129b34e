"""The optimizer: AdamW with the authors' decay-by-name rule and global-norm clipping."""
import re
from dataclasses import dataclass, field
from typing import List

import paddle

from unimo2_paddle.errors import ConfigError
from unimo2_paddle.training.fused_adamw import FusedAdamW
from unimo2_paddle.training.schedule import SCHEDULES

DECAY_RULES = ("standard", "authors")
NO_DECAY_ENDINGS = ("_bias", "_b", ".b_0")
TEMPERATURES = ("cmcl_temperature", "topk_temperature")


@dataclass
class OptimConfig:
    """Optimizer and schedule of a run; warm-up and drops may be given as a share of the run or in epochs."""

    learning_rate: float = 1e-4
    schedule: str = "linear_warmup_decay"
    warmup_steps: int = -1          # -1: from warmup_ratio
    warmup_ratio: float = 0.06
    drop_at_epochs: List[int] = field(default_factory=list)
    drop_factor: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    decay_rule: str = "standard"
    clip_norm: float = 1.0          # global norm; 0: no clipping
    layer_decay: float = 1.0        # the rate shrinks by this factor per layer from the head down to the embeddings; 1: one rate
    ema: float = 0.0                # running average of the weights, judged and saved instead of them, for example 0.9999; 0: none

    def problems(self):
        found = [f"{key}: must be at least 0, is {getattr(self, key)}"
                 for key in ("learning_rate", "drop_factor", "weight_decay", "clip_norm") if getattr(self, key) < 0]
        found += [f"{key}: must be in [0, 1), is {getattr(self, key)}"
                  for key in ("warmup_ratio", "beta1", "beta2", "ema") if not 0 <= getattr(self, key) < 1]
        found += [f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}"
                  for key, choices in (("schedule", SCHEDULES), ("decay_rule", DECAY_RULES)) if getattr(self, key) not in choices]
        if not 0 < self.layer_decay <= 1:
            found.append(f"layer_decay: must be above 0 and at most 1, is {self.layer_decay}")
        if self.epsilon <= 0:
            found.append(f"epsilon: must be above 0, is {self.epsilon}")
        if self.warmup_steps < -1:
            found.append(f"warmup_steps: must be at least 0, or -1 to take warmup_ratio, is {self.warmup_steps}")
        if self.schedule == "piecewise" and not self.drop_at_epochs:
            found.append("drop_at_epochs: is empty, so the piecewise schedule would never drop; give epochs, or schedule: constant")
        return found


def decays(name, rule="standard"):
    """Whether weight decay applies to the parameter called ``name``.

    ``authors``: everything but names containing ``layer_norm`` or ending in ``_bias``, ``_b``, ``.b_0`` *after*
    ``rstrip(".master")``, which strips characters, so ``vit.patch_embeddings_projection_bias`` is decayed, and so are the temperatures.
    ``standard``: the rule as it was meant, and temperatures never decay.
    """
    if rule == "authors":
        return "layer_norm" not in name and not name.rstrip(".master").endswith(NO_DECAY_ENDINGS)
    return "layer_norm" not in name and not name.endswith(NO_DECAY_ENDINGS) and name not in TEMPERATURES


_LAYER = re.compile(r"(?:(vit|text|grounded)\.)?encoder_layer_(\d+)_")
_BOTTOM = ("vit.patch_embeddings", "vit.cls_token", "vit.position", "text.word_embedding", "text.pos_embedding", "text.pre_encoder",
           "word_embedding", "pos_embedding", "role_embedding", "turn_embedding", "pre_encoder", "image_emb.", "image_loc.", "v_pre_encoder")
_UNDER_GROUNDED = ("vit.post_encoder", "grounded.pre_encoder", "grounded.grounding_", "grounded.cmcl_", "vq_emb") + TEMPERATURES


def layer_scales(names, decay):
    """Share of the learning rate of every parameter: ``decay ** (layers above it)``, 1 for the heads.

    Layers are counted from the top: heads, then the grounded encoder, then both unimodal encoders side by side with their last
    layers at one height, then the embeddings. What stands between the encoders (dictionary, final norms) goes with the last unimodal
    layers. UNIMO's one encoder stands directly on the embeddings.

    Args:
        names: parameter names of a model.

    Returns:
        ``{name: share}``.
    """
    names = list(names)
    depth = {part: 0 for part in ("vit", "text", "grounded")}

    def place(found):
        return found[1] or "grounded", int(found[2])  # UNIMO's encoder has no prefix

    for part, layer in map(place, filter(None, map(_LAYER.match, names))):
        depth[part] = max(depth[part], layer + 1)
    unimodal = max(depth["vit"], depth["text"])

    def layers_above(name):
        found = _LAYER.match(name)
        if found:
            part, layer = place(found)
            return depth[part] - layer + (0 if part == "grounded" else depth["grounded"])
        if name.startswith(_BOTTOM):
            return depth["grounded"] + unimodal + 1
        return depth["grounded"] + 1 if name.startswith(_UNDER_GROUNDED) else 0

    return {name: decay ** layers_above(name) for name in names}


def build_optimizer(parameters, config):
    """AdamW over ``parameters``; the learning rate is set before every step with ``optimizer.set_lr``.

    With ``layer_decay`` each parameter carries its share of the rate (Paddle's own ``lr_ratio`` refuses to run on CPU).
    Paddle's Adam multiplies epsilon by sqrt(1 - beta2^t), as the authors' 2.x runs did. Decay is decoupled: p -= lr * wd * p.

    Raises:
        ConfigError: unknown decay rule.
    """
    if config.decay_rule not in DECAY_RULES:
        raise ConfigError(f"optim.decay_rule: {config.decay_rule!r} is not one of {', '.join(DECAY_RULES)}")
    parameters = list(parameters)
    scales = layer_scales([p.name for p in parameters], config.layer_decay)
    for parameter in parameters:
        parameter.optimize_attr["learning_rate"] = scales[parameter.name]
    clip = paddle.nn.ClipGradByGlobalNorm(config.clip_norm) if config.clip_norm > 0 else None
    return FusedAdamW(
        learning_rate=config.learning_rate, beta1=config.beta1, beta2=config.beta2, epsilon=config.epsilon, parameters=parameters,
        weight_decay=config.weight_decay, apply_decay_param_fun=lambda name: decays(name, config.decay_rule), grad_clip=clip)
