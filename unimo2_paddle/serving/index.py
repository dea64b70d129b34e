"""Searching a collection of pictures by a sentence, or of sentences by a picture.

An index holds the contrastive feature of every item, computed once. A query is compared with all features, and the best ones are
judged again by the whole model (matching + contrastive score), as in the evaluation of retrieval with a shortlist. It may also hold
how much of every item each code of the grounded dictionary has, for ``unimo2 explain``. What fills it from a folder is
:mod:`unimo2_paddle.serving.indexing`.
"""
import json
import os
import re
import uuid

import numpy as np
import paddle

from unimo2_paddle.data.images import decode_image
from unimo2_paddle.errors import DataError, ImageError, UserInputError
from unimo2_paddle.serving.codes import text_batch
from unimo2_paddle.serving.predictor import read_picture
from unimo2_paddle.serving.results import Found
from unimo2_paddle.tasks.reporting import jpeg_bytes, write_text
from unimo2_paddle.vector_search import VectorSearch

KINDS = ("images", "texts")
ABOUT, THUMBNAILS = "index.json", "thumbnails"
_ARRAYS = ("features", "codes", "word_codes")
_ARRAY_FILE = re.compile(rf"({'|'.join(_ARRAYS)})-[0-9a-f]{{8}}\.npy(\.tmp)?")


