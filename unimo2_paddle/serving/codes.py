"""How near every patch and every word is to every code of the grounded dictionary: what the choice of grounded tokens is made of."""
from typing import List, NamedTuple

import numpy as np
import paddle

from unimo2_paddle.data.collate import text_arrays, with_special_tokens
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.unimo2 import source_mask
from unimo2_paddle.tasks.base import normalise_tensor, to_tensors

END = "(end)"  # the closing special token: it has no letters, but a say in the choice


class CodedSide(NamedTuple):
    """One side (patches of pictures, or tokens of texts) and the codes; its first position, [CLS], has no say and is left out."""

    similarity: np.ndarray  # float32 [B, N, C] product of state and code; for nearest codes minus the squared distance
    relevance: np.ndarray   # float32 [B, N, C] what is summed to choose codes, 0 at padding
    valid: np.ndarray       # float32 [B, N]

    def share(self):
        """Mean relevance over the positions that count, ``[B, C]``, 0 to 1."""
        return self.relevance.sum(axis=1) / np.maximum(self.valid.sum(axis=1, keepdims=True), 1.0)


def grounded_model(predictor):
    """The ``Unimo2Model`` inside a ``Predictor``.

    Raises:
        UserInputError: its model has no grounded dictionary, or is an exported one.
    """
    if predictor.exported:
        raise UserInputError(f"{predictor.directory} is an exported model, whose codes cannot be looked at; give the checkpoint directory it was made from")
    model = getattr(predictor.kind.model, "backbone", predictor.kind.model)
    if not getattr(model, "grounded", False):
        raise UserInputError(f"{predictor.directory}: this model has no grounded dictionary (it is one of UNIMO, or the ablation model_type: baseline); "
                             "give a UNIMO-2 model")
    return model


@paddle.no_grad()
def code_pictures(model, pixels):
    """:class:`CodedSide` of uint8 pictures ``[B, S, S, 3]``."""
    return coded(model.dictionary, *model.dictionary.inputs(model.encode_image(normalise_tensor(paddle.to_tensor(pixels)))))


@paddle.no_grad()
def code_texts(model, batch):
    """:class:`CodedSide` of a batch of tensors ``input_ids``, ``position_ids``, ``text_mask``."""
    states, valid = model.encode_text(batch["input_ids"], batch["position_ids"], batch["text_mask"]), source_mask(batch["text_mask"])
    return coded(model.dictionary, *model.dictionary.inputs(text_states=states, text_valid=valid))


@paddle.no_grad()
def coded(dictionary, states, valid):
    """:class:`CodedSide` of the dictionary's ``inputs``: states ``[B, N, H]``, valid ``[B, N]``."""
    codebook = dictionary.codebook
    if dictionary.method == "topk":
        similarity, relevance = paddle.matmul(states, codebook, transpose_y=True), dictionary.relevance(states, codebook)
    else:  # every position chooses its nearest code
        similarity = 2.0 * paddle.matmul(states, codebook, transpose_y=True) - codebook.square().sum(axis=1) - states.square().sum(axis=-1, keepdim=True)
        relevance = paddle.nn.functional.one_hot(similarity.argmax(axis=-1), codebook.shape[0])
    return CodedSide(similarity.numpy(), (relevance * valid.unsqueeze(2)).numpy(), valid.numpy())


def text_batch(predictor, texts):
    """Tensors of a batch of texts as the predictor's model reads them."""
    tokenizer = predictor.kind.tokenizer
    ids = [with_special_tokens(tokenizer.encode(text), tokenizer, predictor.kind.max_text_len) for text in texts]
    return to_tensors(text_arrays(ids, tokenizer.pad_id))


def word_spans(predictor, text):
    """The words of a text as the model sees it: list of (word, first, last + 1) over the positions after [CLS], the closing token last."""
    tokenizer = predictor.kind.tokenizer
    ids, starts = tokenizer.encode_with_word_starts(text)
    ids, starts = ids[: predictor.kind.max_text_len - 2], starts[: predictor.kind.max_text_len - 2]
    places = [place for place, start in enumerate(starts) if start] + [len(ids)]
    spans = [(tokenizer.decode(ids[first:last]).strip(), first, last) for first, last in zip(places, places[1:])]
    return [span for span in spans if span[0]] + [(END, len(ids), len(ids) + 1)]


def words_best(values, spans):
    """The largest of each word's pieces: ``[W, ...]`` of ``values`` ``[N, ...]``."""
    return np.stack([values[first:last].max(axis=0) for _, first, last in spans])


class WordTable:
    """Mean relevance of every word of a corpus for every code, over the word's occurrences."""

    def __init__(self):
        self._sums, self._counts = {}, {}

    def add(self, words, relevance):
        """Count words with their relevance ``[W, C]``."""
        for word, row in zip(words, relevance):
            word = word.lower()
            self._counts[word] = self._counts.get(word, 0) + 1
            self._sums[word] = row.astype(np.float64) + self._sums.get(word, 0.0)

    def arrays(self):
        """(words, occurrences, mean relevance float32 ``[words, C]``), words in alphabetical order."""
        words: List[str] = sorted(self._sums)
        means = [self._sums[word] / self._counts[word] for word in words]
        return words, [self._counts[word] for word in words], np.array(means, np.float32)
