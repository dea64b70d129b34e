"""Answers in words: F1 and exact match as SQuAD and CoQA count them (arXiv 1606.05250, 1808.07042)."""
import re
import string
from collections import Counter

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text):
    """Lower case, without ASCII punctuation, articles and surplus blanks.

    >>> normalise_answer("The  U.S.A., an ally!")
    'usa ally'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(answer, reference):
    """1.0 when both are the same after normalisation, else 0.0."""
    return float(normalise_answer(answer) == normalise_answer(reference))


def token_f1(answer, reference):
    """F1 of common words after normalisation; where one has no words, whether both have none.

    >>> token_f1("in the red house", "a red house")
    0.8
    """
    one, other = normalise_answer(answer).split(), normalise_answer(reference).split()
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2.0 * common / (len(one) + len(other))


def best_of(score, answer, references, leave_one_out=False):
    """The best score over several references.

    ``leave_one_out`` is CoQA's rule: of n > 1 human answers each is left out in turn, and the n best scores over the others are averaged,
    so that a human answer, which cannot be compared with itself, and a machine's are judged alike.
    """
    if not leave_one_out or len(references) < 2:
        return max(score(answer, reference) for reference in references)
    return float(np.mean([best_of(score, answer, references[:i] + references[i + 1:]) for i in range(len(references))]))


def answer_metrics(answers, references, leave_one_out=True):
    """F1 and exact match of many answers.

    Args:
        answers: text per question; references: list of texts per question; leave_one_out: see :func:`best_of` (SQuAD: ``False``).

    Returns:
        (``f1``, ``exact_match`` in percent; float64 ``[N]`` F1 per question).
    """
    f1, same = (np.array([100.0 * best_of(score, answer, list(own), leave_one_out) for answer, own in zip(answers, references)])
                for score in (token_f1, exact_match))
    return {"f1": float(f1.mean()), "exact_match": float(same.mean())}, f1
