"""A classification head on either model: on text (GLUE), on an image (ImageNet), or on a pair (VQA, visual entailment)."""
import paddle
from paddle import nn

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.heads import ClassificationHead, EntailmentHead
from unimo2_paddle.models.unimo import UnimoModel
from unimo2_paddle.models.unimo2 import Unimo2Model

INPUTS = ("pair", "text", "image")


class Unimo2Classifier(nn.Layer):
    """The model's pooled output and one fully connected layer (parameters ``cls_out_w``, ``cls_out_b``).

    Args:
        config: ``Unimo2Config``; inputs: "pair" (product of the poolers, as in matching), "text" or "image" (that side's pooler;
            the other encoder does not exist then).
        num_labels: outputs; dropout: of the head (the authors' 0.1).
        prefix: "cls_out", or "cls_out_new" for a task that starts from the authors' MNLI model.
        layout: how a pair meets: "pair" (through grounded tokens only) or "caption" (text also sees the image).
        contrastive: the head of a pair also reads the product of the contrastive features (``[B, 2H]`` in all), ours: what the unimodal
            encoders know of each other after a short pre-training, the grounded encoder would have to learn anew.
    """

    def __init__(self, config, inputs, num_labels, dropout=0.1, prefix="cls_out", layout="pair", contrastive=False):
        super().__init__()
        if inputs not in INPUTS:
            raise UserInputError(f"inputs {inputs!r} is not one of {', '.join(INPUTS)}")
        self.config, self.inputs, self.num_labels, self.layout = config, inputs, num_labels, layout
        self.backbone = Unimo2Model(config, vision=inputs != "text", text=inputs != "image", heads=("pooling",))
        self.contrastive = contrastive and inputs == "pair"
        self.head = ClassificationHead(config.hidden_size * (2 if self.contrastive else 1), num_labels, dropout, config.initializer_range, prefix)

    def set_recompute(self, enabled=True):
        """Recompute layer activations in the backward pass."""
        self.backbone.set_recompute(enabled)

    def features(self, image=None, input_ids=None, position_ids=None, text_mask=None):
        """Pooled features ``[B, H]`` (``[B, 2H]`` with ``contrastive``); arguments as in ``Unimo2Model.forward``."""
        model = self.backbone
        image_states = model.encode_image(image) if self.inputs != "text" else None
        text_states = model.encode_text(input_ids, position_ids, text_mask) if self.inputs != "image" else None
        out = model.fuse(image_states, text_states, text_mask, self.layout, first_only=True, with_grounding_loss=False)
        if self.inputs == "pair":
            fused = model.fused_features(out)
            if not self.contrastive:
                return fused
            image, text = model.contrastive_features(image_states, text_states)
            return paddle.concat([fused, image * text / model.temperature()], axis=-1)  # their sum is the logit of the contrastive loss
        return model.pool_text(out) if self.inputs == "text" else model.pool_image(out)

    def forward(self, image=None, input_ids=None, position_ids=None, text_mask=None):
        """Logits ``[B, num_labels]``."""
        return self.head(self.features(image, input_ids, position_ids, text_mask))


class UnimoClassifier(nn.Layer):
    """UNIMO's pooled output and its head: on text one layer (``cls_out_{N}_w``), on a pair the sum of both poolers and two layers.

    Args:
        config: ``UnimoConfig``; inputs: "text" (GLUE, also regression with ``num_labels`` 1) or "pair" (visual entailment).
        num_labels: outputs; dropout: of the head (the authors' 0.1).
    """

    def __init__(self, config, inputs, num_labels, dropout=0.1):
        super().__init__()
        if inputs not in ("pair", "text"):
            raise UserInputError(f"inputs {inputs!r} is not one of pair, text")
        self.config, self.inputs, self.num_labels = config, inputs, num_labels
        self.backbone = UnimoModel(config, vision=inputs == "pair", heads=("pooling",))
        if inputs == "pair":
            self.head = EntailmentHead(config.hidden_size, num_labels, dropout, config.initializer_range)
        else:
            self.head = ClassificationHead(config.hidden_size, num_labels, dropout, config.initializer_range, f"cls_out_{num_labels}")

    def set_recompute(self, enabled=True):
        """Recompute layer activations in the backward pass."""
        self.backbone.set_recompute(enabled)

    def features(self, **inputs):
        """Pooled features ``[B, H]``; arguments as in ``UnimoModel.forward``."""
        out = self.backbone(**inputs, first_only=True)
        text = self.backbone.pool_text(out)
        return text + self.backbone.pool_image(out) if self.inputs == "pair" else text

    def forward(self, **inputs):
        """Logits ``[B, num_labels]``."""
        return self.head(self.features(**inputs))