class RetrievalIndex:
    """Items with their contrastive features.

    Args:
        kind: "images" (items are picture files) or "texts" (items are sentences); items: list of str.
        features: float32 ``[N, H]``; model: fingerprint of the model's weights they were made with.
        root: folder that the items' names begin in; directory: where the index lies, "" before it is saved.
        arrays: ``codes`` float16 ``[N, C]`` (mean relevance of an item's positions for every code), ``word_codes`` float32 ``[W, C]``, or nothing.
        about: what else is told of it: ``model_directory``, ``stamps`` ([size, time] per item), ``skipped``, ``words``, ``occurrences``, ``thumbnails``.
    """

    def __init__(self, kind, items, features, model, root="", directory="", arrays=None, about=None):
        self.kind, self.items, self.features, self.model = kind, items, features, model
        self.root, self.directory, self.arrays, self.about, self._vectors = root, directory, arrays or {}, about or {}, None

    def __len__(self):
        return len(self.items)

    def path(self, place):
        """File of picture number ``place``, or the sentence."""
        return os.path.join(self.root, self.items[place]) if self.kind == "images" else self.items[place]

    @classmethod
    def build(cls, predictor, kind, items, batch_size=32):
        """Encode ``items`` with a retrieval ``Predictor``.

        Raises:
            UserInputError: the predictor's model does not retrieve, or there is nothing to index; ImageError: a picture cannot be read.
        """
        require_retrieval(predictor)
        if kind not in KINDS:
            raise UserInputError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        if not items:
            raise UserInputError("nothing to index: give at least one picture or sentence")
        encode = encode_images if kind == "images" else encode_texts
        features = [encode(predictor, items[first: first + batch_size]).features.numpy() for first in range(0, len(items), batch_size)]
        return cls(kind, list(items), np.concatenate(features), predictor.kind.fingerprint(), about={"model_directory": os.path.abspath(predictor.directory)})

    def save(self, directory, replace=False):
        """Write the index; a reader sees the old one or the new one, never a mixture.

        Args:
            directory: made when it does not exist; replace: whether an index that is there already gives way.

        Raises:
            UserInputError: the directory exists, or cannot be written.
        """
        directory = os.path.abspath(directory)
        if os.path.lexists(directory) and not (replace and may_hold_index(directory)):
            raise UserInputError(f"{directory} exists; choose another directory for the index, or remove it")
        stamp = uuid.uuid4().hex[:8]
        files = {name: f"{name}-{stamp}.npy" for name in _ARRAYS if name == "features" or name in self.arrays}
        try:
            os.makedirs(directory, exist_ok=True)
            for name, file_name in files.items():
                temporary = os.path.join(directory, file_name + ".tmp")
                with open(temporary, "wb") as file:
                    np.save(file, self.features if name == "features" else self.arrays[name])
                os.replace(temporary, os.path.join(directory, file_name))
            content = {**self.about, "kind": self.kind, "model": self.model, "root": self.root, "items": self.items, "files": files}
            write_text(os.path.join(directory, ABOUT), json.dumps(content, ensure_ascii=False))
            for name in os.listdir(directory):
                if _ARRAY_FILE.fullmatch(name) and name not in files.values():
                    os.remove(os.path.join(directory, name))
        except OSError as error:
            raise UserInputError(f"{directory}: the index cannot be written: {error.strerror}") from None
        self.directory = directory

    @classmethod
    def load(cls, directory):
        """The index that :meth:`save` wrote; its arrays stay on disk until they are read.

        Raises:
            DataError: it is missing or damaged.
        """
        directory = os.fspath(directory)
        try:
            with open(os.path.join(directory, ABOUT), encoding="utf-8") as file:
                about = json.load(file)
            kind, items, model, root, files = (about.pop(key) for key in ("kind", "items", "model", "root", "files"))
            arrays = {name: np.load(os.path.join(directory, os.path.basename(files[name])), mmap_mode="r", allow_pickle=False) for name in files}
            features = arrays.pop("features")
        except FileNotFoundError as error:
            raise DataError(f"{directory}: no usable index ({os.path.basename(error.filename)} is not there); build one with unimo2 index SOURCE "
                            f"--out {directory}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise DataError(f"{directory}: no usable index ({type(error).__name__}: {error}); build one with unimo2 index SOURCE --out {directory}") from None
        if kind not in KINDS or features.ndim != 2 or len(items) != len(features) or len(arrays.get("codes", items)) != len(items):
            raise DataError(f"{directory}: {len(items)} items but features {list(features.shape)}; build the index anew")
        return cls(kind, items, features, model, root, os.path.abspath(directory), arrays, about)

    def search(self, predictor, query, top=5, rerank=32):
        """The items that fit best; pictures that have disappeared since are left out.

        Args:
            predictor: of the model the index was built with; query: a sentence for pictures, a picture for sentences.
            top: results; rerank: items the whole model judges, at least ``top``; 0: contrastive scores alone.

        Returns:
            list of ``Found``, best first.

        Raises:
            UserInputError: the model is another one, or a number is wrong.
        """
        self.check_model(predictor)
        if top < 1 or rerank < 0:
            raise UserInputError(f"top must be at least 1 and rerank at least 0, are {top} and {rerank}")
        one = (encode_texts if self.kind == "images" else encode_images)(predictor, [query])
        if self._vectors is None:
            self._vectors = VectorSearch(self.features)
        [(places, similarity)] = self._vectors.search(one.features.numpy(), max(top, rerank))
        if not rerank:
            return [Found(self.path(place), float(score), float(score), int(place)) for place, score in zip(places, similarity)]
        there, others = self._encode(predictor, places)
        if not there:
            return []
        same = one.take(np.zeros(len(there), dtype="int64"))
        with paddle.no_grad():
            matched = predictor.kind.match(*((others, same) if self.kind == "images" else (same, others)))
        found = [Found(self.path(places[n]), match.score, float(similarity[n]), int(places[n])) for n, match in zip(there, matched)]
        return sorted(found, key=lambda item: -item.score)[:top]

    def _encode(self, predictor, places):
        """(numbers of the ``places`` that can still be read, their encodings)."""
        if self.kind == "texts":
            return list(range(len(places))), encode_texts(predictor, [self.items[place] for place in places])
        there, pictures = [], []
        for number, place in enumerate(places):
            try:
                pictures.append(read_picture(self.path(place)))
                there.append(number)
            except ImageError:
                continue
        return there, encode_images(predictor, pictures) if pictures else None

    def check_model(self, predictor):
        """Raise ``UserInputError`` unless ``predictor`` has the weights that the features were made with."""
        require_retrieval(predictor)
        if predictor.kind.fingerprint() != self.model:
            raise UserInputError(f"the index was not built with the weights of {predictor.directory}: features of two models cannot be compared; "
                                 "build it anew")

    def thumbnail(self, place, edge=160):
        """JPEG bytes of picture number ``place``: the stored thumbnail, or one made now.

        Raises:
            UserInputError: no such picture; ImageError: it cannot be read any more.
        """
        if self.kind != "images" or not 0 <= place < len(self):
            raise UserInputError(f"{self.directory}: no picture number {place}; it has {len(self) if self.kind == 'images' else 0}")
        stored = os.path.join(self.directory, THUMBNAILS, self.thumbnail_name(place))
        if self.about.get("thumbnails") and os.path.isfile(stored):
            with open(stored, "rb") as file:
                return file.read()
        return jpeg_bytes(decode_image(self.path(place)), edge)

    def thumbnail_name(self, place):
        """File name of a stored thumbnail: another one when the picture changes."""
        return f"{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([self.items[place], self.about['stamps'][place]])).hex}.jpg"


def may_hold_index(directory):
    """Whether a directory is an index, the beginning of one, or empty: nothing of anyone else would be touched."""
    return os.path.isdir(directory) and all(
        name in (ABOUT, ABOUT + ".tmp", THUMBNAILS) or _ARRAY_FILE.fullmatch(name) for name in os.listdir(directory))


def require_retrieval(predictor):
    """Raise ``UserInputError`` unless the predictor scores pairs."""
    if predictor.task != "retrieval":
        raise UserInputError(f"{predictor.directory} is a model for {predictor.task}; an index needs a retrieval or pre-trained model")
    if predictor.kind.reads_regions:
        raise UserInputError(f"{predictor.directory} is a model of UNIMO, which scores pairs only as a whole; an index needs one of UNIMO-2")


@paddle.no_grad()
def encode_images(predictor, images):
    """``EncodedImages`` of pictures as a call of the predictor takes them."""
    pictures = [predictor.kind.picture(read_picture(image)) for image in images]
    return predictor.kind.encode_images(np.stack(pictures))


@paddle.no_grad()
def encode_texts(predictor, texts):
    """``EncodedTexts`` of sentences."""
    batch = text_batch(predictor, texts)
    return predictor.kind.encode_texts(batch["input_ids"], batch["position_ids"], batch["text_mask"])
