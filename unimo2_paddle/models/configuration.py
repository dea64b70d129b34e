"""Model configuration: the authors' JSON keys, checked when the object is made."""
import dataclasses
import difflib
import json
from dataclasses import dataclass, fields
from typing import Any, Dict, List, Mapping, Optional, Type, TypeVar, Union

from unimo2_paddle.errors import ConfigError
from unimo2_paddle.paths import PathLike

Config = TypeVar("Config", bound="ModelConfig")

_CHOICES = {
    "hidden_act": ("gelu", "relu"),
    "text_hidden_act": ("gelu", "relu"),
    "vit_hidden_act": ("gelu", "relu"),
    "fusion_method": ("mul", "sum"),
    "similarity_method": ("softmax",),
    "grounding_method": ("topk", "normal"),
    "model_type": ("grounded", "baseline"),
}


def parse_layers(value, count, key):
    """Layer indices from ``None`` (all), a list, ``"0,1,2"`` or ``"0-5"``.

    Raises:
        ConfigError: when the text cannot be read or an index is outside ``0 .. count-1``.
    """
    if value is None or value == "":
        return list(range(count))
    try:
        if isinstance(value, str):
            layers = []
            for part in value.split(","):
                first, _, last = part.strip().partition("-")
                layers.extend(range(int(first), int(last or first) + 1))
        else:
            layers = [int(v) for v in value]
    except (TypeError, ValueError):
        raise ConfigError(f"{key}: {value!r} is not a list of layer numbers; write for example \"0,1,2\" or \"0-5\"") from None
    wrong = [n for n in layers if not 0 <= n < count]
    if wrong or len(set(layers)) != len(layers) or not layers:
        raise ConfigError(f"{key}: layers {layers} must be distinct numbers from 0 to {count - 1}")
    return layers


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the model config: {error.strerror}", str(path)) from None
    except ValueError as error:
        raise ConfigError(f"not a JSON file: {error}", str(path)) from None
    if not isinstance(values, dict):
        raise ConfigError("must be a JSON object of config keys", str(path))
    return values


