"""What generated texts are judged by, per data set, and what simple baselines reach."""
from collections import Counter

import numpy as np

from unimo2_paddle.metrics.caption import bleu, java_metrics, rouge_l
from unimo2_paddle.metrics.ptb import ptb_tokenize
from unimo2_paddle.metrics.qa import answer_metrics
from unimo2_paddle.metrics.rouge import rouge_metrics, sentences

SELECTION = {"rouge": "rouge_l", "question": "bleu_4", "answer": "f1"}  # the metric that chooses a checkpoint, by kind


def text_metrics(kind, candidates, references, stem=True):
    """The metrics of a kind of task, in percent.

    Args:
        kind: ``rouge`` (summaries), ``question`` (BLEU-4 and ROUGE-L as the COCO tools count them, over Penn-Treebank tokens in lower
            case, punctuation included) or ``answer`` (F1, exact match).
        candidates: text per record; references: list of texts per record; stem: of ROUGE for summaries.

    Returns:
        (``{name: percent}``, float64 ``[N]`` of the selecting metric per record; for questions of ROUGE-L, as BLEU is a corpus' own).
    """
    if kind == "rouge":
        return rouge_metrics(candidates, references, stem)
    if kind == "answer":
        return answer_metrics(candidates, references)
    tokens, others = [ptb_tokenize(text) for text in candidates], [[ptb_tokenize(text) for text in own] for own in references]
    longest = 100.0 * np.array([rouge_l(candidate, own) for candidate, own in zip(tokens, others)])
    return {**{f"bleu_{n}": 100.0 * value for n, value in enumerate(bleu(tokens, others), 1)}, "rouge_l": float(longest.mean())}, longest


def meteor(candidates, references):
    """METEOR in percent by its Java program: (dict with ``meteor`` or nothing, sentences about what is missing)."""
    scores, missing = java_metrics(candidates, references, ("meteor",), ptb_tokenize)
    return {name: 100.0 * value for name, value in scores.items()}, missing


def baseline_texts(passages, references):
    """Texts that need no model: the first sentence of every passage, and everywhere the reference that is the most frequent one.

    Args:
        passages: source text per record; references: list of texts per record.

    Returns:
        ``{name: list of texts}``.
    """
    frequent = Counter(text for own in references for text in own).most_common(1)[0][0]
    return {"first sentence": [(sentences(text) or [""])[0] for text in passages], "most frequent target": [frequent] * len(passages)}
