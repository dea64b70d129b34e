"""Predictions from a checkpoint directory alone: what ``best/`` of a finetuning run holds is enough."""
import hashlib
import os
from typing import Any, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import paddle

from unimo2_paddle.checkpoints.pretrained import checkpoint_path
from unimo2_paddle.checkpoints.zoo import PREFIX
from unimo2_paddle.data.collate import FIRST_POSITION, text_arrays, with_special_tokens
from unimo2_paddle.data.formats.regions import RegionRecord
from unimo2_paddle.data.formats.seq2seq import SEPARATOR
from unimo2_paddle.data.images import decode_image, resize_image
from unimo2_paddle.data.prompts import read_templates
from unimo2_paddle.data.region_store import Regions
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import CheckpointError, ImageError, UserInputError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.generation import Decoding, search
from unimo2_paddle.paths import PathLike
from unimo2_paddle.serving.engine import ExportedPrograms, is_exported
from unimo2_paddle.serving.programs import LayerPrograms, Logits, StoredCache, caption_programs, retrieval_programs, writer_programs
from unimo2_paddle.serving.results import Answered, Captioned, Classified, Matched, Scored, Written
from unimo2_paddle.tasks.base import ModelSection, build_backbone, check_vocabulary, to_tensors
from unimo2_paddle.tasks.captioners import captioner_of
from unimo2_paddle.tasks.classification import build_classifier
from unimo2_paddle.tasks.finetune import TASK_FILE, read_task_file, softmax
from unimo2_paddle.tasks.glue import encode_text
from unimo2_paddle.tasks.imagenet import centre_crop
from unimo2_paddle.tasks.retrieval_scoring import EncodedImages, EncodedTexts, contrastive_scores
from unimo2_paddle.tasks.seq2seq import hypothesis_text, write_texts
from unimo2_paddle.tasks.seq2seq_data import encode_parts, max_turns, pack_dialog, pack_source, source_arrays
from unimo2_paddle.tasks.unimo_inputs import MAX_REGIONS, RegionPictures, image_arrays
from unimo2_paddle.tasks.zeroshot import encode_classes

FIELDS = ("image", "text", "text_b")
ALIASES = {"question": "text", "hypothesis": "text", "sentence": "text", "text_a": "text"}

Result = Union[Answered, Captioned, Classified, Matched, Scored, Written]


class Request(NamedTuple):
    """One checked input: a uint8 picture ``[S, S, 3]`` (UNIMO: ``Regions``) and texts, where given."""

    image: Union[np.ndarray, Regions, None]
    text: Optional[str]
    text_b: Optional[str]


