"""Which grounded tokens a picture and a sentence choose together, and which patches and words they come from.

Every patch and every word has a relevance for every code of the dictionary; the K codes with the largest sum over both sides become the
grounded tokens (UNIMO-2, "grounded learning"). A token is *shared* when both sides have a say in it.
"""
from dataclasses import asdict, dataclass, field
from typing import Dict, Iterable, List, Optional, Union

import numpy as np

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.paths import PathLike
from unimo2_paddle.serving.codes import code_pictures, code_texts, grounded_model, text_batch, word_spans, words_best
from unimo2_paddle.serving.index import RetrievalIndex
from unimo2_paddle.serving.predictor import Predictor, read_picture

LEAST_SHARE = 0.05  # mean relevance below which a side has no say in a code: one patch or word in twenty
BOTH, IMAGE, TEXT, NEITHER = "both", "image", "text", "neither"


@dataclass(frozen=True)
class GroundedToken:
    """One chosen code.

    Attributes:
        id: number in the dictionary; rank: 1 = largest sum; score: that sum of relevance.
        origin: who has a say in it, by ``LEAST_SHARE``: "both" sides, the "image", the "text", or "neither".
        image_share, text_share: mean relevance over patches and over words, 0 to 1; ``None`` for an absent side.
        patches: similarity of every patch ``[rows][columns]``; patch_relevance: its relevance, what is summed.
        words, word_relevance: the same per word, the largest of a word's pieces.
        pictures, near_words: of a corpus, best first: ``{"item", "share", "place", "index"}`` and ``{"word", "share", "occurrences"}``.
    """

    id: int
    rank: int
    score: float
    origin: str
    image_share: Optional[float] = None
    text_share: Optional[float] = None
    patches: List[List[float]] = field(default_factory=list)
    patch_relevance: List[List[float]] = field(default_factory=list)
    words: List[float] = field(default_factory=list)
    word_relevance: List[float] = field(default_factory=list)
    pictures: List[Dict] = field(default_factory=list)
    near_words: List[Dict] = field(default_factory=list)


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` finds.

    Attributes:
        caption: the sentence, "" when there is none; words: as the model sees it, the closing token last.
        tokens: those explained in full, shared ones first; chosen: ids of all K grounded tokens, best first;
            shared: those of them in which both sides have a say.
        image_ids, text_ids: what each side alone would have chosen and has a say in; codes: size of the dictionary.
        match: score of the pair, where the model has one; picture: uint8 ``[S, S, 3]`` as the model sees it, not part of ``to_json``.
    """

    caption: str
    words: List[str]
    tokens: List[GroundedToken]
    chosen: List[int]
    shared: List[int]
    image_ids: List[int]
    text_ids: List[int]
    codes: int
    match: Optional[float] = None
    picture: Optional[np.ndarray] = None

    def to_json(self):
        """Plain Python, without the picture."""
        values = asdict(self)
        values.pop("picture")
        return values


def explain(model: Union[Predictor, PathLike], image: Union[None, PathLike, bytes, np.ndarray] = None,
            text: Optional[str] = None, corpora: Iterable[Union[RetrievalIndex, PathLike]] = (), tokens: int = 8,
            nearest: int = 6) -> Explanation:
    """Explain the grounded tokens of a picture, a sentence, or both.

    Args:
        model: ``Predictor`` or checkpoint directory of a UNIMO-2 model; image: file, bytes or uint8 array ``[H, W, 3]``; text: a sentence.
        corpora: indexes with codes (``unimo2 index --codes``) or their directories, for the nearest pictures and words of a token.
        tokens: how many tokens to explain in full; nearest: pictures and words per token.

    Returns:
        :class:`Explanation`.

    Raises:
        UserInputError: nothing to explain, a side the model does not read, no dictionary, or an index without codes or of another model.
        ImageError: the picture cannot be read.
    """
    predictor = model if isinstance(model, Predictor) else Predictor(model)
    backbone = grounded_model(predictor)
    if image is None and not text:
        raise UserInputError("nothing to explain: give a picture, a sentence, or both")
    if tokens < 1 or nearest < 0:
        raise UserInputError("tokens must be at least 1, nearest at least 0")
    for given, part, name in ((image is not None, backbone.vision, "pictures"), (bool(text), backbone.text, "texts")):
        if given and part is None:
            raise UserInputError(f"{predictor.directory}: this {predictor.task} model reads no {name}")
    if image is not None and text and layout_of(predictor) == "caption":
        raise UserInputError(f"{predictor.directory}: this {predictor.task} model chooses its grounded tokens from the picture alone; leave the sentence out")
    corpora = [_with_codes(predictor, corpus) for corpus in corpora]
    picture, sides, spans = None, {}, []
    if image is not None:
        picture = predictor.kind.picture(read_picture(image))
        sides[IMAGE] = code_pictures(backbone, picture[None])
    if text:
        spans = word_spans(predictor, text)
        sides[TEXT] = code_texts(backbone, text_batch(predictor, [text]))
    scores = {name: side.relevance[0].sum(axis=0, dtype=np.float64) for name, side in sides.items()}
    own = {name: [code for code in _chosen(backbone, score) if sides[name].share()[0, code] >= LEAST_SHARE] for name, score in scores.items()}
    total = sum(scores.values())
    chosen = _chosen(backbone, total)
    ranked = [_token(code, rank, total[code], sides, spans) for rank, code in enumerate(chosen, 1)]
    strength = {token.id: min(share for share in (token.image_share, token.text_share) if share is not None) for token in ranked}
    ranked.sort(key=lambda token: (token.origin != BOTH, -strength[token.id], token.rank))
    shared = [code for code in chosen if len(sides) == 2 and all(side.share()[0, code] >= LEAST_SHARE for side in sides.values())]
    found = [_with_neighbours(token, corpora, nearest) for token in ranked[:tokens]]
    match = predictor(image=image, text=text).score if predictor.task == "retrieval" and image is not None and text else None
    return Explanation(text or "", [word for word, _, _ in spans], found, chosen, shared, own.get(IMAGE, []), own.get(TEXT, []), len(total), match, picture)


def layout_of(predictor):
    """How a predictor's picture and text meet: "pair", or "caption", where text has no say in the choice of grounded tokens."""
    return "caption" if predictor.task == "captioning" else predictor.about.get("layout", "pair")


def _chosen(model, scores):
    """The codes that ``scores`` [C] choose, best first: the K best, or with nearest codes all that any position chose."""
    order = np.argsort(-scores, kind="stable")
    if model.dictionary.method == "topk":
        return order[: model.dictionary.topk].tolist()
    return [int(code) for code in order if scores[code] > 0]


def _token(code, rank, score, sides, spans):
    origins = [name for name, side in sides.items() if side.share()[0, code] >= LEAST_SHARE]
    values = {"origin": NEITHER if not origins else BOTH if len(origins) == 2 else origins[0]}
    if IMAGE in sides:
        side = sides[IMAGE]
        edge = int(round(side.similarity.shape[1] ** 0.5))
        values.update(image_share=float(side.share()[0, code]), patches=_rounded(side.similarity[0, :, code].reshape(edge, edge)),
                      patch_relevance=_rounded(side.relevance[0, :, code].reshape(edge, edge)))
    if TEXT in sides:
        side = sides[TEXT]
        values.update(text_share=float(side.share()[0, code]), words=_rounded(words_best(side.similarity[0, :, code], spans)),
                      word_relevance=_rounded(words_best(side.relevance[0, :, code], spans)))
    return GroundedToken(int(code), rank, float(score), **values)


def _rounded(array):
    return np.round(array.astype(np.float64), 6).tolist()


def _with_codes(predictor, corpus):
    index = corpus if isinstance(corpus, RetrievalIndex) else RetrievalIndex.load(corpus)
    index.check_model(predictor)
    if "codes" not in index.arrays:
        raise UserInputError(f"{index.directory}: this index holds no codes; add them with unimo2 index {index.root} --out {index.directory} --codes")
    return index


def _with_neighbours(token, corpora, number):
    pictures, words = [], []
    for place, index in enumerate(corpora):
        if index.kind == "images":
            shares = np.asarray(index.arrays["codes"][:, token.id], np.float32)
            pictures += [{"item": index.path(n), "share": float(shares[n]), "place": int(n), "index": place}
                         for n in np.argsort(-shares, kind="stable")[:number]]
        elif "word_codes" in index.arrays:
            shares = index.arrays["word_codes"][:, token.id]
            words += [{"word": index.about["words"][n], "share": float(shares[n]), "occurrences": index.about["occurrences"][n]}
                      for n in np.lexsort((-np.array(index.about["occurrences"]), -shares))[:number]]
    best = {"pictures": sorted(pictures, key=lambda entry: -entry["share"])[:number], "near_words": sorted(words, key=lambda entry: -entry["share"])[:number]}
    return GroundedToken(**{**token.__dict__, **best})
