"""Caption metrics as the COCO tools define them: BLEU-1 to 4, ROUGE-L and CIDEr(-D) without Java, METEOR and SPICE through theirs.

All of them count the tokens of :func:`unimo2_paddle.metrics.ptb.caption_tokens`.
"""
import importlib
import importlib.util
import math
import os
import shutil
from collections import Counter

import numpy as np

from unimo2_paddle.metrics.ptb import caption_tokens

ORDERS = 4  # n-grams up to this length
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_TINY, _SMALL = 1e-15, 1e-9  # keep BLEU's ratios finite, values of the COCO tools


def ngrams(tokens):
    """Counts of all n-grams (tuples) of 1 to 4 tokens.

    >>> ngrams(["a", "b"])[("a", "b")]
    1
    """
    return Counter(tuple(tokens[i: i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def bleu(candidates, references):
    """Corpus BLEU-1 to 4 with the brevity penalty of the closest reference length.

    Args:
        candidates: token list per image; references: list of token lists per image.

    Returns:
        list of four floats in [0, 1].
    """
    matched, total = np.zeros(ORDERS), np.zeros(ORDERS)
    length = reference_length = 0
    for candidate, own in zip(candidates, references):
        length += len(candidate)
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in own)[1]
        most = Counter()
        for reference in own:
            most |= ngrams(reference)
        for gram, count in ngrams(candidate).items():
            matched[len(gram) - 1] += min(count, most[gram])
        total += [max(0, len(candidate) - n) for n in range(ORDERS)]
    precision = (matched + _TINY) / (total + _SMALL)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precision[:n]) ** (1 / n) * penalty) for n in range(1, ORDERS + 1)]


def longest_common_subsequence(first, second):
    """Length of the longest common subsequence of two lists.

    >>> longest_common_subsequence("abcd", "xbyd")
    2
    """
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidate, references):
    """ROUGE-L of one caption: best precision and best recall over the references, F with beta 1.2."""
    pairs = [(longest_common_subsequence(candidate, r), len(r)) for r in references]
    precision = max(common for common, _ in pairs) / max(1, len(candidate))
    recall = max(common / max(1, length) for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + _ROUGE_BETA ** 2) * precision * recall / (recall + _ROUGE_BETA ** 2 * precision)


class CiderD:
    """CIDEr-D, the metric the COCO tools print as CIDEr, with the document frequencies of a fixed set of references.

    Args:
        references: per image a list of token lists; an n-gram's document frequency is the number of images whose references hold it.
    """

    def __init__(self, references):
        self.frequencies = Counter()
        for own in references:
            self.frequencies.update(set().union(*(ngrams(tokens) for tokens in own)))
        self.log_images = math.log(max(1, len(references)))

    def vector(self, tokens):
        """(weights of the n-grams, norms per order ``[4]``, number of bigrams) of a caption."""
        counts = ngrams(tokens)
        weights = {gram: count * (self.log_images - math.log(max(1, self.frequencies[gram]))) for gram, count in counts.items()}
        squares = np.zeros(ORDERS)
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        return weights, np.sqrt(squares), max(0, len(tokens) - 1)

    def score(self, candidate, references):
        """CIDEr-D of one caption (0 to 10); ``references`` are vectors of :meth:`vector`."""
        weights, norms, length = self.vector(candidate)
        total = np.zeros(ORDERS)
        for other, other_norms, other_length in references:
            product = np.zeros(ORDERS)
            for gram, weight in weights.items():
                if gram in other:
                    product[len(gram) - 1] += min(weight, other[gram]) * other[gram]
            scale = norms * other_norms
            product = np.divide(product, scale, out=product, where=scale != 0)
            total += product * math.exp(-((length - other_length) ** 2) / (2 * _CIDER_SIGMA ** 2))
        return 10.0 * float(total.mean()) / len(references)


def cider_scores(candidates, references):
    """CIDEr-D per image ``[N]`` of token lists, document frequencies from these references."""
    cider = CiderD(references)
    return np.array([cider.score(c, [cider.vector(r) for r in own]) for c, own in zip(candidates, references)])


def caption_metrics(captions, references):
    """The Java-free metrics of a set of captions.

    Args:
        captions: text per image; references: list of texts per image (at least one each).

    Returns:
        (dict ``bleu_1`` ... ``bleu_4``, ``rouge_l``, ``cider``; float64 ``[N]`` CIDEr-D per image). BLEU and ROUGE in [0, 1], CIDEr as
        the COCO tools print it (papers multiply by 100).
    """
    candidates = [caption_tokens(text) for text in captions]
    tokens = [[caption_tokens(text) for text in own] for own in references]
    cider = cider_scores(candidates, tokens)
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu(candidates, tokens), 1)}
    scores["rouge_l"] = float(np.mean([rouge_l(c, own) for c, own in zip(candidates, tokens)]))
    scores["cider"] = float(cider.mean())
    return scores, cider


def java_metrics(captions, references, names=("meteor", "spice"), tokenize=caption_tokens):
    """METEOR and SPICE, or those of them in ``names``, where Java and their jars are installed; ``tokenize``: text to tokens.

    Returns:
        (dict with ``meteor`` and ``spice`` as far as possible, list of sentences about what is missing).
    """
    wanted = " and ".join(names).upper()
    if shutil.which("java") is None:
        return {}, [f"{wanted}: left out, there is no java on the PATH"]
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None:
        return {}, [f"{wanted}: left out, the package pycocoevalcap with their jars is not installed (pip install pycocoevalcap)"]
    root = list(found.submodule_search_locations)[0]
    candidates = {i: [" ".join(tokenize(text))] for i, text in enumerate(captions)}
    tokens = {i: [" ".join(tokenize(text)) for text in own] for i, own in enumerate(references)}
    scores, missing = {}, []
    # the package fetches SPICE's parser from the network when it is not there, so it is only started when it is
    for name, module, jars in (("meteor", "meteor.meteor", ["meteor/meteor-1.5.jar"]),
                               ("spice", "spice.spice", ["spice/spice-1.0.jar", "spice/lib/stanford-corenlp-3.6.0.jar",
                                                         "spice/lib/stanford-corenlp-3.6.0-models.jar"])):
        if name not in names:
            continue
        absent = [jar for jar in jars if not os.path.isfile(os.path.join(root, jar))]
        if absent:
            missing.append(f"{name.upper()}: left out, {', '.join(absent)} is not in the folder of pycocoevalcap")
            continue
        try:
            scorer = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name.capitalize())()
            scores[name] = float(scorer.compute_score(tokens, candidates)[0])
        except Exception as error:  # whatever a Java program does to its pipe must not cost the other metrics
            missing.append(f"{name.upper()}: left out, its Java program failed ({type(error).__name__}: {error})")
    return scores, missing
