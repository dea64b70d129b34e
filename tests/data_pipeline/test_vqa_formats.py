"""VQA v2's and SNLI-VE's files, and streaming of large JSON documents."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo2_paddle.data.formats.json_stream import JsonArray
from unimo2_paddle.data.formats.snli_ve import LABELS, read_snli_ve
from unimo2_paddle.data.formats.vqa import read_question_ids, read_visual_genome, read_vqa
from unimo2_paddle.errors import DataError

VALUES = st.recursive(st.none() | st.booleans() | st.integers(-10**12, 10**12) | st.text(max_size=8),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=6), st.dictionaries(st.text(max_size=5).filter(lambda key: key != "rows"), VALUES, max_size=3),
       st.integers(1, 40), st.booleans())
def test_streaming_gives_what_json_load_gives_whatever_the_chunk(tmp_path_factory, rows, others, chunk, first):
    path = tmp_path_factory.getbasetemp() / "stream.json"
    document = {"rows": rows, **others} if first else {**others, "rows": rows}
    path.write_text(json.dumps(document, indent=chunk % 3 or None), encoding="utf-8")
    array = JsonArray(path, "rows", chunk)
    assert [value for _, value in array] == rows
    assert array.header == others


@pytest.mark.parametrize("text, told", [
    ('[1]', "must be a JSON object"), ('{"other": 1}', "has no list 'rows'; it has other"), ('{}', "it has nothing"),
    ('{"rows": [1,\n2', "line 2"), ('{"rows": [1 2]}', "expected , or ]"), ('{"rows": [1]} x', "end of the file"), ('', "must be a JSON object"),
    ('{"rows": [{"a": 1}, {"a": }]}', "not JSON at line 1"), (b'{"rows": ["\xff"]}', "UTF-8"),
])
def test_documents_that_are_not_this_json_are_refused(tmp_path, text, told):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=told.replace("]", r"\]")):
        list(JsonArray(path, "rows"))


def question(number, image=1, text="What is it?"):
    return {"image_id": image, "question": text, "question_id": number}


def annotation(number, answers=("cat", "a cat"), **changes):
    return {"question_id": number, "image_id": 1, "question_type": "what is", "answer_type": "other", "multiple_choice_answer": "cat",
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(answers, 1)], **changes}


@pytest.fixture
def vqa_files(tmp_path):
    """A function that writes the two official files and the pictures; returns the arguments of ``read_vqa``."""

    def write(questions, annotations=None, subtype="train2014", pictures=(1,)):
        for subfolder in ("train2014", "test2015"):
            (tmp_path / subfolder).mkdir(exist_ok=True)
            for image in pictures:
                (tmp_path / subfolder / f"COCO_{subfolder}_{image:012d}.jpg").write_bytes(b"jpeg")
        (tmp_path / "q.json").write_text(json.dumps({"info": {}, "questions": questions, "data_subtype": subtype}))
        if annotations is not None:
            (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations, "data_subtype": subtype}))
        return str(tmp_path / "q.json"), str(tmp_path), str(tmp_path / "a.json") if annotations is not None else ""

    return write


def test_questions_come_with_their_answers_and_coco_picture_names(vqa_files):
    arguments = vqa_files([question(7), question(5, text=" Why? ")], [annotation(5), annotation(7), annotation(99)])
    first, second = read_vqa(*arguments)
    assert (first.question_id, first.text, second.text) == (7, "What is it?", "Why?")
    assert first.path.endswith("train2014/COCO_train2014_000000000001.jpg")
    assert first.annotation.answers == ("cat", "a cat") and first.annotation.answer_type == "other"
    assert read_question_ids(arguments[0]) == [7, 5]


def test_a_test_split_has_no_answers_and_test_dev_uses_the_test_pictures(vqa_files):
    found = read_vqa(*vqa_files([question(7)], subtype="test-dev2015"))
    assert found[0].annotation is None and found[0].path.endswith("test2015/COCO_test2015_000000000001.jpg")


@pytest.mark.parametrize("questions, annotations, told", [
    ([question(1), question(1)], [annotation(1)], r"questions\[1\]: question 1 occurs twice"),
    ([question("1")], [annotation(1)], r"questions\[0\].question_id: a whole number"),
    ([question(1, text=" ")], [annotation(1)], r"questions\[0\].question: a text"),
    ([question(1), question(2)], [annotation(1)], "1 of 2 questions .* have no annotation, the first is 2"),
    ([question(1)], [annotation(1), annotation(1)], "occurs twice"),
    ([question(1)], [annotation(1, answers=())], r"annotations\[0\].answers: a non-empty list"),
    ([question(1)], [annotation(1, answer_type=None)], r"annotations\[0\].answer_type: a text"),
    ([question(1)], [3], r"annotations\[0\] is not an object"),
    ([], [annotation(1)], "has no questions"),
    ([question(1)], [], "has no annotations"),
    ([question(1, image=4)], [annotation(1)], "1 of 1 pictures are missing"),
])
def test_wrong_vqa_files_are_refused_with_the_place(vqa_files, questions, annotations, told):
    with pytest.raises(DataError, match=told):
        read_vqa(*vqa_files(questions, annotations))


def test_a_wrong_picture_pattern_names_what_it_may_use(vqa_files):
    questions, images, annotations = vqa_files([question(1)], [annotation(1)])
    with pytest.raises(DataError, match="may use"):
        read_vqa(questions, images, annotations, "{subtypo}.jpg")
    with pytest.raises(DataError, match="inside the picture folder"):
        read_vqa(questions, images, annotations, "../{image_id}.jpg")


def test_visual_genome_leaves_out_pictures_that_are_judged_on(tmp_path):
    pairs = [{"id": i, "qas": [{"qa_id": 10 + i, "image_id": i, "question": "Where?", "answer": "Here."}]} for i in (1, 2)]
    (tmp_path / "qa.json").write_text(json.dumps(pairs))
    (tmp_path / "image_data.json").write_text(json.dumps([{"image_id": 1, "coco_id": 77}, {"image_id": 2, "coco_id": None}]))
    (tmp_path / "VG_100K").mkdir()
    (tmp_path / "VG_100K_2").mkdir()
    (tmp_path / "VG_100K" / "1.jpg").write_bytes(b"jpeg")
    (tmp_path / "VG_100K_2" / "2.jpg").write_bytes(b"jpeg")
    both = read_visual_genome(tmp_path / "qa.json", tmp_path)
    assert [q.question_id for q in both] == [-12, -13] and both[1].path.endswith("VG_100K_2/2.jpg")
    assert both[0].annotation.answers == ("Here.",) * 10
    kept = read_visual_genome(tmp_path / "qa.json", tmp_path, tmp_path / "image_data.json", skip_coco=[77])
    assert [q.image_id for q in kept] == [2]
    with pytest.raises(DataError, match="image_data.json is needed"):
        read_visual_genome(tmp_path / "qa.json", tmp_path, "", skip_coco=[77])


def hypothesis_line(**changes):
    return json.dumps({"Flickr30K_ID": "12", "gold_label": "neutral", "pairID": "12.jpg#0r1n", "sentence2": "A dog.", **changes})


def snli_file(tmp_path, *lines):
    (tmp_path / "12.jpg").write_bytes(b"jpeg")
    path = tmp_path / "snli_ve_dev.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_hypotheses_without_a_gold_label_are_left_out(tmp_path):
    no_id = json.dumps({"gold_label": "entailment", "pairID": "12.jpg#2r1e", "sentence2": " Ein Hund – 狗 "})
    found = read_snli_ve(snli_file(tmp_path, hypothesis_line(), "", hypothesis_line(gold_label="-"), no_id), tmp_path)
    assert [(h.text, LABELS[h.label], h.image_id) for h in found] == [("A dog.", "neutral", "12"), ("Ein Hund – 狗", "entailment", "12")]


@pytest.mark.parametrize("line, told", [
    ("{", "line 2: not JSON"), ("[]", "line 2: is not an object"), (hypothesis_line(gold_label="maybe"), "line 2.gold_label: 'maybe'"),
    (hypothesis_line(sentence2=""), "line 2.sentence2: a non-empty text"), (hypothesis_line(Flickr30K_ID="../x"), "inside the picture folder"),
    (hypothesis_line(Flickr30K_ID="13"), "1 of 2 pictures are missing"),
])
def test_wrong_snli_ve_lines_are_refused_with_their_number(tmp_path, line, told):
    with pytest.raises(DataError, match=told):
        read_snli_ve(snli_file(tmp_path, hypothesis_line(), line), tmp_path)


def test_an_empty_or_missing_snli_ve_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no line with a gold label"):
        read_snli_ve(snli_file(tmp_path, hypothesis_line(gold_label="-")), tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_snli_ve(tmp_path / "none.jsonl", tmp_path)
