"""Metrics of generated texts: ROUGE against rouge-score's output, answers by the official rules, questions, baselines."""
import numpy as np
import pytest

from unimo2_paddle.metrics import caption
from unimo2_paddle.metrics.qa import answer_metrics, best_of, exact_match, normalise_answer, token_f1
from unimo2_paddle.metrics.rouge import rouge_l, rouge_metrics, rouge_n, rouge_tokens, sentences
from unimo2_paddle.metrics.text_generation import SELECTION, baseline_texts, meteor, text_metrics

# candidate, reference, F in percent of rouge1, rouge2, rougeLsum by rouge-score 0.1.2 with its stemmer (sentences on lines of their own)
ROUGE = [
    ("The cat sat on the mat. It was happy!", "A cat was sitting on a mat. The happy cat slept.", 60.0, 0.0, 60.0),
    ("Police killed the gunman.\nThe running man was stopped by officers running.",
     "police kill the gunman\nOfficers stopped a man who was running", 78.26087, 28.571429, 60.869565),
    ("", "nothing was said", 0.0, 0.0, 0.0),
    ("one two three four five", "five four three two one", 100.0, 0.0, 20.0),
    ("U.S. stocks rose 2.5% on Tuesday, led by tech-heavy Nasdaq.", "Nasdaq led stocks up 2.5 percent on Tuesday in the U.S.",
     69.230769, 25.0, 53.846154),
    ("a b a b a. b b a", "a a b. b a b b\nb a", 94.117647, 66.666667, 94.117647),
    ("There is a red box and a small ring. The ring is above the box.", "There is a small ring and a red box. The box is below the ring.",
     93.333333, 64.285714, 73.333333),
    ("Generously, the universities organised conferences.", "The university's generous organisation of a conference was relational.",
     66.666667, 15.384615, 53.333333),
]
UNSTEMMED = [(ROUGE[1][:2], (69.565217, 9.52381, 52.173913)), (ROUGE[7][:2], (13.333333, 0.0, 13.333333))]


@pytest.mark.parametrize("candidate, reference, one, two, longest", ROUGE)
def test_rouge_is_that_of_the_usual_package(candidate, reference, one, two, longest):
    found, per_record = rouge_metrics([candidate], [[reference]])
    assert list(found.values()) == pytest.approx([one, two, longest], abs=1e-5) and per_record == pytest.approx([longest], abs=1e-5)


@pytest.mark.parametrize("texts, expected", UNSTEMMED)
def test_rouge_without_stemming(texts, expected):
    assert list(rouge_metrics([texts[0]], [[texts[1]]], stem=False)[0].values()) == pytest.approx(expected, abs=1e-5)


def test_rouge_takes_the_best_reference_and_the_mean_over_records():
    found, _ = rouge_metrics(["a red box", "x"], [["nothing here", "a red box"], ["y"]])
    assert found == {"rouge_1": 50.0, "rouge_2": 50.0, "rouge_l": 50.0}


def test_words_that_repeat_count_as_often_as_both_have_them():
    assert rouge_n("a a a b".split(), "a a c".split(), 1) == pytest.approx(2 * 2 / 7)
    assert rouge_l([["a"], ["a"]], [["a", "a", "a"]]) == pytest.approx(2 * 1 / 5)  # one subsequence holds one a
    assert rouge_l([], [["a"]]) == rouge_n([], ["a"], 2) == 0.0


def test_only_letters_digits_and_sentences_matter():
    assert rouge_tokens("Ça va? 2.5-mile RUNS") == ["a", "va", "2", "5", "mile", "run"]
    assert sentences("One. Two!  Three?\n\nFour 2.5 five") == ["One.", "Two!", "Three?", "Four 2.5 five"]


@pytest.mark.parametrize("text, expected", [
    ("The  cat.", "cat"), ("a-b, An U.S.A!", "ab usa"), ("there", "there"), ("The", ""), ("  ", ""), ("Ça «va»", "ça «va»"),
])
def test_answers_are_normalised_as_squads_script_does(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize("answer, reference, f1, same", [
    ("Denver Broncos", "the denver broncos.", 1.0, 1.0), ("in Santa Clara, California", "Santa Clara", 2 * 2 / 6, 0.0),
    ("yes yes", "yes", 2 / 3, 0.0), ("the", "a", 1.0, 1.0), ("", "box", 0.0, 0.0), ("red", "blue", 0.0, 0.0),
])
def test_f1_counts_common_words_and_exact_match_whole_answers(answer, reference, f1, same):
    assert token_f1(answer, reference) == pytest.approx(f1) and exact_match(answer, reference) == same


def test_several_human_answers_are_left_out_in_turn_as_in_coqa_or_the_best_counts_as_in_squad():
    references = ["a red box", "red", "box"]
    # without the first: max(1/.., ..) = F1("red box" | "red") = 2/3; without another: 1 from the first
    assert best_of(token_f1, "red box", references, leave_one_out=True) == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert best_of(token_f1, "red box", references) == 1.0
    assert best_of(token_f1, "red", ["red"], leave_one_out=True) == 1.0
    found, per_record = answer_metrics(["red box", "x"], [references, ["y"]])
    assert found["f1"] == pytest.approx(100 * (2 / 3 + 2) / 3 / 2) and len(per_record) == 2


def test_questions_are_judged_with_their_punctuation_by_the_coco_tools_rules():
    same, per_record = text_metrics("question", ["What colour is the box?"], [["What colour is the box?"]])
    assert same["bleu_4"] == pytest.approx(100.0, abs=1e-4) and same["rouge_l"] == pytest.approx(100.0) and per_record.tolist() == [100.0]
    without, _ = text_metrics("question", ["What colour is the box"], [["What colour is the box?"]])
    assert without["bleu_1"] < 100.0, "the missing question mark shortens the question"
    tokens = "what colour is the box".split()
    assert without["bleu_4"] == pytest.approx(100 * caption.bleu([tokens], [[[*tokens, "?"]]])[3])


def test_every_kind_has_its_selecting_metric():
    for kind, metric in SELECTION.items():
        assert metric in text_metrics(kind, ["a box"], [["a box", "the box"]])[0]


def test_meteor_says_in_a_line_what_it_lacks(monkeypatch):
    monkeypatch.setattr(caption.shutil, "which", lambda name: None)
    assert meteor(["a"], [["a"]]) == ({}, ["METEOR: left out, there is no java on the PATH"])


@pytest.mark.slow
def test_meteor_by_its_java_program_where_it_is_installed():
    found, missing = meteor(["what colour is the box ?", "no"], [["what colour is the box ?"], ["yes"]])
    if missing:
        pytest.skip(missing[0])
    assert 20.0 < found["meteor"] < 100.0


def test_baselines_copy_the_first_sentence_or_say_the_most_frequent_target():
    texts = baseline_texts(["A red box. A ring.", ""], [["yes"], ["no", "yes"]])
    assert texts == {"first sentence": ["A red box.", ""], "most frequent target": ["yes", "yes"]}
    assert np.isfinite(rouge_metrics(texts["first sentence"], [["x"], ["y"]])[1]).all()
