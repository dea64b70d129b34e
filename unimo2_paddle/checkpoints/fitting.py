"""Which config, of UNIMO-2 or UNIMO, a set of variable names and shapes fits."""
import re
from dataclasses import dataclass, field
from typing import Dict, List

HEAD_SIZE = 64  # width of one attention head in the base and large models; it leaves no trace in the shapes
_LAYER = re.compile(r"(vit|text|grounded)\.encoder_layer_(\d+)_")
_COUNT_KEYS = {"vit": "vit_num_hidden_layers", "text": "text_num_hidden_layers", "grounded": "num_hidden_layers"}
_SUBSET_KEYS = {"text": "text_enc_layers", "grounded": "grounding_enc_layers"}
_PARTS = {  # what a checkpoint may contain, by one of its variables
    "visual Transformer": "vit.patch_embeddings_projection_weight",
    "text Transformer": "text.word_embedding",
    "grounded dictionary": "vq_emb",
    "poolers": "grounded.pooled_fc_text.w_0",
    "matching head": "grounded.img_text_matching_fc.w_0",
    "masked-word head": "grounded.mask_lm_trans_fc.w_0",
    "masked-code head": "grounded.mask_g_trans_fc.w_0",
    "contrastive projection": "grounded.cmcl_pooled_fc_image.w_0",
    "grounding projection": "grounded.grounding_patch_projection.w_0",
    "classifier": "cls_out_w",
    "classifier (from MNLI)": "cls_out_new_w",
}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "text_num_hidden_layers": 12,
        "vit_num_hidden_layers": 12, "text_vocab_size": 50265, "text_max_position_embeddings": 514, "num_codebook": 2048,
        "position_grid": 14, "resolution": 16, "model_type": "grounded"}


_UNIMO_NAME = re.compile(
    r"encoder_layer_\d+_|(word|pos|role|turn)_embedding$|(v_)?pre_encoder_layer_norm_|image_(emb|loc)\.|pooled_fc_|mask_(lm|region)_|match_fc\."
    r"|cls_out_|duplicated_trigram_blocking_")
_UNIMO_LAYER = re.compile(r"encoder_layer_(\d+)_")
_UNIMO_PARTS = {
    "text embedding": "word_embedding",
    "region embedding": "image_emb.w_0",
    "dialogue embeddings": "role_embedding",
    "text pooler": "pooled_fc_text.w_0",
    "image pooler": "pooled_fc_image.w_0",
    "matching head": "match_fc.w_0",
    "masked-word head": "mask_lm_trans_fc.w_0",
    "masked-region head": "mask_region_trans_fc.w_0",
    "entailment head": "cls_out_w_0",
}
UNIMO_BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50265, "max_position_embeddings": 514}


@dataclass
class Fit:
    """The config keys that shapes decide.

    Attributes:
        values: config keys and values. The numbers of heads are among them only if heads of 64 fill the width.
        present, absent: the model's parts (encoders, heads, projections) by readable name.
        foreign: variables that no model of the system has.
        system: "UNIMO-2" or "UNIMO".
    """

    values: Dict[str, object] = field(default_factory=dict)
    present: List[str] = field(default_factory=list)
    absent: List[str] = field(default_factory=list)
    foreign: List[str] = field(default_factory=list)
    system: str = "UNIMO-2"

    @property
    def knows_heads(self):
        return "num_attention_heads" in self.values

    @property
    def is_whole(self):
        """Whether a model's config can be made of it: text and grounded (or the one) encoder are there and the heads are known."""
        words = "text_vocab_size" if self.system == "UNIMO-2" else "vocab_size"
        return self.knows_heads and words in self.values and "num_hidden_layers" in self.values

    @property
    def is_base(self):
        return all(self.values.get(key) == value for key, value in (BASE if self.system == "UNIMO-2" else UNIMO_BASE).items())

    def __str__(self):
        if not self.values:
            return "fits no UNIMO-2 config: none of its names is a UNIMO-2 variable"
        v = self.values
        rooms = _COUNT_KEYS if self.system == "UNIMO-2" else {"encoder": "num_hidden_layers"}
        layers = " / ".join(f"{room} {v[key]}" for room, key in rooms.items() if key in v)
        name = f"{self.system} {v['model_type']}" if "model_type" in v else self.system
        text = [name, f"hidden {v['hidden_size']}"] if "hidden_size" in v else [f"{self.system} variables"]
        text += [f"layers {layers}"] * bool(layers)
        for key, title in (("text_vocab_size", "vocabulary"), ("text_max_position_embeddings", "text positions"), ("vocab_size", "vocabulary"),
                           ("max_position_embeddings", "positions"), ("image_embedding_size", "region features"),
                           ("num_codebook", "codebook"), ("position_grid", "position grid"), ("resolution", "patch")):
            if key in v:
                text.append(f"{title} {v[key]}" + (f"x{v[key]}" if key in ("position_grid", "resolution") else ""))
        line = ", ".join(text)
        return f"fits: {line}" + (f" (= {self.system} base)" if self.is_base else "")


def is_unimo2_name(name):
    """Whether a variable name is one the authors' UNIMO-2 programs use."""
    return (name.startswith(("vit.", "text.", "grounded.", "cls_out_"))
            or name in ("vq_emb", "cmcl_temperature", "topk_temperature"))


