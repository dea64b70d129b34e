"""What a model computes for predictions, as programs: named arrays in, named arrays out.

A program is a Layer that ``unimo2 export`` traces. The same Layers run the predictions of a checkpoint directory, so that both give the same
results by the same code around them. Sizes that differ from call to call (batch, length, regions, beams) are open.

====================  ==========================================================================================
model                 programs
====================  ==========================================================================================
classifiers           ``logits``: a picture, a text or both
retrieval, UNIMO-2    ``image`` and ``text`` (the dual encoder), ``match`` (pairs of their outputs), ``pair`` (the joint scorer)
retrieval, UNIMO      ``pair``
captions, texts       ``prefix`` (picture, object tags or source text, and the first token), ``step`` (one more token per beam)
====================  ==========================================================================================

Pixels are uint8 and are normalised inside the program.
"""
from typing import NamedTuple, Tuple

import numpy as np
import paddle
from paddle import nn

from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.generation import PrefixCache, SingleStreamCache
from unimo2_paddle.tasks.captioners import TAGS
from unimo2_paddle.tasks.classification import classifier_logits
from unimo2_paddle.tasks.retrieval_scoring import EncodedImages, EncodedTexts, contrastive_scores, encode_captions, encode_pictures, matching_logits
from unimo2_paddle.tasks.unimo_inputs import image_inputs

TEXT = ("input_ids", "position_ids", "text_mask")


class Input(NamedTuple):
    """One input of a program; an open size of ``shape`` is the name of what it counts."""

    name: str
    dtype: str
    shape: Tuple


def image_specs(config):
    """The inputs that are a picture."""
    if isinstance(config, UnimoConfig):
        return [Input("image_features", "float32", ("batch", "regions", config.image_embedding_size)),
                Input("image_location", "float32", ("batch", "regions", 5)), Input("image_mask", "float32", ("batch", "regions"))]
    return [Input("image", "uint8", ("batch", config.image_size, config.image_size, 3))]


def text_specs(roles=False):
    """The inputs that are a text; ``roles``: of a dialogue."""
    names = [*TEXT, *(("role_ids", "turn_ids") if roles else ())]
    return [Input(name, "float32" if name == "text_mask" else "int64", ("batch", "length")) for name in names]


@paddle.jit.not_to_static
def _computed(program, batch):
    """``program.compute``, traced as it is: nothing here branches on a tensor's value, and Paddle's rewriting of the source is slow."""
    return program.compute(batch)


class Program(nn.Layer):
    """One computation.

    Attributes:
        inputs: list of :class:`Input`; outputs: names of what :meth:`compute` returns.
    """

    def __init__(self, model, inputs, outputs):
        super().__init__()
        self.model, self.inputs, self.outputs = model, list(inputs), list(outputs)

    def forward(self, batch):
        """Tensors in the order of ``outputs``; ``batch``: tensors by the names of ``inputs``."""
        return _computed(self, batch)

    def compute(self, batch):
        raise NotImplementedError


class Logits(Program):
    """Logits ``[B, C]`` of a classifier."""

    def __init__(self, model, config, inputs):
        specs = (image_specs(config) if inputs != "text" else []) + (text_specs() if inputs != "image" else [])
        super().__init__(model, specs, ["logits"])

    def compute(self, batch):
        return [classifier_logits(self.model, batch)]


def _codes(model):
    return ["code_scores"] if model.grounded and model.dictionary.method == "topk" else []


class ImageEncoder(Program):
    """Of every picture: states ``[B, 1+P, H]``, contrastive feature ``[B, H]``, its part of the code scores ``[B, C]``."""

    def __init__(self, model):
        super().__init__(model, image_specs(model.config), ["states", "features", *_codes(model)])

    def compute(self, batch):
        return [value for value in encode_pictures(self.model, batch["image"]) if value is not None]


class TextEncoderProgram(Program):
    """Of every text: states ``[B, L, H]``, contrastive feature ``[B, H]``, its part of the code scores ``[B, C]``."""

    def __init__(self, model):
        super().__init__(model, text_specs(), ["states", "features", *_codes(model)])

    def compute(self, batch):
        found = encode_captions(self.model, *(batch[name] for name in TEXT))
        return [value for value in (found.states, found.features, found.code_scores) if value is not None]


