"""VQA v2: the official question and annotation files, the server's submission file, and Visual Genome's question-answer file."""
import json
import os
from dataclasses import dataclass
from typing import Optional, Tuple

from unimo2_paddle.data.formats.json_stream import JsonArray
from unimo2_paddle.data.formats.pictures import picture_path, require_pictures
from unimo2_paddle.errors import DataError

IMAGE_PATTERN = "{subtype}/COCO_{subtype}_{image_id:012d}.jpg"
ANNOTATORS = 10


@dataclass(frozen=True)
class Annotation:
    """What people answered to a question.

    Attributes:
        answers: the raw answers of (usually ten) people; common: the most frequent of them as the file says
            (``multiple_choice_answer``); question_type: its first words by the authors' list; answer_type: yes/no, number or other.
    """

    answers: Tuple[str, ...]
    common: str
    question_type: str
    answer_type: str


@dataclass(frozen=True)
class VisualQuestion:
    """A question about a picture; ``annotation`` is ``None`` where the file with the answers is not public (test)."""

    question_id: int
    image_id: int
    text: str
    path: str
    annotation: Optional[Annotation] = None


def read_vqa(questions, images_dir, annotations="", image_pattern=IMAGE_PATTERN, check_pictures=True):
    """One split of VQA v2.

    Args:
        questions: ``v2_OpenEnded_mscoco_<subtype>_questions.json``.
        images_dir: the folder of COCO's picture folders train2014, val2014, test2015.
        annotations: ``v2_mscoco_<subtype>_annotations.json``; empty for a test split.
        image_pattern: a picture's file name in ``images_dir`` from ``subtype`` (the file's data_subtype) and ``image_id``.
        check_pictures: make sure that every picture exists.

    Returns:
        list of :class:`VisualQuestion` in file order.

    Raises:
        DataError: a file is missing or malformed (naming the entry and the key), a question occurs twice or has no annotation,
            or pictures are missing.
    """
    answered = read_annotations(annotations) if annotations else None
    rows, subtype = _read_questions(questions)
    if answered is not None:
        unanswered = [question_id for question_id, _, _ in rows if question_id not in answered]
        if unanswered:
            raise DataError(f"{annotations}: {len(unanswered)} of {len(rows)} questions of {questions} have no annotation, the first is "
                            f"{unanswered[0]}; give the two files of one split")
    found = []
    for number, (question_id, image_id, text) in enumerate(rows):
        name = _file_name(image_pattern, subtype, image_id)
        path = picture_path(images_dir, name, f"{questions}: questions[{number}].image_id")
        found.append(VisualQuestion(question_id, image_id, text, path, answered[question_id] if answered is not None else None))
    if check_pictures:
        require_pictures(images_dir, list(dict.fromkeys(question.path for question in found)), questions)
    return found


def _read_questions(path):
    """(question id, image id, text) of all questions, and the subtype in the names of their pictures."""
    document = JsonArray(path, "questions")
    rows, seen = [], set()
    for number, entry in document:
        where = f"{path}: questions[{number}]"
        rows.append((_integer(entry, "question_id", where), _integer(entry, "image_id", where), _text(entry, "question", where).strip()))
        if rows[-1][0] in seen:
            raise DataError(f"{where}: question {rows[-1][0]} occurs twice")
        seen.add(rows[-1][0])
    if not rows:
        raise DataError(f"{path}: has no questions")
    subtype = document.header.get("data_subtype")
    if not isinstance(subtype, str) or not subtype:
        raise DataError(f'{path}: has no "data_subtype" (such as train2014), which names the picture files')
    return rows, subtype.replace("test-dev", "test")  # the test-dev questions are about pictures of test2015


def read_question_ids(path):
    """Ids of all questions of a question file, for checking a submission."""
    return [question_id for question_id, _, _ in _read_questions(path)[0]]