def is_unimo_name(name):
    """Whether a variable name is one of UNIMO's: the authors' programs', or our masked-region head's."""
    return _UNIMO_NAME.match(name) is not None


def is_unimo(names):
    """Whether variable names are those of a UNIMO model rather than of UNIMO-2, by what only one of them has."""
    return any(name == "word_embedding" or _UNIMO_LAYER.match(name) for name in names)


def fit_config(shapes):
    """Find the config that named shapes fit, of the system whose names they have.

    Args:
        shapes: dict from the authors' variable names to shapes (tuples).

    Returns:
        Fit.
    """
    if is_unimo(shapes):
        return _fit_unimo(shapes)
    fit = Fit(foreign=sorted(name for name in shapes if not is_unimo2_name(name)))
    if len(fit.foreign) == len(shapes):
        return fit
    for part, name in _PARTS.items():
        (fit.present if name in shapes else fit.absent).append(part)

    def size(name, axis, rank):
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) == rank else None

    grid_rows = size("vit.position_embeddings", 1, 3)
    grid = round(max(grid_rows - 1, 0) ** 0.5) if grid_rows else None
    hidden = next((width for width in (size("text.word_embedding", 1, 2), size("vit.cls_token_embeddings", 2, 3),
                                       size("vq_emb", 1, 2)) if width), None)
    found = {
        "hidden_size": hidden,
        "text_vocab_size": size("text.word_embedding", 0, 2),
        "text_max_position_embeddings": size("text.pos_embedding", 0, 2),
        "num_codebook": size("vq_emb", 0, 2),
        "resolution": size("vit.patch_embeddings_projection_weight", 2, 4),
        "position_grid": grid if grid and grid * grid + 1 == grid_rows else None,
        "num_labels": size("cls_out_w", 1, 2) or size("cls_out_new_w", 1, 2),
    }
    fit.values = {key: value for key, value in found.items() if value}
    fit.values["model_type"] = "grounded" if "vq_emb" in shapes else "baseline"
    if hidden and hidden % HEAD_SIZE == 0:
        for prefix in ("", "text_", "vit_"):
            fit.values[f"{prefix}num_attention_heads"] = hidden // HEAD_SIZE
    fit.values.update(_layer_values(shapes))
    fit.values.update(_switches(shapes))
    if "position_grid" in fit.values and "resolution" in fit.values:
        fit.values["image_size"] = fit.values["position_grid"] * fit.values["resolution"]
    if "num_codebook" in fit.values:
        fit.values["topk_value"] = min(100, fit.values["num_codebook"])
    return fit


def _layer_values(shapes):
    """Layer counts, and the layer subsets where numbers are skipped (a 6 + 6 split keeps the numbers of its 12 layers)."""
    layers = {room: set() for room in _COUNT_KEYS}
    for name in shapes:
        match = _LAYER.match(name)
        if match:
            layers[match.group(1)].add(int(match.group(2)))
    values = {}
    for room, numbers in layers.items():
        if numbers:
            values[_COUNT_KEYS[room]] = max(numbers) + 1
            if room in _SUBSET_KEYS and len(numbers) < max(numbers) + 1:
                values[_SUBSET_KEYS[room]] = sorted(numbers)
    return values


def _switches(shapes):
    """Config switches that add parameters, on where their parameters are stored."""
    heads = {"grounded.mask_lm_out_fc.w_0", "grounded.mask_g_out_fc.w_0"} & set(shapes)
    values = {"with_grounding_projection": "grounded.grounding_patch_projection.w_0" in shapes,
              "with_cmcl_projection": "grounded.cmcl_pooled_fc_image.w_0" in shapes,
              "with_grounding_mask": "grounded.mask_g_trans_fc.w_0" in shapes,
              "weight_sharing": not heads}
    return {key: value for key, value in values.items() if value != (key == "weight_sharing")}


def _fit_unimo(shapes):
    fit = Fit(foreign=sorted(name for name in shapes if not is_unimo_name(name)), system="UNIMO")
    for part, name in _UNIMO_PARTS.items():
        (fit.present if name in shapes else fit.absent).append(part)

    def size(name, axis, rank=2):
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) == rank else None

    layers = {int(match.group(1)) for match in map(_UNIMO_LAYER.match, shapes) if match}
    hidden = size("word_embedding", 1) or size("encoder_layer_0_ffn_fc_0.w_0", 0)
    found = {
        "hidden_size": hidden,
        "num_attention_heads": hidden // HEAD_SIZE if hidden and hidden % HEAD_SIZE == 0 else None,
        "num_hidden_layers": max(layers) + 1 if layers else None,
        "vocab_size": size("word_embedding", 0),
        "max_position_embeddings": size("pos_embedding", 0),
        "image_embedding_size": size("image_emb.w_0", 0),
        "image_class_size": size("mask_region_class_fc.w_0", 1),
        "role_type_size": size("role_embedding", 0),
        "turn_type_size": size("turn_embedding", 0),
    }
    fit.values = {key: value for key, value in found.items() if value}
    if "mask_lm_out_fc.w_0" in shapes:
        fit.values["weight_sharing"] = False
    if "mask_region_trans_fc.w_0" in shapes:
        fit.values.update(image_predict_class="mask_region_class_fc.w_0" in shapes,
                          image_predict_feature="mask_region_feature_fc.w_0" in shapes)
    return fit