class Matcher(Program):
    """Matching logits ``[B, 2]`` of row n of both encoders' outputs."""

    def __init__(self, model):
        config, patches = model.config, (model.config.image_size // model.config.resolution) ** 2
        specs = [Input("image_states", "float32", ("batch", 1 + patches, config.hidden_size)),
                 Input("text_states", "float32", ("batch", "length", config.hidden_size)), Input("text_mask", "float32", ("batch", "length"))]
        specs += [Input(f"{side}_code_scores", "float32", ("batch", config.num_codebook)) for side in ("image", "text") if _codes(model)]
        super().__init__(model, specs, ["matching_logits"])

    def compute(self, batch):
        images = EncodedImages(batch["image_states"], None, batch.get("image_code_scores"))
        texts = EncodedTexts(batch["text_states"], batch["text_mask"], None, batch.get("text_code_scores"))
        return [matching_logits(self.model, images, texts)]


class PairScorer(Program):
    """The score of every picture with its text: UNIMO-2's with matching logits ``[B, 2]`` and contrastive score ``[B]``, UNIMO's alone."""

    def __init__(self, model):
        self.regions = isinstance(model.config, UnimoConfig)
        super().__init__(model, image_specs(model.config) + text_specs(), ["score"] if self.regions else ["score", "matching_logits", "contrastive"])

    def compute(self, batch):
        texts = {name: batch[name] for name in TEXT}
        if self.regions:
            return [self.model.matching_score(self.model(**image_inputs(batch), **texts, first_only=True))]
        images, texts = encode_pictures(self.model, batch["image"]), encode_captions(self.model, **texts)
        logits, contrastive = matching_logits(self.model, images, texts), contrastive_scores(images, texts)
        return [logits[:, 1] + self.model.config.cmcl_score_weight * contrastive, logits, contrastive]


class _Decoder(Program):
    """What ``prefix`` and ``step`` share: the decoding cache as arrays.

    Per stack of layers the prefix's keys and values ``[B, layers, S, N, D]`` and the beams' own ``[B, K, layers, T, N, D]``; biases over the
    prefix ``[B, 1, 1, S]``.
    """

    def kind(self):
        return SingleStreamCache if isinstance(self.model.config, UnimoConfig) else PrefixCache

    def state_names(self, which, with_prefix):
        """Names of the cache's arrays: ``own`` and ``prefix`` of each stack."""
        stacks = self.kind()(self.model).stacks
        return [f"{stack}_{which}_{part}" for stack in stacks if which == "own" or stack in with_prefix for part in ("keys", "values")]


class Prefix(_Decoder):
    """Encodes what a text goes on from and reads its first token; the first token's logits ``[B, K, V]`` and the cache.

    Args:
        model: with the masked_lm head; specs: inputs besides ``tokens`` int64 ``[B, K]``; pictures: whether there is a picture, else the text is
            the source; attend_padded_tags: see ``Decoding``.
    """

    def __init__(self, model, specs, pictures, attend_padded_tags=False):
        super().__init__(model, [*specs, Input("tokens", "int64", ("batch", "beams"))], [])
        self.pictures, self.attend = pictures, attend_padded_tags
        single = isinstance(model.config, UnimoConfig)
        tagged = len(specs) > len(image_specs(model.config)) if pictures else True
        # without tags UNIMO-2's text encoder has no prefix
        self.with_prefix = ["encoder"] if single else ["text", "grounded"] if tagged else ["grounded"]
        self.biases = ["bias"] if single else ["text_bias"] * tagged + ["grounded_bias"] * (tagged and not attend_padded_tags)
        self.outputs = ["logits", *self.state_names("own", self.with_prefix), *self.state_names("prefix", self.with_prefix), *self.biases]

    def compute(self, batch):
        cache = self._encoded(batch)
        logits, found = cache.step(batch["tokens"], 0), []
        for stack in cache.stacks.values():
            found += _stacked(stack, "own", 2)
        for name in self.with_prefix:
            found += _stacked(cache.stacks[name], "prefix", 1)
        return [logits, *found, *(getattr(cache, name) for name in self.biases)]

    def _encoded(self, batch):
        tags = {name: batch[own] for name, own in TAGS.items() if own in batch}
        if isinstance(self.model.config, UnimoConfig):
            texts = {name: batch[name] for name in (*TEXT, "role_ids", "turn_ids") if name in batch}
            return SingleStreamCache.encode(self.model, {**image_inputs(batch), **tags, **texts})
        source = tuple(tags.values()) if self.pictures else tuple(batch[name] for name in TEXT)
        return PrefixCache.encode(self.model, self.model.encode_image(image_inputs(batch)["image"]) if self.pictures else None, source or None,
                                  self.attend)


class Step(_Decoder):
    """One more token per beam: ``tokens`` int64 ``[B, K]``, the text's number ``step`` int64 ``[1]``, and the cache; logits and the own part."""

    def __init__(self, prefix):
        model, config = prefix.model, prefix.model.config
        own, before = (prefix.state_names(which, prefix.with_prefix) for which in ("own", "prefix"))
        specs = [Input("tokens", "int64", ("batch", "beams")), Input("step", "int64", (1,))]
        for name in [*own, *before]:
            layers = len(prefix.kind()(model).stacks[name.split("_")[0]])
            heads = config.text_num_attention_heads if name.startswith("text") else config.num_attention_heads
            sizes = ("beams", layers, "generated") if "_own_" in name else (layers, "prefix" if name.startswith("encoder") else name.split("_")[0] + "_prefix")
            specs.append(Input(name, "float32", ("batch", *sizes, heads, config.hidden_size // heads)))
        specs += [Input(name, "float32", ("batch", 1, 1, name.replace("bias", "prefix"))) for name in prefix.biases]
        super().__init__(model, specs, ["logits", *own])
        self.with_prefix, self.biases = prefix.with_prefix, prefix.biases

    def compute(self, batch):
        cache, found = self.kind()(self.model), []
        for name, stack in cache.stacks.items():
            for number, layer in enumerate(stack):
                layer.own = tuple(batch[f"{name}_own_{part}"][:, :, number] for part in ("keys", "values"))
                if name in self.with_prefix:
                    layer.prefix = tuple(batch[f"{name}_prefix_{part}"][:, number] for part in ("keys", "values"))
        for name in self.biases:
            setattr(cache, name, batch[name])
        logits = cache.step(batch["tokens"], batch["step"])
        for stack in cache.stacks.values():
            found += _stacked(stack, "own", 2)
        return [logits, *found]


def _stacked(layers, which, axis):
    """Keys and values of all layers of a stack as two arrays."""
    return [paddle.stack([getattr(layer, which)[part] for layer in layers], axis=axis) for part in (0, 1)]


def retrieval_programs(model):
    """The programs of a model that scores pairs."""
    if isinstance(model.config, UnimoConfig):
        return {"pair": PairScorer(model)}
    return {"image": ImageEncoder(model), "text": TextEncoderProgram(model), "match": Matcher(model), "pair": PairScorer(model)}


def caption_programs(model, tagged, attend_padded_tags):
    """The programs of a captioner; ``tagged``: it reads object tags."""
    tags = [Input(name, "float32" if name == "tag_mask" else "int64", ("batch", "tags")) for name in TAGS.values()] if tagged else []
    prefix = Prefix(model, image_specs(model.config) + tags, True, attend_padded_tags)
    return {"prefix": prefix, "step": Step(prefix)}


def writer_programs(model, roles):
    """The programs of a model that writes text from text."""
    prefix = Prefix(model, text_specs(roles), False)
    return {"prefix": prefix, "step": Step(prefix)}


class LayerPrograms:
    """Programs of a model in memory, in the dynamic graph."""

    engine = "dynamic"

    def __init__(self, programs):
        self.programs = programs

    @paddle.no_grad()
    def run(self, name, batch):
        """Outputs by name, numpy arrays; ``batch``: numpy arrays with at least the program's inputs."""
        program = self.programs[name]
        found = program({spec.name: paddle.to_tensor(batch[spec.name]) for spec in program.inputs})
        return {output: value.numpy() for output, value in zip(program.outputs, found)}


class StoredCache:
    """Decoding by programs: what ``PrefixCache`` is for a model in memory.

    Args:
        programs: with ``run``, of a captioner or writer; batch: the inputs of ``prefix`` besides ``tokens``; start_id: [CLS].
    """

    def __init__(self, programs, batch):
        self.programs, self.batch, self.state = programs, batch, None

    def step(self, tokens, step):
        """As ``PrefixCache.step``."""
        tokens = tokens.numpy()
        if step == 0:
            found = self.programs.run("prefix", {**self.batch, "tokens": tokens})
            self.state = found
        else:
            found = self.programs.run("step", {**self.state, "tokens": tokens, "step": np.array([step], "int64")})
            self.state.update(found)
        return paddle.to_tensor(found["logits"])

    def select(self, images, parents):
        """As ``LayerCache.select``."""
        parents = parents.numpy()
        for name, value in self.state.items():
            if "_own_" in name:
                self.state[name] = value.reshape(-1, *value.shape[2:])[parents]
            elif images is not None and name != "logits":
                self.state[name] = value[images.numpy()]