def read_annotations(path):
    """The annotations of a split: question id -> :class:`Annotation`."""
    found, shared = {}, {}
    for number, entry in JsonArray(path, "annotations"):
        where = f"{path}: annotations[{number}]"
        question_id = _integer(entry, "question_id", where)
        if question_id in found:
            raise DataError(f"{where}: question {question_id} occurs twice")
        answers = entry.get("answers")
        if not isinstance(answers, list) or not answers:
            raise DataError(f"{where}.answers: a non-empty list is needed")
        texts = [_text(answer, "answer", f"{where}.answers[{i}]", allow_empty=True) for i, answer in enumerate(answers)]
        # most answers are a few words that occur very often: one string each instead of millions
        texts = tuple(shared.setdefault(text, text) for text in texts)
        common = _text(entry, "multiple_choice_answer", where, allow_empty=True)
        kinds = (shared.setdefault(kind, kind) for kind in (_text(entry, "question_type", where), _text(entry, "answer_type", where)))
        found[question_id] = Annotation(texts, shared.setdefault(common, common), *kinds)
    if not found:
        raise DataError(f"{path}: has no annotations")
    return found


def read_visual_genome(path, images_dir, image_data="", skip_coco=()):
    """Visual Genome's ``question_answers.json`` as training questions; its one answer counts as the answer of all ten people.

    Args:
        path: the file; images_dir: folder of the pictures ``<id>.jpg``, or of the folders VG_100K and VG_100K_2 as they are unpacked.
        image_data: Visual Genome's ``image_data.json``, which says which pictures are also in COCO; needed with ``skip_coco``.
        skip_coco: COCO ids of pictures that are judged on: Visual Genome shares half its pictures with COCO.

    Returns:
        list of :class:`VisualQuestion`, question ids negative so that they cannot meet those of VQA.
    """
    skipped = set()
    if skip_coco:
        if not image_data:
            raise DataError(f"{path}: image_data.json is needed to leave out the pictures that are judged on; set data.visual_genome_image_data")
        skip_coco = set(skip_coco)
        skipped = {entry.get("image_id") for entry in _array(image_data) if isinstance(entry, dict) and entry.get("coco_id") in skip_coco}
    folders = [folder for folder in (os.path.join(images_dir, "VG_100K"), os.path.join(images_dir, "VG_100K_2")) if os.path.isdir(folder)]
    folders = folders or [images_dir]
    found = []
    for number, entry in enumerate(_array(path)):
        where = f"{path}: [{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("qas"), list):
            raise DataError(f'{where}: a list "qas" is needed')
        for place, pair in enumerate(entry["qas"]):
            at = f"{where}.qas[{place}]"
            image_id = _integer(pair, "image_id", at)
            if image_id in skipped:
                continue
            paths = [os.path.join(folder, f"{image_id}.jpg") for folder in folders]
            picture = next((p for p in paths if os.path.isfile(p)), paths[0])
            answer = _text(pair, "answer", at).strip()
            annotation = Annotation((answer,) * ANNOTATORS, answer, "visual genome", "other")
            found.append(VisualQuestion(-1 - _integer(pair, "qa_id", at), image_id, _text(pair, "question", at).strip(), picture, annotation))
    require_pictures(images_dir, list(dict.fromkeys(question.path for question in found)), path)
    return found


def submission_rows(question_ids, answers):
    """The server's format: ``[{"question_id": int, "answer": str}, ...]``."""
    return [{"question_id": int(question), "answer": answer} for question, answer in zip(question_ids, answers)]


def _array(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON in UTF-8: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: must be a JSON list")
    return content


def _file_name(pattern, subtype, image_id):
    try:
        return pattern.format(subtype=subtype, image_id=image_id)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise DataError(f"image pattern {pattern!r}: may use {{subtype}} and {{image_id}}, for example {IMAGE_PATTERN}") from None


def _integer(entry, key, where):
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not an object")
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{where}.{key}: a whole number is needed, is {value!r}")
    return value


def _text(entry, key, where, allow_empty=False):
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not an object")
    value = entry.get(key)
    if not isinstance(value, str) or not (allow_empty or value.strip()):
        raise DataError(f"{where}.{key}: a text is needed, is {value!r}")
    return value
