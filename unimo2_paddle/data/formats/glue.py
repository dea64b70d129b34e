"""GLUE's TSV files, recognised by their headers: the official ones (CoLA's has none) and the authors' (text_a, text_b, label, qid).

Fields are separated by tabs and quotes have no meaning, in both. Also the files the GLUE server takes: a header ``index\tprediction``
and one line per test sentence.
"""
import math
import os
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple, Union

from unimo2_paddle.errors import DataError

# Column names in lower case, the most specific first: the authors', the official files', the labelled diagnostic's.
_TEXT_A = ("text_a", "sentence1", "sentence", "premise")
_TEXT_B = ("text_b", "sentence2", "hypothesis")
_LABEL = ("label", "gold_label", "score")
_INDEX = ("qid", "index")
_NO_AGREEMENT = "-"  # MultiNLI's own distribution marks sentences whose annotators disagree so


@dataclass(frozen=True)
class GlueRecord:
    """One line: the texts (``text_b`` is ``None`` for single sentences), the label and the server's index.

    ``label`` is a class number, a score for STS-B, or ``None`` in unlabelled files; ``line`` is the line in its file.
    """

    index: int
    text_a: str
    text_b: Optional[str]
    label: Union[int, float, None]
    line: int


@dataclass(frozen=True)
class GlueSpec:
    """What is particular to one GLUE data set.

    Attributes:
        title: its name on the leader board; labels: class names in the order of their numbers, empty for a score.
        pair: two texts; folders: usual names of its folder.
        parts: split -> part name -> names its file may have; the part ``""`` is the only one of its split.
        submissions: part of the test split -> (file name for the server, its number of lines).
    """

    title: str
    labels: Tuple[str, ...]
    pair: bool
    parts: Dict[str, Dict[str, Tuple[str, ...]]] = field(default_factory=dict)
    submissions: Dict[str, Tuple[str, int]] = field(default_factory=dict)


def _plain(name, size):
    return ({split: {"": (f"{file}.tsv",)} for split, file in (("train", "train"), ("val", "dev"), ("test", "test"))},
            {"": (f"{name}.tsv", size)})


GLUE = {
    "sst2": GlueSpec("SST-2", ("0", "1"), False, *_plain("SST-2", 1821)),
    "cola": GlueSpec("CoLA", ("0", "1"), False, *_plain("CoLA", 1063)),
    "stsb": GlueSpec("STS-B", (), True, *_plain("STS-B", 1379)),
    "mnli": GlueSpec(
        "MNLI", ("contradiction", "neutral", "entailment"), True,
        {"train": {"": ("train.tsv",)},
         "val": {"matched": ("dev_matched.tsv", "m/dev.tsv"), "mismatched": ("dev_mismatched.tsv", "mm/dev.tsv")},
         "test": {"matched": ("test_matched.tsv", "m/test.tsv"), "mismatched": ("test_mismatched.tsv", "mm/test.tsv"),
                  "ax": ("diagnostic.tsv", "diagnostic-full.tsv", "AX.tsv", "../diagnostic/diagnostic.tsv", "../AX/AX.tsv")}},
        {"matched": ("MNLI-m.tsv", 9796), "mismatched": ("MNLI-mm.tsv", 9847), "ax": ("AX.tsv", 1104)}),
}
OPTIONAL_PARTS = ("ax",)
SCORE_RANGE = (0.0, 5.0)


def glue_file(directory, dataset, split, part=""):
    """Path of a part's file, or ``None`` when an optional part (the diagnostic) is not there.

    Raises:
        DataError: unknown split, or the file is missing.
    """
    parts = GLUE[dataset].parts.get(split)
    if parts is None:
        raise DataError(f"{GLUE[dataset].title} has no split {split!r}; it has {', '.join(GLUE[dataset].parts)}")
    candidates = [os.path.join(directory, *name.split("/")) for name in parts[part]]
    for path in candidates:
        if os.path.isfile(path):
            return path
    if part in OPTIONAL_PARTS:
        return None
    raise DataError(f"{directory}: no {' or '.join(parts[part])} here; give the folder of {GLUE[dataset].title} (data.directory)")


def read_glue(path, dataset, labels=None):
    """The records of one file, in order.

    Args:
        path: a TSV file; dataset: a key of ``GLUE``.
        labels: class names in the order of their numbers, for files whose labels are numbers (the authors') or other words;
            default: those of the data set.

    Returns:
        list of :class:`GlueRecord`. Lines whose label is "-" (no agreement among annotators) are left out.

    Raises:
        DataError: the file cannot be read, lacks a column, or a line (named as file:line) is malformed.
    """
    spec = GLUE[dataset]
    names = tuple(labels) if labels else spec.labels
    records, columns, first_number = [], None, 1
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip("\r\n").split("\t")
                if number == 1:
                    columns = _columns(fields, spec, path)
                    if columns.header:
                        first_number = 2
                        continue
                if line.strip():
                    record = _record(fields, columns, spec, names, number, number - first_number, path)
                    if record is not None:
                        records.append(record)
    except OSError as error:
        raise DataError(f"{path}: cannot read the sentences: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start} of a block)") from None
    if not records:
        raise DataError(f"{path}: no sentence in this file")
    labelled = sum(record.label is not None for record in records)
    if labelled not in (0, len(records)):
        missing = next(record for record in records if record.label is None)
        raise DataError(f"{path}:{missing.line}: the label is empty, other lines have one")
    return records


