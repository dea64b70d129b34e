"""A classification head on UNIMO-2: on text (GLUE), on an image (ImageNet), or on a pair (VQA, visual entailment)."""
from paddle import nn

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.heads import ClassificationHead
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
    """

    def __init__(self, config, inputs, num_labels, dropout=0.1, prefix="cls_out", layout="pair"):
        super().__init__()
        if inputs not in INPUTS:
            raise UserInputError(f"inputs {inputs!r} is not one of {', '.join(INPUTS)}")
        self.config, self.inputs, self.num_labels, self.layout = config, inputs, num_labels, layout
        self.backbone = Unimo2Model(config, vision=inputs != "text", text=inputs != "image", heads=("pooling",))
        self.head = ClassificationHead(config.hidden_size, num_labels, dropout, config.initializer_range, prefix)

    def set_recompute(self, enabled=True):
        """Recompute layer activations in the backward pass."""
        self.backbone.set_recompute(enabled)

    def features(self, image=None, input_ids=None, position_ids=None, text_mask=None):
        """Pooled features ``[B, H]``; arguments as in ``Unimo2Model.forward``."""
        model = self.backbone
        image_states = model.encode_image(image) if self.inputs != "text" else None
        text_states = model.encode_text(input_ids, position_ids, text_mask) if self.inputs != "image" else None
        out = model.fuse(image_states, text_states, text_mask, self.layout, first_only=True, with_grounding_loss=False)
        if self.inputs == "pair":
            return model.fused_features(out)
        return model.pool_text(out) if self.inputs == "text" else model.pool_image(out)

    def forward(self, image=None, input_ids=None, position_ids=None, text_mask=None):
        """Logits ``[B, num_labels]``."""
        return self.head(self.features(image, input_ids, position_ids, text_mask))
