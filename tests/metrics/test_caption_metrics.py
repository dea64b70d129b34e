"""Caption metrics equal the COCO tools' definitions: stored output of the Java tokenizer, slow restatements, the tools where installed."""
import importlib.util
import json
import math
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.metrics import caption
from unimo2_paddle.metrics.caption import CiderD, bleu, caption_metrics, cider_scores, longest_common_subsequence, rouge_l
from unimo2_paddle.metrics.ptb import DROPPED, caption_tokens, ptb_tokenize

# [text, tokens]: written by the Java tokenizer of the COCO tools (Stanford PTBTokenizer -preserveLines -lowerCase), punctuation dropped
STORED = json.loads((Path(__file__).resolve().parents[1] / "data/ptb_tokens.json").read_text(encoding="utf-8"))
tools = pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed")
words = st.lists(st.sampled_from("abcde"), max_size=7)
corpora = st.lists(st.tuples(words, st.lists(words.filter(len), min_size=1, max_size=3)), min_size=1, max_size=5)


def test_tokens_equal_the_java_tokenizers_stored_output():
    wrong = [(text, wanted, caption_tokens(text)) for text, wanted in STORED if caption_tokens(text) != wanted]
    assert len(STORED) > 300 and wrong == []


@tools
@pytest.mark.skipif(shutil.which("java") is None, reason="there is no java")
def test_tokens_equal_the_java_tokenizer_where_it_is_installed():
    root = Path(list(importlib.util.find_spec("pycocoevalcap").submodule_search_locations)[0])
    jar = next((root / "tokenizer").glob("*.jar"))
    texts = [text for text, _ in STORED if text.isascii()][:80]
    out = subprocess.run(["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
                         input="\n".join(texts).encode(), capture_output=True, check=True).stdout.decode().split("\n")
    for text, line in zip(texts, out):
        assert caption_tokens(text) == [t for t in line.split() if t not in DROPPED]


@given(st.text(max_size=40))
def test_any_text_becomes_lower_case_tokens_without_blanks(text):
    for token in ptb_tokenize(text):
        assert token and token == token.lower() and not token.isspace()


def test_dropped_punctuation_leaves_contractions_and_numbers():
    assert caption_tokens("") == caption_tokens(" ... !") == []
    assert caption_tokens("A man's dog, isn't 3.5 ft. long!") == ["a", "man", "'s", "dog", "is", "n't", "3.5", "ft.", "long"]


def slow_bleu(candidates, references):
    """BLEU-1 to 4 by its definition."""
    def grams(tokens, n):
        return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]

    scores, precisions = [], []
    c = sum(map(len, candidates))
    r = sum(min((len(x) for x in own), key=lambda size: (abs(size - len(cand)), size)) for cand, own in zip(candidates, references))
    for n in range(1, 5):
        right = sum(min(grams(cand, n).count(g), max(grams(x, n).count(g) for x in own))
                    for cand, own in zip(candidates, references) for g in set(grams(cand, n)))
        total = sum(len(grams(cand, n)) for cand in candidates)
        precisions.append((right + 1e-15) / (total + 1e-9))
        penalty = min(1.0, math.exp(1 - (r + 1e-9) / (c + 1e-15))) if c < r else 1.0
        scores.append(math.prod(precisions) ** (1 / n) * penalty)
    return scores


def slow_cider(candidates, references):
    """CIDEr-D with dense vectors over all n-grams of the corpus."""
    def grams(tokens, n):
        return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]

    totals = np.zeros(len(candidates))
    for n in range(1, 5):
        known = sorted({g for own in references for x in own for g in grams(x, n)} | {g for c in candidates for g in grams(c, n)})
        frequency = np.array([sum(any(g in grams(x, n) for x in own) for own in references) for g in known])
        idf = np.log(len(references)) - np.log(np.maximum(1, frequency))

        def vector(tokens, n=n, known=known, idf=idf):
            return np.array([grams(tokens, n).count(g) for g in known]) * idf

        for i, (c, own) in enumerate(zip(candidates, references)):
            for x in own:
                a, b = vector(c), vector(x)
                scale = np.linalg.norm(a) * np.linalg.norm(b)
                delta = max(0, len(c) - 1) - max(0, len(x) - 1)
                similarity = (np.minimum(a, b) * b).sum() / scale if scale else (np.minimum(a, b) * b).sum()
                totals[i] += similarity * math.exp(-delta ** 2 / 72) / len(own) / 4 * 10
    return totals


@given(corpora)
def test_bleu_equals_its_definition(corpus):
    candidates, references = [c for c, _ in corpus], [r for _, r in corpus]
    if sum(map(len, candidates)):
        np.testing.assert_allclose(bleu(candidates, references), slow_bleu(candidates, references), rtol=1e-6, atol=1e-12)


@given(corpora)
def test_cider_equals_its_definition(corpus):
    candidates, references = [c for c, _ in corpus], [r for _, r in corpus]
    np.testing.assert_allclose(cider_scores(candidates, references), slow_cider(candidates, references), atol=1e-9)


@given(words, words)
def test_the_common_subsequence_is_the_longest(first, second):
    def contains(longer, part):
        rest = iter(longer)
        return all(token in rest for token in part)

    longest = max(n for n in range(len(first) + 1) for part in combinations(first, n) if contains(second, part))
    assert longest_common_subsequence(first, second) == longest


@tools
@given(corpora)
def test_bleu_rouge_and_cider_equal_the_coco_tools(corpus):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = [c or ["x"] for c, _ in corpus], [r for _, r in corpus]
    truth = {i: [" ".join(x) for x in own] for i, own in enumerate(references)}
    given_ = {i: [" ".join(c)] for i, c in enumerate(candidates)}
    np.testing.assert_allclose(bleu(candidates, references), Bleu(4).compute_score(truth, given_, verbose=0)[0], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(cider_scores(candidates, references), Cider().compute_score(truth, given_)[1], atol=1e-9)
    assert np.mean([rouge_l(c, own) for c, own in zip(candidates, references)]) == pytest.approx(Rouge().compute_score(truth, given_)[0])


def test_a_perfect_caption_scores_highest_and_an_empty_one_nothing():
    references = [["A red circle above a box.", "a disc"], ["Two dogs run on the beach.", "dogs"], ["Café à la “crème”", "x"]]
    perfect, _ = caption_metrics([own[0] for own in references], [[own[0]] for own in references])
    assert perfect["bleu_4"] == pytest.approx(1, abs=1e-6) and perfect["rouge_l"] == pytest.approx(1)
    assert perfect["cider"] == pytest.approx(10.0)
    empty, per_image = caption_metrics(["", "...", " "], references)
    assert max(empty.values()) < 1e-6 and per_image.tolist() == [0, 0, 0]


def test_document_frequencies_may_come_from_other_references():
    cider = CiderD([[["a", "b"]], [["a", "c"]], [["a", "d"]]])
    vector = cider.vector(["a", "b"])
    assert cider.score(["a", "b"], [vector]) == pytest.approx(10 * 2 / 4)  # there are no 3- and 4-grams; "a" is in every image
    assert cider.score(["a"], [vector]) == 0


def test_missing_java_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)
    scores, notes = caption.java_metrics(["a dog"], [["a dog"]])
    assert scores == {} and len(notes) == 1 and "java" in notes[0]
    monkeypatch.undo()
    monkeypatch.setattr(caption.shutil, "which", lambda name: "java")
    monkeypatch.setattr(caption.importlib.util, "find_spec", lambda name: None)
    assert "pycocoevalcap" in caption.java_metrics(["a dog"], [["a dog"]])[1][0]
