"""Adversarial training inside a task's loss (UNIMO: captioning and visual entailment); models/adversarial.py says what is computed."""
from unimo2_paddle.models.adversarial import adversarial_loss
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.tasks.unimo_inputs import known_system


def adversarial_terms(model, forward, loss, batch, settings):
    """Loss terms of a batch with perturbed inputs.

    Args:
        model: the layer whose parameters are trained; forward: function of keywords ``text_delta`` and ``image_delta`` to logits.
        loss: function of logits to a scalar.
        batch: tensors with ``text_mask`` and ``image_mask``: real positions are perturbed, caption or hypothesis and regions, never tags.
        settings: ``AdversarialConfig``, not "none".

    Returns:
        (terms, logits): ``loss`` and its parts ``adversarial_...``; the logits of the first clean pass, ``None`` without one.
    """
    mask, config = batch["text_mask"], model.config
    # of a sequence-to-sequence mask [B, L, L]: whatever sees something is a real position
    masks = {"text": mask if len(mask.shape) == 2 else mask.max(axis=-1), "image": batch["image_mask"]}
    result = adversarial_loss(model, forward, loss, masks, {"text": config.hidden_size, "image": config.image_embedding_size}, settings)
    return {"loss": result.loss, **{f"adversarial_{name}": value for name, value in result.terms.items()}}, result.logits


def adversarial_problems(config):
    """Problems of a run config with the group ``adversarial``."""
    if config.adversarial.adv_type == "none":
        return []
    model, found = known_system(config.model), []
    if model is not None and not isinstance(model, UnimoConfig):
        found.append("adversarial.adv_type: perturbs region features, which UNIMO-2 does not read; set none")
    if config.run.graph != "dynamic":
        found.append(f"adversarial.adv_type: takes gradients inside the loss, which run.graph={config.run.graph} cannot; set run.graph=dynamic")
    return found