@dataclass(frozen=True)
class _Columns:
    """Where the fields of a file are; ``None`` for a column it does not have."""

    header: bool
    count: int
    text_a: int
    text_b: Optional[int]
    label: Optional[int]
    index: Optional[int]


def _columns(fields, spec, path):
    if spec.title == "CoLA" and len(fields) == 4 and fields[1] in ("0", "1"):  # source, label, author's mark, sentence: no header
        return _Columns(False, 4, 3, None, 1, None)
    names = [name.strip().lower() for name in fields]

    def place(wanted):
        return next((names.index(name) for name in wanted if name in names), None)

    text_a, text_b = place(_TEXT_A), place(_TEXT_B) if spec.pair else None
    if text_a is None or (spec.pair and text_b is None):
        wanted = "text_a and text_b, or sentence1 and sentence2" if spec.pair else "text_a or sentence"
        raise DataError(f"{path}:1: {spec.title} needs a header with the columns {wanted}; this line has {', '.join(map(repr, fields[:12]))}")
    return _Columns(True, len(fields), text_a, text_b, place(_LABEL), place(_INDEX))


def _record(fields, columns, spec, names, number, position, path):
    where = f"{path}:{number}"
    if len(fields) != columns.count:
        # the official MNLI and STS-B files end every line with its label, so a cut-off line must not pass
        raise DataError(f"{where}: {len(fields)} fields, expected {columns.count} (separated by tabs)")
    label = None
    if columns.label is not None:
        text = fields[columns.label].strip()
        if text == _NO_AGREEMENT:
            return None
        label = parse_label(text, spec, names, where) if text else None
    index = position
    if columns.index is not None:
        text = fields[columns.index].strip()
        if not (text.isascii() and text.isdigit()):
            raise DataError(f"{where}: the index {text!r} is not a number")
        index = int(text)
    return GlueRecord(index, fields[columns.text_a].strip(), fields[columns.text_b].strip() if columns.text_b is not None else None, label, number)


def parse_label(text, spec, names, where):
    """A label's text as class number or score.

    Raises:
        DataError: it is neither a class name nor a class number, or no score from 0 to 5; the message begins with ``where``.
    """
    if not spec.labels:
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not SCORE_RANGE[0] <= score <= SCORE_RANGE[1]:
            raise DataError(f"{where}: the score {text!r} is not a number from 0 to 5")
        return score
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    raise DataError(f"{where}: the label {text!r} is none of {', '.join(names)} and no number below {len(names)}")


def submission_lines(dataset, indices, predictions, labels=None):
    """The text of a file for the GLUE server: ``index\tprediction``, in the order of the indices.

    Args:
        dataset: key of ``GLUE``; indices: ints; predictions: class numbers, or scores (cut to 0..5); labels: as in :func:`read_glue`.

    Raises:
        DataError: an index occurs twice.
    """
    names = tuple(labels) if labels else GLUE[dataset].labels
    if len(set(indices)) != len(indices):
        twice = next(index for n, index in enumerate(indices) if index in indices[:n])
        raise DataError(f"{GLUE[dataset].title}: index {twice} occurs twice among the test sentences")
    low, high = SCORE_RANGE
    told = [names[int(p)] if names else f"{min(high, max(low, float(p))):.3f}" for p in predictions]
    return "index\tprediction\n" + "".join(f"{index}\t{text}\n" for index, text in sorted(zip(indices, told)))


def read_submission(path, dataset):
    """Predictions by index from a file in the server's format.

    Returns:
        dict of index -> class number or score.

    Raises:
        DataError: the first problem, with its line.
    """
    spec, found = GLUE[dataset], {}
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the predictions: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if lines[0].rstrip("\r").split("\t") != ["index", "prediction"]:
        raise DataError(f"{path}:1: the first line must be 'index', a tab, 'prediction'; it is {lines[0][:60]!r}")
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            if any(rest.strip() for rest in lines[number:]):
                raise DataError(f"{path}:{number}: an empty line between the predictions")
            break
        fields = line.rstrip("\r").split("\t")
        if len(fields) != 2 or not (fields[0].isascii() and fields[0].isdigit()):
            raise DataError(f"{path}:{number}: expected an index and a prediction with a tab between, found {line[:60]!r}")
        if int(fields[0]) in found:
            raise DataError(f"{path}:{number}: index {fields[0]} occurs twice")
        if spec.labels and fields[1] not in spec.labels:
            raise DataError(f"{path}:{number}: the prediction {fields[1]!r} is none of {', '.join(spec.labels)}")
        found[int(fields[0])] = parse_label(fields[1], spec, spec.labels, f"{path}:{number}")
    return found


def check_submission(path, dataset, part="", size=None):
    """Check a whole file for the server; returns its number of predictions.

    Args:
        path: the file; dataset: key of ``GLUE``; part: "" or "matched", "mismatched", "ax".
        size: predictions expected; default: those of the official test set. 0: any number.

    Raises:
        DataError: the first problem.
    """
    found = read_submission(path, dataset)
    wanted = GLUE[dataset].submissions[part][1] if size is None else size
    if wanted and len(found) != wanted:
        raise DataError(f"{path}: {len(found)} predictions, the test set has {wanted}")
    missing = next((index for index in range(len(found)) if index not in found), None)
    if missing is not None:
        raise DataError(f"{path}: no prediction for index {missing}; the indices must be 0 to {len(found) - 1}")
    return len(found)
