"""How the two systems caption: what is encoded, what predicts, how texts are searched. One class each, the same methods.

Object tags come as ``tag_ids``, ``tag_positions`` and ``tag_mask`` in the batch. UNIMO-2 reads them as the first part of the text, UNIMO as a
segment of its own between regions and text.
"""
import paddle

from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.generation import generate, generate_from_prefix
from unimo2_paddle.tasks.captioning_data import target_arrays
from unimo2_paddle.tasks.unimo_inputs import image_inputs

TAGS = {"object_ids": "tag_ids", "object_positions": "tag_positions", "object_mask": "tag_mask"}  # UNIMO's name -> the batch's


class Unimo2Captioner:
    """Captions of pixels through grounded tokens."""

    def targets(self, captions, tags, pad_id):
        """The text arrays to learn ``captions`` from, see :func:`target_arrays`; ``tags``: id lists, or ``None``."""
        return target_arrays(captions, tags, pad_id)

    def encode(self, model, batch):
        """What all captions of the batch's pictures share: tensors by name, one row per picture."""
        return {"image_states": model.encode_image(image_inputs(batch)["image"])}

    def logits(self, model, encoded, text):
        """Vocabulary logits ``[N, V]`` at the places to predict from; ``text``: tensors of :meth:`targets`."""
        states = model.encode_text(text["input_ids"], text["position_ids"], text["text_mask"])
        out = model.fuse(encoded["image_states"], states, text["text_mask"], layout="caption", with_grounding_loss=False)
        return _predictions(model, out.fused_text, text)

    def generate(self, model, batch, tokenizer, options, word_starts=None):
        """Captions of the batch's pictures, see :func:`unimo2_paddle.models.generation.generate`."""
        tags = tuple(batch[name] for name in TAGS.values()) if "tag_ids" in batch else None
        return generate(model, image_inputs(batch)["image"], tokenizer.cls_id, tokenizer.sep_id, options, tags, word_starts)

    def features(self, model, batch):
        """What makes pictures alike, ``[B, H]``, by their product."""
        return model.contrastive_features(image_states=self.encode(model, batch)["image_states"])[0]


class UnimoCaptioner:
    """Captions of regions and object tags in one sequence."""

    def targets(self, captions, tags, pad_id):
        """As for UNIMO-2, but tags are no part of the text."""
        return target_arrays(captions, None, pad_id)

    def encode(self, model, batch):
        """The arguments of the model before the text: nothing is computed ahead, since the image's states are those of the same pass."""
        tags = {name: batch[own] for name, own in TAGS.items()} if "tag_ids" in batch else {}
        return {**image_inputs(batch), **tags}

    def logits(self, model, encoded, text, **deltas):
        """As for UNIMO-2; ``deltas``: perturbations (``text_delta``, ``image_delta``)."""
        out = model(**encoded, input_ids=text["input_ids"], position_ids=text["position_ids"], text_mask=text["text_mask"], **deltas)
        return _predictions(model, out.text_states, text)

    def generate(self, model, batch, tokenizer, options, word_starts=None):
        """As for UNIMO-2."""
        return generate_from_prefix(model, self.encode(model, batch), tokenizer.cls_id, tokenizer.sep_id, options, word_starts)

    def features(self, model, batch):
        """The state of the global region of a picture without tags, at length 1."""
        states = model(**image_inputs(batch), first_only=True).image_states[:, 0]
        return states / states.norm(axis=-1, keepdim=True).clip(min=1e-12)


def captioner_of(config):
    """The captioner for a model config."""
    return UnimoCaptioner() if isinstance(config, UnimoConfig) else Unimo2Captioner()


def _predictions(model, states, text):
    return model.mlm_logits(paddle.index_select(states.reshape([-1, states.shape[-1]]), text["predict_from"]))
