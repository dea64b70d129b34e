"""ROUGE-1, ROUGE-2 and ROUGE-L of summaries, as the Perl program ROUGE-1.5.5 defines them (F with equal weights).

Own code because the usual package, rouge-score, has had no release since 2022 and no wheel; the tests compare with its output. Porter's
stemmer comes from nltk.
"""
import functools
import re
from collections import Counter

import numpy as np

from unimo2_paddle.errors import UserInputError

_TOKEN = re.compile(r"[a-z0-9]+")
_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+")
_SHORTEST_STEMMED = 4  # ROUGE-1.5.5 leaves words of up to three letters as they are


@functools.lru_cache(maxsize=200_000)
def _stem(word):
    return _stemmer().stem(word)


@functools.lru_cache(maxsize=None)
def _stemmer():
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise UserInputError("ROUGE with stemming needs the package nltk (pip install nltk); or set eval.stem: false") from None
    return PorterStemmer()


def rouge_tokens(text, stem=True):
    """Lower-case words and numbers of a text, everything else separates; words of four letters and more are stemmed.

    >>> rouge_tokens("The dogs' barking, loudly.", stem=False)
    ['the', 'dogs', 'barking', 'loudly']
    """
    tokens = _TOKEN.findall(text.lower())
    return [_stem(token) if len(token) >= _SHORTEST_STEMMED else token for token in tokens] if stem else tokens


def sentences(text):
    """The sentences of a text: lines, and in a line what ends with a full stop, an exclamation or a question mark.

    >>> sentences("A red box. Is it small?\\nNo")
    ['A red box.', 'Is it small?', 'No']
    """
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def f_score(common, candidate, reference):
    """F of ``common`` items among ``candidate`` and ``reference`` ones; 0 when there are none.

    >>> f_score(1, 2, 4)
    0.3333333333333333
    """
    return 2.0 * common / (candidate + reference) if common else 0.0


def rouge_n(candidate, reference, n):
    """F of common n-grams of two token lists.

    >>> rouge_n("a b c".split(), "a b d".split(), 2)
    0.5
    """
    one, other = (Counter(tuple(tokens[i: i + n]) for i in range(len(tokens) - n + 1)) for tokens in (candidate, reference))
    return f_score(sum((one & other).values()), sum(one.values()), sum(other.values()))


def rouge_l(candidate, reference):
    """ROUGE-L of summaries: F of the words of the reference's sentences that are in a longest common subsequence with any of the
    candidate's, every word counted as often as both have it.

    Args:
        candidate, reference: lists of sentences, each a list of tokens.

    >>> rouge_l([["a", "b"], ["c"]], [["a", "x", "c"]])
    0.6666666666666666
    """
    left = [Counter(token for sentence in text for token in sentence) for text in (candidate, reference)]
    common = 0
    for sentence in reference:
        for place in sorted(set().union(*(_common_places(sentence, other) for other in candidate))):
            token = sentence[place]
            if left[0][token] > 0 and left[1][token] > 0:
                left[0][token] -= 1
                left[1][token] -= 1
                common += 1
    return f_score(common, *(sum(map(len, text)) for text in (candidate, reference)))


def _common_places(reference, candidate):
    """Places in ``reference`` of one longest common subsequence; of equal ones that which the Perl program finds."""
    lengths = [[0] * (len(candidate) + 1)]
    for word in reference:
        before, row = lengths[-1], [0]
        for j, other in enumerate(candidate):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
        lengths.append(row)
    places, i, j = [], len(reference), len(candidate)
    while i and j:
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def rouge_metrics(candidates, references, stem=True):
    """ROUGE of many texts.

    Args:
        candidates: text per record; references: list of texts per record (the best one counts); stem: Porter's stemmer.

    Returns:
        (``rouge_1``, ``rouge_2``, ``rouge_l`` in percent; float64 ``[N]`` rouge_l per record).
    """
    rows = []
    for candidate, own in zip(candidates, references):
        scores = []
        parts = [rouge_tokens(sentence, stem) for sentence in sentences(candidate)]
        tokens = rouge_tokens(candidate, stem)
        for reference in own:
            other = rouge_tokens(reference, stem)
            scores.append((rouge_n(tokens, other, 1), rouge_n(tokens, other, 2),
                           rouge_l(parts, [rouge_tokens(sentence, stem) for sentence in sentences(reference)])))
        rows.append(np.max(scores, axis=0))
    table = 100.0 * np.array(rows)
    return dict(zip(("rouge_1", "rouge_2", "rouge_l"), map(float, table.mean(axis=0)))), table[:, 2]