class ModelConfig:
    """What both model configs share: reading, writing and checking. Subclasses are dataclasses and define ``_value_problems``.

    ``UNCHECKED``: keys with several allowed types; ``WHOLE``: keys whose default is ``None`` but whose values are whole numbers;
    ``MAY_BE_ZERO``: the only whole numbers that may be 0.
    """

    UNCHECKED, WHOLE, MAY_BE_ZERO = (), (), ()

    def _type_problems(self):
        problems = []
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if field.name in self.UNCHECKED or (value is None and default is None):
                continue
            expected = int if field.name in self.WHOLE else type(default)
            if expected is float and isinstance(value, int) and not isinstance(value, bool):
                setattr(self, field.name, float(value))
            elif not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                problems.append(f"{field.name}: {value!r} is not of type {expected.__name__}")
        return problems

    def _range_problems(self):
        problems = []
        for key, choices in _CHOICES.items():
            if hasattr(self, key) and getattr(self, key) not in choices:
                problems.append(f"{key}: {getattr(self, key)!r} is not one of {', '.join(choices)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            lowest = 0 if field.name in self.MAY_BE_ZERO else 1
            if isinstance(value, int) and value < lowest:
                problems.append(f"{field.name}: must be at least {lowest}, is {value}")
            if isinstance(value, float) and field.name.endswith(("_prob", "_ratio")) and not 0 <= value < 1:
                problems.append(f"{field.name}: must be in [0, 1), is {value}")
        return problems

    @classmethod
    def from_dict(cls: Type[Config], values: Mapping[str, Any], source: str = "model config", **overrides: Any) -> Config:
        """A config from a mapping; unknown keys are errors with the nearest known key."""
        merged = {**values, **overrides}
        known = [f.name for f in fields(cls)]
        problems = []
        for key in merged:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                problems.append(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        try:
            config = cls(**{key: value for key, value in merged.items() if key in known})
        except ConfigError as error:
            problems.extend(error.problems)
        if problems:
            raise ConfigError(problems, source)
        return config

    @classmethod
    def from_json(cls: Type[Config], path: PathLike, **overrides: Any) -> Config:
        """A config from a JSON file of the authors' form; ``overrides`` replace single keys."""
        return cls.from_dict(_read_json(path), source=str(path), **overrides)

    def to_dict(self) -> Dict[str, Any]:
        """All keys and values as plain Python."""
        return dataclasses.asdict(self)

    def to_json(self, path: Optional[PathLike] = None) -> str:
        """The config as JSON text, also written to ``path`` when given."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text


@dataclass
class Unimo2Config(ModelConfig):
    """Shapes and switches of UNIMO-2.

    The keys are those of the authors' JSON files and command lines (reference notes, section 1.1). Defaults are the base model.
    ``vit_layer_norm_eps``, ``max_position_embeddings``, ``type_vocab_size`` and ``use_neg_lm_loss`` are accepted because the authors' files
    contain them; the authors' code does not use them either (the ViT epsilon is fixed to 1e-12).

    Ours: ``grounding_counts_padding`` (True restores the authors' top-K sum over padded positions, whose result depends on the batch)
    and ``position_grid`` (side of the stored ViT position table; the authors' is always 14).
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    text_hidden_size: Optional[int] = None
    text_num_hidden_layers: int = 12
    text_num_attention_heads: int = 12
    text_hidden_act: str = "gelu"
    text_hidden_dropout_prob: float = 0.1
    text_attention_probs_dropout_prob: float = 0.1
    text_vocab_size: int = 50265
    text_max_position_embeddings: int = 514
    vit_hidden_size: Optional[int] = None
    vit_num_hidden_layers: int = 12
    vit_num_attention_heads: int = 12
    vit_hidden_act: str = "gelu"
    vit_hidden_dropout_prob: float = 0.0
    vit_attention_probs_dropout_prob: float = 0.0
    vit_layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 514
    type_vocab_size: int = 0
    use_neg_lm_loss: bool = False
    initializer_range: float = 0.02
    fusion_method: str = "mul"
    num_labels: int = 2
    resolution: int = 16
    image_size: int = 224
    num_codebook: int = 2048
    topk_value: int = 100
    grounding_method: str = "topk"
    with_grounding_projection: bool = False
    with_cmcl_projection: bool = False
    cmcl_share_parameters: bool = False
    with_grounding_pos: bool = False
    with_grounding_mask: bool = False
    grounding_mask_ratio: float = 0.15
    cmcl_score_weight: float = 0.3
    weight_sharing: bool = True
    model_type: str = "grounded"
    text_enc_layers: Optional[Union[str, List[int]]] = None
    grounding_enc_layers: Optional[Union[str, List[int]]] = None
    grounding_counts_padding: bool = False
    position_grid: int = 14

    UNCHECKED = ("text_enc_layers", "grounding_enc_layers")
    WHOLE = ("text_hidden_size", "vit_hidden_size")
    MAY_BE_ZERO = ("type_vocab_size",)

    def __post_init__(self):
        problems = self._type_problems()
        if not problems:
            self.text_hidden_size = self.hidden_size if self.text_hidden_size is None else self.text_hidden_size
            self.vit_hidden_size = self.hidden_size if self.vit_hidden_size is None else self.vit_hidden_size
            problems = self._value_problems()
            for key, count in (("text_enc_layers", self.text_num_hidden_layers), ("grounding_enc_layers", self.num_hidden_layers)):
                try:
                    setattr(self, key, parse_layers(getattr(self, key), count, key))
                except ConfigError as error:
                    problems.extend(error.problems)
        if problems:
            raise ConfigError(problems, "model config")

    def _value_problems(self):
        problems = self._range_problems()
        if problems:
            return problems
        for prefix in ("", "text_", "vit_"):
            heads = getattr(self, f"{prefix}num_attention_heads")
            if self.hidden_size % heads:
                problems.append(f"{prefix}num_attention_heads: {heads} does not divide hidden_size {self.hidden_size}")
            if prefix and getattr(self, f"{prefix}hidden_size") != self.hidden_size:
                problems.append(f"{prefix}hidden_size: must equal hidden_size {self.hidden_size} (all three encoders share one width), "
                                f"is {getattr(self, f'{prefix}hidden_size')}")
        if self.image_size % self.resolution:
            nearest = max(1, round(self.image_size / self.resolution)) * self.resolution
            problems.append(f"image_size: {self.image_size} is not a multiple of the patch size (resolution) {self.resolution}; "
                            f"for example {nearest} is")
        if self.model_type == "grounded" and self.topk_value > self.num_codebook:
            problems.append(f"topk_value: {self.topk_value} is larger than the codebook (num_codebook {self.num_codebook})")
        if self.cmcl_share_parameters and self.with_cmcl_projection and not (
                self.with_grounding_projection and self.model_type == "grounded"):
            problems.append("cmcl_share_parameters: shares the grounding projections, so with_grounding_projection must be true "
                            "and model_type grounded")
        if self.with_grounding_pos and self.topk_value + 2 > self.text_max_position_embeddings:
            problems.append(f"with_grounding_pos: {self.topk_value} grounded tokens need {self.topk_value + 2} text positions, "
                            f"text_max_position_embeddings is {self.text_max_position_embeddings}")
        return problems

    @property
    def grid(self) -> int:
        """Patches per side of an image of ``image_size``."""
        return self.image_size // self.resolution

    @property
    def num_patches(self) -> int:
        """Patches of an image of ``image_size``."""
        return self.grid ** 2


@dataclass
class UnimoConfig(ModelConfig):
    """Shapes and switches of UNIMO (the first system).

    The keys are those of the authors' JSON files (reference notes, section 1.1) and, as in their command lines, ``weight_sharing``,
    ``role_type_size`` and ``turn_type_size`` (3 and 16 for dialogue, 0: no such tables). Defaults are the base model.
    ``type_vocab_size``, ``num_labels``, ``fusion_method``, ``max_pixel_len``, ``max_pixel_position_embeddings``, ``image_attr_size``,
    ``image_use_attr``, ``use_neg_lm_loss`` and ``similarity_method`` are accepted because the files contain them; the released code does not use them.
    The mask ratios, ``overlap_ratio``, ``image_class_size`` and the other ``image_*`` switches say how the authors pre-trained;
    ``max_img_len`` (regions with the global one) and ``max_obj_len`` are the limits of the readers.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    vocab_size: int = 50265
    max_position_embeddings: int = 514
    type_vocab_size: int = 0
    initializer_range: float = 0.02
    image_embedding_size: int = 2048
    image_class_size: int = 1601
    image_attr_size: int = 401
    image_predict_feature: bool = True
    image_predict_class: bool = True
    image_use_attr: bool = False
    image_use_soft_label: bool = True
    max_img_len: int = 37
    max_obj_len: int = 50
    max_pixel_len: int = 256
    max_pixel_position_embeddings: int = 196
    txt_mask_ratio: float = 0.15
    vl_mask_ratio: float = 0.15
    scenegraph_mask_ratio: float = 0.3
    overlap_ratio: float = 0.4
    similarity_method: str = "softmax"
    fusion_method: str = "mul"
    use_neg_lm_loss: bool = False
    num_labels: int = 2
    weight_sharing: bool = True
    role_type_size: int = 0
    turn_type_size: int = 0

    MAY_BE_ZERO = ("type_vocab_size", "role_type_size", "turn_type_size")

    def __post_init__(self):
        problems = self._type_problems() or self._value_problems()
        if problems:
            raise ConfigError(problems, "model config")

    def _value_problems(self):
        problems = self._range_problems()
        if not problems and self.hidden_size % self.num_attention_heads:
            problems.append(f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size}")
        if (self.role_type_size == 0) != (self.turn_type_size == 0):
            problems.append(f"role_type_size: {self.role_type_size} and turn_type_size {self.turn_type_size}: give both (dialogue) or neither")
        return problems

    @property
    def dialog(self) -> bool:
        """Whether text has roles and turns."""
        return self.role_type_size > 0

    @property
    def text_vocab_size(self) -> int:
        """The vocabulary's size under UNIMO-2's name, so that tasks on text need not ask which system they have."""
        return self.vocab_size

    @property
    def text_max_position_embeddings(self) -> int:
        """Text positions under UNIMO-2's name."""
        return self.max_position_embeddings


def config_class(values):
    """Which of the two configs a mapping of keys is for: UNIMO's says ``vocab_size`` where UNIMO-2's says ``text_vocab_size``."""
    return UnimoConfig if "vocab_size" in values and "text_vocab_size" not in values else Unimo2Config


def load_config(given, source="model config", **overrides):
    """The config of either system from a config (as it is), a mapping, or the path of a JSON file; ``overrides`` replace single keys.

    Raises:
        ConfigError: unreadable file, unknown keys or values that do not fit together.
    """
    if isinstance(given, ModelConfig):
        return given
    values, source = (given, source) if isinstance(given, dict) else (_read_json(given), str(given))
    return config_class(values).from_dict(values, source=source, **overrides)
