"""Searching a collection of pictures by a sentence, or of sentences by a picture.

An index holds the contrastive feature of every item, computed once. A query is compared with all features, and the best ones are
judged again by the whole model (matching + contrastive score), as in the evaluation of retrieval with a shortlist.
"""
import json
import os
import shutil

import numpy as np
import paddle

from unimo2_paddle.data.collate import text_arrays, with_special_tokens
from unimo2_paddle.errors import DataError, UserInputError
from unimo2_paddle.serving.predictor import read_picture
from unimo2_paddle.serving.results import Found
from unimo2_paddle.tasks.base import to_tensors
from unimo2_paddle.tasks.retrieval_scoring import encode_captions, encode_pictures

KINDS = ("images", "texts")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_ITEMS, _FEATURES = "index.json", "features.npy"


class RetrievalIndex:
    """Items with their contrastive features.

    Args:
        kind: "images" (items are picture files) or "texts" (items are sentences); items: list of str.
        features: float32 ``[N, H]``; model: fingerprint of the model's weights they were made with.
    """

    def __init__(self, kind, items, features, model):
        self.kind, self.items, self.features, self.model = kind, items, features, model

    def __len__(self):
        return len(self.items)

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
        encode = _encode_images if kind == "images" else _encode_texts
        features = [encode(predictor, items[first: first + batch_size]).features.numpy() for first in range(0, len(items), batch_size)]
        return cls(kind, list(items), np.concatenate(features), predictor.kind.fingerprint())

    def save(self, directory):
        """Write the index into a new directory, all or nothing.

        Raises:
            UserInputError: the directory exists or cannot be written.
        """
        directory = os.path.abspath(directory)
        if os.path.lexists(directory):
            raise UserInputError(f"{directory} exists; choose another directory for the index, or remove it")
        temporary = directory + ".tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)
            np.save(os.path.join(temporary, _FEATURES), self.features)
            with open(os.path.join(temporary, _ITEMS), "w", encoding="utf-8") as file:
                json.dump({"kind": self.kind, "model": self.model, "items": self.items}, file, ensure_ascii=False)
            os.rename(temporary, directory)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserInputError(f"{directory}: the index cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, directory):
        """The index that :meth:`save` wrote.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            with open(os.path.join(directory, _ITEMS), encoding="utf-8") as file:
                about = json.load(file)
            features = np.load(os.path.join(directory, _FEATURES), allow_pickle=False)
            kind, items, model = about["kind"], about["items"], about["model"]
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(f"{directory}: no usable index ({type(error).__name__}: {error}); build one with unimo2 predict --build-index") from None
        if kind not in KINDS or features.ndim != 2 or len(items) != len(features):
            raise DataError(f"{directory}: {len(items)} items but features {list(features.shape)}; build the index anew")
        return cls(kind, items, features, model)

    def search(self, predictor, query, top=5, rerank=32):
        """The items that fit best.

        Args:
            predictor: of the model the index was built with; query: a sentence for pictures, a picture for sentences.
            top: results; rerank: items the whole model judges, at least ``top``; 0: contrastive scores alone.

        Returns:
            list of ``Found``, best first.

        Raises:
            UserInputError: the model is another one, or a number is wrong.
        """
        require_retrieval(predictor)
        if predictor.kind.fingerprint() != self.model:
            raise UserInputError(f"the index was not built with the weights of {predictor.directory}: features of two models cannot be compared; "
                                 "build it anew")
        if top < 1 or rerank < 0:
            raise UserInputError(f"top must be at least 1 and rerank at least 0, are {top} and {rerank}")
        encode_query, encode_items = (_encode_texts, _encode_images) if self.kind == "images" else (_encode_images, _encode_texts)
        one = encode_query(predictor, [query])
        similarity = self.features @ one.features.numpy()[0]
        order = np.argsort(-similarity, kind="stable")
        if not rerank:
            return [Found(self.items[i], float(similarity[i]), float(similarity[i])) for i in order[:top]]
        chosen = order[: max(top, rerank)]
        others = encode_items(predictor, [self.items[i] for i in chosen])
        same = one.take(np.zeros(len(chosen), dtype="int64"))
        with paddle.no_grad():
            matched = predictor.kind.match(*((others, same) if self.kind == "images" else (same, others)))
        found = [Found(self.items[i], match.score, float(similarity[i])) for i, match in zip(chosen, matched)]
        return sorted(found, key=lambda item: -item.score)[:top]


def require_retrieval(predictor):
    """Raise ``UserInputError`` unless the predictor scores pairs."""
    if predictor.task != "retrieval":
        raise UserInputError(f"{predictor.directory} is a model for {predictor.task}; an index needs a retrieval or pre-trained model")
    if predictor.kind.reads_regions:
        raise UserInputError(f"{predictor.directory} is a model of UNIMO, which scores pairs only as a whole; an index needs one of UNIMO-2")


def collect_items(source):
    """(kind, items) of a source: a folder of pictures (searched through, in order of their names), or a text file of one sentence a line.

    Raises:
        DataError: there is nothing usable.
    """
    if os.path.isdir(source):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names if name.lower().endswith(PICTURE_ENDINGS)]
        if not found:
            raise DataError(f"{source}: no picture in this folder ({', '.join(PICTURE_ENDINGS)})")
        return "images", sorted(found)
    try:
        with open(source, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: neither a folder of pictures nor a text file ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    sentences = [line for line in lines if line]
    if not sentences:
        raise DataError(f"{source}: no sentence in this file")
    return "texts", sentences


@paddle.no_grad()
def _encode_images(predictor, images):
    pictures = [predictor.kind.picture(read_picture(image)) for image in images]
    return encode_pictures(predictor.kind.model, paddle.to_tensor(np.stack(pictures)))


@paddle.no_grad()
def _encode_texts(predictor, texts):
    tokenizer = predictor.kind.tokenizer
    ids = [with_special_tokens(tokenizer.encode(text), tokenizer, predictor.kind.max_text_len) for text in texts]
    batch = to_tensors(text_arrays(ids, tokenizer.pad_id))
    return encode_captions(predictor.kind.model, batch["input_ids"], batch["position_ids"], batch["text_mask"])