class Predictor:
    """The model of a checkpoint directory, or what ``unimo2 export`` made of it, with everything around it.

    Args:
        directory: ``best/`` of a finetuning run (any task), or a pre-trained model with its vocabulary, which scores pairs; or such a model's
            name in the zoo, as ``zoo:NAME``; or an exported model.
        top: how many classes or answers a result names.
        regions: for models of UNIMO, a store of region features in which pictures are looked up by name.
        engine: what runs an exported model, "paddle" (paddle.inference) or "onnx" (onnxruntime).

    Raises:
        CheckpointError: the directory is no such checkpoint, or is damaged.
        DataError: there is no such store, or its features have another width than the model reads.

    A predictor is called with an image (file, bytes of a file, or uint8 array ``[H, W, 3]`` RGB; for a model of UNIMO a picture's name in the
    store, or its ``Regions`` or ``RegionRecord``) and texts, as its task needs::

        Predictor("output/vqa/best")(image="a.jpg", question="What is on the table?").answer
    """

    def __init__(self, directory: PathLike, top: int = 5, regions: Optional[PathLike] = None,
                 engine: str = "paddle") -> None:
        self.directory = os.fspath(directory)
        if self.directory.startswith(PREFIX):
            self.directory = checkpoint_path(self.directory)
        if not os.path.isdir(self.directory):
            raise CheckpointError(f"{self.directory} is not a directory; give the best/ directory of a finetuning run")
        if top < 1:
            raise UserInputError(f"top: must be at least 1, is {top}")
        self.about = read_task_file(self.directory) if os.path.isfile(os.path.join(self.directory, TASK_FILE)) else {"task": "retrieval"}
        self.task = self.about.get("task")
        if self.task not in PREDICTORS:
            raise CheckpointError(f"{self.directory}: no predictions for task {self.task!r}; there are some for {', '.join(PREDICTORS)}")
        exported = ExportedPrograms(self.directory, engine) if is_exported(self.directory) else None
        self.exported = exported is not None
        try:
            self.kind = PREDICTORS[self.task](self.directory, self.about, top, exported)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{os.path.join(self.directory, TASK_FILE)}: not as this version writes it ({type(error).__name__}: {error}); "
                                  "finetune again, or use the version that wrote it") from None
        if regions is not None:
            if not self.kind.reads_regions:
                raise UserInputError(f"{self.directory}: this {self.task} model reads no region features; leave regions out")
            self.kind.regions = RegionPictures(os.fspath(regions), self.kind.config, self.kind.max_regions)

    @property
    def needs(self) -> Sequence[str]:
        """Names of the inputs that a prediction must have."""
        return self.kind.needs

    def __call__(self, image: Any = None, text: Optional[str] = None, text_b: Optional[str] = None, **aliases: Any) -> Result:
        """The result for one input; ``question``, ``hypothesis`` and ``sentence`` are other names of ``text``.

        Returns:
            a type of :mod:`unimo2_paddle.serving.results`.

        Raises:
            UserInputError: an input is missing or not wanted; ImageError: the picture cannot be read.
        """
        given = {"image": image, "text": text, "text_b": text_b, **aliases}
        return self.predict_batch([{name: value for name, value in given.items() if value is not None}])[0]

    def predict_batch(self, requests: Iterable[Mapping[str, Any]], batch_size: int = 32, names: Sequence[str] = ()) -> List[Result]:
        """The results of many inputs, in order.

        Args:
            requests: iterable of mappings with the arguments of a call; batch_size: inputs per forward.
            names: what to call the requests in messages; default: "request 1" ...

        Raises:
            as a call, naming the request.
        """
        results, pending = [], []
        for number, request in enumerate(requests):
            pending.append(self.check(request, names[number] if names else f"request {number + 1}"))
            if len(pending) == batch_size:
                results += self.run(pending)
                pending = []
        return results + (self.run(pending) if pending else [])

    def classify(self, images: Iterable[Any], classes: Iterable[str], templates: Union[str, Sequence[str]] = "photos",
                 batch_size: int = 32) -> List[Classified]:
        """Zero-shot classification: each picture belongs to the class whose sentences' contrastive features fit it best.

        Args:
            images: pictures as in a call; classes: names; templates: a bundled list (photos, shapes), a file, or a list of sentences
                with ``{}``; batch_size: pictures per forward.

        Returns:
            a ``Classified`` per picture; probabilities are the softmax of features' products over the learnt temperature.

        Raises:
            UserInputError: not a model for pairs, or no two different classes; ImageError: a picture cannot be read.
        """
        classes = list(classes)
        if self.task != "retrieval" or self.kind.reads_regions:
            raise UserInputError(f"{self.directory} is a model {'of UNIMO ' * self.kind.reads_regions}for {self.task}; "
                                 "zero-shot classes need a pre-trained model or one for retrieval")
        if len(set(classes)) < 2 or len(set(classes)) < len(classes) or not all(isinstance(name, str) and name.strip() for name in classes):
            raise UserInputError("classes: give at least two different, non-empty names")
        if isinstance(templates, str):
            templates = read_templates(templates)
        pictures = [self.kind.picture(read_picture(image, f"image {number + 1}: ")) for number, image in enumerate(images)]
        results = []
        with paddle.no_grad():
            features, _ = encode_classes(self.kind.encode_texts, self.kind.tokenizer, classes, templates, self.kind.max_text_len)
            for first in range(0, len(pictures), batch_size):
                results += self.kind.classified(np.stack(pictures[first: first + batch_size]), features, classes)
        return results

    def run(self, requests: Sequence[Request]) -> List[Result]:
        """The results of a list of requests that :meth:`check` returned, in one forward."""
        with paddle.no_grad():
            return self.kind.predict(requests)

    def check(self, request: Mapping[str, Any], name: str = "request") -> Request:
        """A mapping with the arguments of a call as a :class:`Request`: complete, its picture decoded; messages call it ``name``.

        Raises:
            as a call.
        """
        where, values = f"{name}: ", {}
        for name, value in request.items():
            field = ALIASES.get(name, name)
            if field not in FIELDS:
                raise UserInputError(f"{where}unknown input {name!r}; known: {', '.join((*FIELDS, *ALIASES))}")
            if field in values:
                raise UserInputError(f"{where}{field} is given twice ({', '.join(n for n in request if ALIASES.get(n, n) == field)})")
            values[field] = value
        missing = [field for field in self.kind.needs if values.get(field) is None]
        unwanted = [field for field in values if field not in self.kind.needs and field not in self.kind.optional]
        if missing or unwanted:
            told = [f"needs {' and '.join(missing)}"] * bool(missing) + [f"takes no {' and no '.join(unwanted)}"] * bool(unwanted)
            raise UserInputError(f"{where}the {self.task} model {', and '.join(told)}")
        for field in ("text", "text_b"):
            if values.get(field) is not None and not isinstance(values[field], str):
                raise UserInputError(f"{where}{field} must be a text, is {type(values[field]).__name__}")
        if values.get("image") is not None:
            values["image"] = self.kind.read_picture(values["image"], where)
        return Request(*(values.get(field) for field in FIELDS))


