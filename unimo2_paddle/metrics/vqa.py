"""VQA accuracy as the official evaluation defines it, answer vocabularies, soft targets, and a check of submission files.

The rules for comparing answers are those of the VQA challenge (https://visualqa.org/evaluation.html): lower case, number words as
digits, no articles, contractions with their apostrophe, punctuation removed or replaced by a space.
"""
import functools
import json
import re
from collections import Counter, defaultdict

from unimo2_paddle.errors import DataError

NUMBER_WORDS = {"none": "0", **{word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# A contraction is recognised with exactly one of its apostrophes missing.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in _CONTRACTED for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the other way round


def strip_punctuation(text):
    """The official punctuation rule.

    A sign is removed where it stands beside a space anywhere in the text, or when the text has a number with a comma; else it becomes
    a space. A period stays only before a digit. An apostrophe, a colon and other signs stay.
    """
    number = _NUMBER_WITH_COMMA.search(text) is not None
    stripped = text
    for sign in PUNCTUATION:
        if sign in text:
            beside_space = sign + " " in text or " " + sign in text
            stripped = stripped.replace(sign, "" if beside_space or number else " ")
    return _PERIOD.sub("", stripped)


@functools.lru_cache(maxsize=1 << 16)  # the same few thousand answers come back millions of times
def normalise_answer(text):
    """An answer in the form in which the official evaluation compares answers.

    >>> normalise_answer("The two dogs.")
    '2 dogs'
    """
    words = (NUMBER_WORDS.get(word, word) for word in strip_punctuation(_one_line(text)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _one_line(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer, people):
    """The accuracy of one answer: min(1, matches / 3) averaged over leaving out each person.

    As in the official evaluation, answers are normalised only when the people did not all write the same.

    Args:
        answer: the predicted text; people: the texts of the annotators, at least one.

    Returns:
        float in 0..1.
    """
    answer, people = _one_line(answer), [_one_line(text) for text in people]
    if len(set(people)) > 1:
        answer, people = normalise_answer(answer), [normalise_answer(text) for text in people]
    matches = sum(text == answer for text in people)
    return sum(min(1.0, (matches - (text == answer)) / 3) for text in people) / len(people)


def vqa_metrics(answers, annotations):
    """Official accuracies in percent.

    Args:
        answers: predicted texts; annotations: for each an object with ``answers``, ``answer_type`` and ``question_type``.

    Returns:
        (metrics, by_question_type): ``accuracy`` and one per answer type; and accuracy per question type.

    Raises:
        ValueError: no answers, or not as many as annotations.
    """
    if not answers or len(answers) != len(annotations):
        raise ValueError(f"{len(answers)} answers for {len(annotations)} annotations; both must be equally many and at least one")
    overall, kinds, questions = [], defaultdict(list), defaultdict(list)
    for answer, annotation in zip(answers, annotations):
        score = 100.0 * vqa_accuracy(answer, annotation.answers)
        overall.append(score)
        kinds[annotation.answer_type].append(score)
        questions[annotation.question_type].append(score)
    means = {"accuracy": _mean(overall), **{kind: _mean(kinds[kind]) for kind in sorted(kinds)}}
    return means, {kind: _mean(questions[kind]) for kind in sorted(questions)}


def _mean(values):
    return sum(values) / len(values)


def answer_vocabulary(annotations, least=9):
    """The answers a classifier can give: those that are the most frequent answer of at least ``least`` questions.

    Counted per question on its normalised ``multiple_choice_answer`` without commas, which gives the field's 3,129 answers on the
    training and validation questions of VQA v2 with 9.

    Args:
        annotations: objects with ``common``.

    Returns:
        list of texts, most frequent first, equally frequent ones in alphabetical order.
    """
    counts = Counter(_vocabulary_form(annotation.common) for annotation in annotations)
    counts.pop("", None)
    return [answer for answer, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= least]


def _vocabulary_form(text):
    return normalise_answer(text).replace(",", "")


def soft_targets(people, index):
    """The training target of one question: answer number -> min(1, people / 3), only for answers that ``index`` has."""
    counts = Counter(index.get(_vocabulary_form(text)) for text in people)
    return {number: min(1.0, count / 3) for number, count in counts.items() if number is not None}


def frequent_answers(annotations):
    """The most frequent answer of every question type, and under "" of all: the baseline that does not look at pictures."""
    counts = defaultdict(Counter)
    for annotation in annotations:
        counts[annotation.question_type][_vocabulary_form(annotation.common)] += 1
        counts[""][_vocabulary_form(annotation.common)] += 1
    return {kind: min(counter.items(), key=lambda item: (-item[1], item[0]))[0] for kind, counter in sorted(counts.items())}


def frequent_answer_accuracy(frequent, annotations):
    """Official accuracy in percent of answering :func:`frequent_answers` to every question."""
    answers = [frequent.get(annotation.question_type, frequent[""]) for annotation in annotations]
    return vqa_metrics(answers, annotations)[0]["accuracy"]


def validate_submission(submission, question_ids):
    """Check what the evaluation server would refuse.

    Args:
        submission: path of the JSON file, or its content: a list of ``{"question_id": int, "answer": str}``.
        question_ids: ids of all questions of the split.

    Returns:
        a one-line summary.

    Raises:
        DataError: with every kind of problem found, each with its count and first place.
    """
    name = "submission"
    if not isinstance(submission, list):
        name = str(submission)
        submission = _read_submission(submission)
    wanted, seen, problems = set(question_ids), set(), defaultdict(list)
    for place, row in enumerate(submission):
        where = f"[{place}]"
        if not isinstance(row, dict) or set(row) != {"question_id", "answer"}:
            problems['entries that do not have exactly the keys "question_id" and "answer"'].append(where)
            continue
        question, answer = row["question_id"], row["answer"]
        if not isinstance(question, int) or isinstance(question, bool):
            problems["question ids that are not whole numbers"].append(where)
            continue
        if not isinstance(answer, str):
            problems["answers that are not texts"].append(where)
        if question in seen:
            problems["questions answered twice"].append(f"{where} {question}")
        elif question not in wanted:
            problems["questions that this split does not have"].append(f"{where} {question}")
        seen.add(question)
    missing = sorted(wanted - seen)
    if missing:
        problems["questions without an answer"] = [str(question) for question in missing]
    if problems:
        told = "; ".join(f"{len(places)} {kind} (first: {places[0]})" for kind, places in problems.items())
        raise DataError(f"{name}: the server would refuse this file: {told}")
    return f"{name}: {len(submission)} answers, one per question, in the server's format"


def _read_submission(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: must be a JSON list of answers")
    return content
