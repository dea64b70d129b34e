"""VQA accuracy, answer normalisation, vocabularies and the submission check."""
import json
import re
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.errors import DataError
from unimo2_paddle.metrics import vqa

Annotation = namedtuple("Annotation", "answers common question_type answer_type")


@pytest.mark.parametrize("raw, wanted", [
    ("The two dogs.", "2 dogs"), ("None", "0"), ("TEN", "10"), ("eleven", "eleven"), ("", ""), ("an", ""), ("red/blue", "red blue"), ("red, blue", "red blue"),
    ("red,blue", "red blue"), ("1,000", "1000"), ("1,000-ish", "1000ish"), ("t-shirt", "t shirt"), ("t- shirt", "t shirt"), ("2.5", "2.5"),
    ("st. john's", "st john's"), ("yes!", "yes"), ("dont", "don't"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
    ("wouldntve", "wouldntve"), ("lets", "lets"), ("y'all'dve", "y'all'd've"), ("somebody'd", "somebodyd"), ("Café  Ünïcode", "café ünïcode"),
    ("\tyes\n", "yes"), ("two\nthree", "2 3"), ("11:30", "11:30"), ("(left)", "left"), ("$5", "$5"), ("who?what", "who what"), ("🙂", "🙂"),
])
def test_answers_take_the_form_of_the_official_rules(raw, wanted):
    assert vqa.normalise_answer(raw) == wanted


def slow_punctuation(text):
    """The published rule read sign by sign, on characters instead of replacements."""
    dropped, spaced = set(), set()
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        if sign + " " in text or " " + sign in text or re.search("[0-9],[0-9]", text):
            dropped.add(sign)
        else:
            spaced.add(sign)
    kept = [" " if c in spaced else c for c in text if c not in dropped]
    return "".join(c for i, c in enumerate(kept) if c != "." or (i + 1 < len(kept) and kept[i + 1].isdigit()))


@given(st.text(alphabet="ab 01.,;/-?!'\"(é", max_size=20))
def test_punctuation_agrees_with_a_slow_reading_of_the_rule(text):
    assert vqa.strip_punctuation(text) == slow_punctuation(text)


@pytest.mark.parametrize("matches, wanted", list(enumerate([0.0, 0.3, 0.6, 0.9] + [1.0] * 7)))
def test_accuracy_by_number_of_agreeing_people(matches, wanted):
    people = ["Yes"] * matches + ["no way"] * (10 - matches)
    assert vqa.vqa_accuracy("yes" if 0 < matches < 10 else "Yes", people) == pytest.approx(wanted)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=10).filter(lambda people: len(set(people)) > 1), st.sampled_from("abcd"))
def test_accuracy_agrees_with_leaving_out_every_person_in_turn(people, answer):
    words = {"a": "red", "b": "blue", "c": "green", "d": "black"}
    people, answer = [words[p] for p in people], words[answer]
    slow = np.mean([min(1, (people[:i] + people[i + 1:]).count(answer) / 3) for i in range(len(people))])
    assert vqa.vqa_accuracy(answer, people) == pytest.approx(slow)


def test_unanimous_answers_are_compared_as_they_were_written():
    assert vqa.vqa_accuracy("two", ["two"] * 10) == 1.0
    assert vqa.vqa_accuracy("2", ["two"] * 10) == 0.0  # as the official evaluation does
    assert vqa.vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1.0


def test_means_are_taken_per_answer_type_and_question_type():
    annotations = [Annotation(("yes",) * 10, "yes", "is the", "yes/no"), Annotation(("2",) * 10, "2", "how many", "number"),
                   Annotation(("no",) * 10, "no", "is the", "yes/no")]
    metrics, by_question = vqa.vqa_metrics(["yes", "3", "yes"], annotations)
    assert metrics == {"accuracy": pytest.approx(100 / 3), "number": 0.0, "yes/no": 50.0}
    assert by_question == {"how many": 0.0, "is the": 50.0}
    with pytest.raises(ValueError, match="equally many"):
        vqa.vqa_metrics([], [])


def annotated(*common):
    return [Annotation((text,) * 10, text, "what is the", "other") for text in common]


def test_the_vocabulary_holds_answers_of_enough_questions_most_frequent_first():
    annotations = annotated("Two", "2", "a cat", "cat", "cat", "dog", "dog", "1,000", "1000", "the", "rare")
    assert vqa.answer_vocabulary(annotations, least=2) == ["cat", "1000", "2", "dog"]


def test_soft_targets_are_thirds_up_to_one_and_leave_out_unknown_answers():
    index = {"2": 0, "cat": 1, "dog": 2}
    people = ["two", "2", "cat", "a cat", "the cat", "cat", "cat", "bird", "dog", "bird"]
    assert vqa.soft_targets(people, index) == {0: pytest.approx(2 / 3), 1: 1.0, 2: pytest.approx(1 / 3)}


def test_the_baseline_answers_what_is_most_frequent_for_the_type_of_question():
    train = annotated("red", "red", "blue") + [Annotation(("yes",) * 10, "yes", "is the", "yes/no")] * 4
    frequent = vqa.frequent_answers(train)
    assert frequent == {"": "yes", "what is the": "red", "is the": "yes"}
    unseen = [Annotation(("yes",) * 10, "yes", "was it", "yes/no"), Annotation(("blue",) * 10, "blue", "what is the", "other")]
    assert vqa.frequent_answer_accuracy(frequent, unseen) == 50.0


def test_a_complete_submission_passes(tmp_path):
    rows = [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": ""}]
    (tmp_path / "result.json").write_text(json.dumps(rows))
    assert "2 answers" in vqa.validate_submission(tmp_path / "result.json", [2, 1])


def test_all_problems_of_a_submission_are_told_at_once():
    rows = [{"question_id": 1, "answer": "yes"}, {"question_id": 1, "answer": 3}, {"question_id": 9, "answer": "no"}, {"question_id": "2"},
            {"question_id": True, "answer": "no"}, {"question_id": 3, "answer": "no", "score": 1}]
    with pytest.raises(DataError) as caught:
        vqa.validate_submission(rows, [1, 2, 3])
    for part in ("1 questions answered twice", "1 answers that are not texts", "split does not have (first: [2] 9)", "2 entries that do not have",
                 "not whole numbers (first: [4])", "2 questions without an answer (first: 2)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("content, told", [("{}", "must be a JSON list"), ("[1", "not JSON"), (None, "cannot be read")])
def test_a_submission_that_is_no_list_is_refused(tmp_path, content, told):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=told):
        vqa.validate_submission(path, [1])