def read_picture(image, where=""):
    """A picture as uint8 ``[H, W, 3]`` RGB from a path, the bytes of a file, or such an array.

    Raises:
        ImageError: it cannot be read; the message begins with ``where``.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ImageError(f"{where}an image array must be uint8 [H, W, 3] in RGB order, is {image.dtype} {list(image.shape)}")
        return image
    if not isinstance(image, (str, bytes, os.PathLike)):
        raise ImageError(f"{where}image must be a path, the bytes of a file or an array, is {type(image).__name__}")
    try:
        return decode_image(image)
    except ImageError as error:
        raise ImageError(f"{where}{error}") from None


class _Kind:
    """How one kind of task predicts. ``needs`` and ``optional`` are the inputs it takes.

    What the model computes are ``programs`` (see :mod:`unimo2_paddle.serving.programs`), of the model in memory or of an exported one, whose
    ``model`` is ``None``; everything else is here.
    """

    needs, optional = (), ()
    model = _fingerprint = None

    def __init__(self, directory, about, top, exported=None):
        self.section, self.top, self.about = ModelSection(init=directory), top, about
        if not os.path.isfile(os.path.join(directory, "config.json")):
            raise CheckpointError(f"{directory} has no config.json; give the best/ directory of a finetuning run")
        self.config = self.section.model_config()
        self.tokenizer = None
        if self.takes("text"):
            vocab = os.path.join(directory, "vocab")
            self.tokenizer = Tokenizer.from_directory(vocab)
            check_vocabulary(self.tokenizer, self.config, vocab)
        self.regions, self.max_regions = None, int(about.get("max_regions", MAX_REGIONS))
        self.max_text_len = int(about.get("max_text_len", self.config.text_max_position_embeddings - FIRST_POSITION))
        self.prepare()
        self.programs = exported
        if exported is None:
            self.model = self.build()
            self.model.eval()
            self.programs = LayerPrograms(self.model_programs())

    def takes(self, field):
        return field in self.needs or field in self.optional

    def prepare(self):
        """Read what the task file tells."""

    def build(self):
        """The model with its weights."""
        raise NotImplementedError

    def model_programs(self):
        """The model's programs by name."""
        raise NotImplementedError

    def fingerprint(self):
        """A text that is the same for the same weights, wherever they lie."""
        if self.model is None:
            return self.programs.about["fingerprint"]
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for parameter in sorted(self.model.parameters(), key=lambda p: p.name):
                digest.update(parameter.name.encode() + parameter.numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def predict(self, requests):
        """Results of a list of :class:`Request`, under ``no_grad``."""
        raise NotImplementedError

    @property
    def reads_regions(self):
        """Whether pictures are a detector's regions (UNIMO), not pixels."""
        return isinstance(self.config, UnimoConfig) and self.takes("image")

    def read_picture(self, image, where):
        """A picture as the model reads it; messages begin with ``where``."""
        return self.find_regions(image, where) if self.reads_regions else self.picture(read_picture(image, where))

    def find_regions(self, image, where):
        """The ``Regions`` of a picture from its name in the store, or from a record.

        Raises:
            UserInputError: neither of these, or features of another width; DataError: the store has no such picture.
        """
        if isinstance(image, (str, int)) and not isinstance(image, bool):
            if self.regions is None:
                raise UserInputError(f"{where}a model of UNIMO reads region features: name their store (Predictor(..., regions=DIR), predict "
                                     "--regions DIR), or give the picture's Regions")
            return self.regions.get(str(image))
        if not isinstance(image, (Regions, RegionRecord)):
            raise UserInputError(f"{where}image must be the name of a picture in the store of region features, Regions or a RegionRecord, is "
                                 f"{type(image).__name__}")
        width = self.config.image_embedding_size
        if not len(image.features) or image.features.shape[1] != width:
            raise UserInputError(f"{where}features are {list(image.features.shape)}, the model needs at least one region of {width}")
        return Regions(getattr(image, "key", "") or image.image_id, image.width, image.height, image.features, image.boxes)

    def picture(self, image):
        """A decoded picture at the model's size."""
        return resize_image(image, self.config.image_size)

    def text_batch(self, requests):
        """Padded arrays of the requests' texts."""
        return text_arrays([with_special_tokens(self.tokenizer.encode(request.text), self.tokenizer, self.max_text_len) for request in requests],
                           self.tokenizer.pad_id)

    def batch(self, requests):
        """The arrays of a batch: pictures and texts as the task has them."""
        arrays = self.text_batch(requests) if self.takes("text") else {}
        if self.takes("image"):
            arrays.update(image_arrays([request.image for request in requests], self.max_regions or None))
        return arrays


class _Classifier(_Kind):
    """Everything with one fully connected layer on top; subclasses name classes and inputs."""

    inputs = "pair"

    def classes(self):
        """Names of the head's outputs."""
        return list(self.about["labels"])

    def prepare(self):
        self.names = self.classes()

    def build(self):
        return build_classifier(self.section, 0, self.config, self.inputs, max(1, len(self.names)), 0.0, new_head=False,
                                layout=self.about.get("layout", "pair"), contrastive=bool(self.about.get("contrastive", False)))

    def model_programs(self):
        return {"logits": Logits(self.model, self.config, self.inputs)}

    def logits(self, requests):
        """Logits float64 ``[N, C]``."""
        return self.programs.run("logits", self.batch(requests))["logits"].astype("float64")

    def best(self, probabilities):
        """The ``top`` best classes of one row as ``{name: probability}``, best first."""
        order = np.argsort(-probabilities, kind="stable")[: self.top]
        return {self.names[i]: round(float(probabilities[i]), 6) for i in order}

    def predict(self, requests):
        results = []
        for row in softmax(self.logits(requests)):
            best = self.best(row)
            label = next(iter(best))
            results.append(Classified(label, best[label], best))
        return results


class _Entailment(_Classifier):
    needs = ("image", "text")


class _Vqa(_Classifier):
    needs = ("image", "text")

    def classes(self):
        return list(self.about["answers"])

    def predict(self, requests):
        results = []
        for row in self.logits(requests):
            best = self.best(1.0 / (1.0 + np.exp(-row)))
            answer = next(iter(best))
            results.append(Answered(answer, best[answer], best))
        return results


class _Glue(_Classifier):
    inputs = "text"
    needs, optional = ("text",), ("text_b",)

    def prepare(self):
        self.needs, self.optional = (("text", "text_b"), ()) if self.about["pair"] else (("text",), ())
        super().prepare()

    def text_batch(self, requests):
        return text_arrays([encode_text(self.tokenizer, request.text, request.text_b, self.max_text_len) for request in requests], self.tokenizer.pad_id)

    def predict(self, requests):
        if self.names:
            return super().predict(requests)
        return [Scored(round(float(score), 4)) for score in self.logits(requests)[:, 0]]


class _Image(_Classifier):
    inputs = "image"
    needs = ("image",)

    def classes(self):
        return list(self.about["names"])

    def picture(self, image):
        return centre_crop(image, self.config.image_size, float(self.about["centre_crop"]))


class _Caption(_Kind):
    """Captions; for a model trained with object tags the text holds the tags, as words."""

    needs, optional = ("image",), ("text",)

    def prepare(self):
        self.needs, self.optional = (("image", "text"), ()) if self.about["object_tags"] else (("image",), ())
        self.decoding = Decoding(**self.about["decoding"])
        self.word_starts = self.tokenizer.word_start_table() if self.decoding.block_trigrams else None

    def build(self):
        # a captioner of the authors lacks the contrastive temperature, and captions do not need it
        self.section.allow_missing = ["cmcl_temperature"]
        return build_backbone(self.section, 0, self.config, heads=("masked_lm",))

    def model_programs(self):
        return caption_programs(self.model, self.takes("text"), self.decoding.attend_padded_tags)

    def predict(self, requests):
        batch = self.batch(requests)
        if self.takes("text"):
            batch.update(tag_ids=batch.pop("input_ids"), tag_positions=batch.pop("position_ids"), tag_mask=batch.pop("text_mask"))
        if self.model is None:
            found = search(StoredCache(self.programs, batch), len(requests), self.tokenizer.cls_id, self.tokenizer.sep_id, self.decoding, self.word_starts)
        else:
            found = captioner_of(self.config).generate(self.model, to_tensors(batch), self.tokenizer, self.decoding, self.word_starts)
        results = []
        for hypotheses in found:
            texts = [self.tokenizer.decode(hypothesis.ids).strip() for hypothesis in hypotheses]
            results.append(Captioned(texts[0], round(float(hypotheses[0].scores[-1]), 6), texts[1: self.top]))
        return results


class _Seq2Seq(_Kind):
    """Text from text; of a dialogue the text holds the turns, ``[SEP]`` between them, and the second text is the passage."""

    needs = ("text",)

    def prepare(self):
        self.dialog, self.longest = bool(self.about["dialog"]), int(self.about["max_source_len"])
        self.optional = ("text_b",) if self.dialog else ()
        self.roles = getattr(self.config, "dialog", False)
        self.decoding = Decoding(**self.about["decoding"])
        self.word_starts = self.tokenizer.word_start_table() if self.decoding.block_trigrams else None

    def build(self):
        return build_backbone(self.section, 0, self.config, vision=False, heads=("masked_lm",))

    def model_programs(self):
        return writer_programs(self.model, self.roles)

    def source(self, request):
        if not self.dialog:
            return pack_source([(encode_parts(request.text, self.tokenizer), 0, 0)], self.tokenizer, self.longest)
        knowledge = self.tokenizer.encode(request.text_b) if request.text_b else None
        turns = [self.tokenizer.encode(turn) for turn in request.text.split(SEPARATOR)]
        return pack_dialog(turns, knowledge, self.tokenizer, self.longest, max_turns(self.config))

    def predict(self, requests):
        batch = source_arrays([self.source(request) for request in requests], self.tokenizer.pad_id, self.roles)
        if self.model is None:
            found = search(StoredCache(self.programs, batch), len(requests), self.tokenizer.cls_id, self.tokenizer.mask_id, self.decoding, self.word_starts)
        else:
            found = write_texts(self.model, to_tensors(batch), self.tokenizer, self.decoding, self.word_starts)
        results = []
        for hypotheses in found:
            texts = [hypothesis_text(hypothesis, self.tokenizer) for hypothesis in hypotheses]
            results.append(Written(texts[0], round(float(hypotheses[0].scores[-1]), 6), texts[1: self.top]))
        return results


class _Retrieval(_Kind):
    """Scores of pairs; searching a collection is :mod:`unimo2_paddle.serving.index`."""

    needs = ("image", "text")

    def build(self):
        return build_backbone(self.section, 0, self.config, heads=("pooling", "matching"))

    def model_programs(self):
        return retrieval_programs(self.model)

    def predict(self, requests):
        found = self.programs.run("pair", self.batch(requests))
        if self.reads_regions:
            return [Matched(float(score)) for score in found["score"]]
        return self._matched(found["matching_logits"], found["contrastive"])

    def encode_images(self, images):
        """``EncodedImages`` of uint8 pictures ``[N, S, S, 3]``."""
        found = to_tensors(self.programs.run("image", {"image": images}))
        return EncodedImages(found["states"], found["features"], found.get("code_scores"))

    def encode_texts(self, input_ids, position_ids, text_mask):
        """``EncodedTexts`` of padded texts, tensors or arrays ``[N, L]``."""
        arrays = {"input_ids": np.asarray(input_ids), "position_ids": np.asarray(position_ids), "text_mask": np.asarray(text_mask)}
        found = to_tensors(self.programs.run("text", arrays))
        return EncodedTexts(found["states"], paddle.to_tensor(arrays["text_mask"]), found["features"], found.get("code_scores"))

    def temperature(self):
        """The learnt temperature of contrastive scores."""
        return self.programs.about["temperature"] if self.model is None else float(self.model.contrastive_temperature)

    def classified(self, images, features, names):
        """``Classified`` for uint8 pictures ``[N, S, S, 3]`` and the classes' ``features`` [C, H]."""
        alike = paddle.matmul(self.encode_images(images).features, features, transpose_y=True)
        results = []
        for row in softmax((alike / self.temperature()).numpy().astype("float64")):
            best = {names[i]: round(float(row[i]), 6) for i in np.argsort(-row, kind="stable")[: self.top]}
            label = next(iter(best))
            results.append(Classified(label, best[label], best))
        return results

    def match(self, images, texts):
        """:class:`Matched` of row n of both sides."""
        given = {"image_states": images.states, "image_code_scores": images.code_scores, "text_states": texts.states, "text_mask": texts.mask,
                 "text_code_scores": texts.code_scores}
        logits = self.programs.run("match", {name: value.numpy() for name, value in given.items() if value is not None})["matching_logits"]
        return self._matched(logits, contrastive_scores(images, texts).numpy())

    def _matched(self, logits, contrastive):
        weight, logits = self.config.cmcl_score_weight, logits.astype("float64")
        return [Matched(float(pair[1] + weight * alike), float(share[1]), float(alike))
                for pair, share, alike in zip(logits, softmax(logits), contrastive)]


PREDICTORS = {"glue": _Glue, "entailment": _Entailment, "vqa": _Vqa, "imagenet": _Image, "captioning": _Caption, "retrieval": _Retrieval,
              "seq2seq": _Seq2Seq}
