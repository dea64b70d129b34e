"""UNIMO's text generation files: TSV with a header; ``tgt`` is the target, ``knowledge`` a passage, every other column a source.

Cells of the authors' files hold vocabulary keys (lines of ``vocab.txt``) separated by blanks; quotes have no meaning (reference notes,
unimo1.md section 3.2). Records are read when they are asked for: Gigaword has 3.8 million, of which only the places stay in memory.
"""
import json
import logging
import os
from array import array
from dataclasses import dataclass
from typing import Dict, Optional, Tuple

from unimo2_paddle.errors import DataError

logger = logging.getLogger(__name__)

TARGET, KNOWLEDGE = "tgt", "knowledge"
SEPARATOR = " [SEP] "  # between the turns of a dialogue, or answer and passage


@dataclass(frozen=True)
class Seq2SeqSpec:
    """What is particular to one data set.

    Attributes:
        title: its usual name; files: split -> names its file may have; kind: of ``metrics.text_generation``; dialog: sources are turns.
    """

    title: str
    kind: str
    dialog: bool = False
    files: Optional[Dict[str, Tuple[str, ...]]] = None


_FILES = {"train": ("train.tsv",), "val": ("dev.tsv",), "test": ("test.tsv",)}
SEQ2SEQ = {
    "cnndm": Seq2SeqSpec("CNN/DailyMail", "rouge", files={**_FILES, "val": ("dev.2k.tsv", "dev.tsv")}),
    "gigaword": Seq2SeqSpec("Gigaword", "rouge", files={**_FILES, "val": ("dev.20k.tsv", "dev.tsv")}),
    "squad_qg": Seq2SeqSpec("SQuAD question generation", "question", files=_FILES),
    "coqa": Seq2SeqSpec("CoQA", "answer", dialog=True, files=_FILES),
}


def seq2seq_file(directory, dataset, split):
    """Path of a split's file.

    Raises:
        DataError: unknown split, or the file is missing.
    """
    spec = SEQ2SEQ[dataset]
    if split not in spec.files:
        raise DataError(f"{spec.title} has no split {split!r}; it has {', '.join(spec.files)}")
    for name in spec.files[split]:
        if os.path.isfile(os.path.join(directory, name)):
            return os.path.join(directory, name)
    raise DataError(f"{directory}: no {' or '.join(spec.files[split])} here; give the folder of {spec.title} (data.directory)")


@dataclass(frozen=True)
class Seq2SeqRecord:
    """One line of a file (``line`` is its number): cells as they stand there; ``knowledge`` and ``target`` may be ``None``."""

    line: int
    sources: Tuple[str, ...]
    knowledge: Optional[str]
    target: Optional[str]


class Seq2SeqFile:
    """The records of a file, in order.

    Args:
        path: the TSV file.
        inspect: ``inspect(record) -> str``, what is wrong with a record beyond its columns, "" for nothing; called once per record.
        max_bad_ratio: share of bad records that are left out and counted; one more is an error.

    Attributes:
        bad: list of (line, reason) of the records left out.

    Raises:
        DataError: the file cannot be read, has no source column or no record, or too many bad ones (the first is named as file:line).
    """

    def __init__(self, path, inspect=lambda record: "", max_bad_ratio=0.0):
        self.path, self.bad = path, []
        self._places, self._lines = array("q"), array("q")
        try:
            with open(path, "rb") as file:
                self.columns = self._header(file.readline())
                place = file.tell()
                for number, line in enumerate(file, 2):
                    if line.strip(b"\r\n"):
                        self._add(place, number, line, inspect)
                    place += len(line)
        except OSError as error:
            raise DataError(f"{path}: cannot read the texts: {error.strerror}") from None
        total = len(self._places) + len(self.bad)
        if not total:
            raise DataError(f"{path}: no record in this file")
        if self.bad and len(self.bad) > max_bad_ratio * total:
            line, reason = self.bad[0]
            raise DataError(f"{path}:{line}: {reason} ({len(self.bad)} of {total} records are bad; mend the file"
                            + (f", or raise data.max_bad_ratio above {max_bad_ratio:g})" if max_bad_ratio else ")"))
        for line, reason in self.bad[:10]:
            logger.warning("%s:%d: left out: %s", path, line, reason)
        if self.bad:
            logger.warning("%s: %d of %d records left out", path, len(self.bad), total)

    def _header(self, line):
        columns = [name.strip() for name in self._text(line).split("\t")]
        if len(set(columns)) < len(columns) or not set(columns) - {TARGET, KNOWLEDGE} or "" in columns:
            raise DataError(f"{self.path}:1: the header must name the columns, each once: a source (src), tgt, and for dialogues "
                            f"knowledge; it is {', '.join(columns)}")
        return columns

    def _text(self, line):
        return line.decode("utf-8-sig").rstrip("\r\n")

    def _add(self, place, number, line, inspect):
        try:
            reason = inspect(self._record(number, line))
        except DataError as error:
            reason = str(error)
        if reason:
            self.bad.append((number, reason))
        else:
            self._places.append(place)
            self._lines.append(number)

    def _record(self, number, line):
        try:
            cells = self._text(line).split("\t")
        except UnicodeDecodeError:
            raise DataError("not UTF-8 text") from None
        if len(cells) != len(self.columns):
            raise DataError(f"{len(cells)} fields, the header names {len(self.columns)} ({', '.join(self.columns)})")
        named = dict(zip(self.columns, cells))
        target, knowledge = named.pop(TARGET, None), named.pop(KNOWLEDGE, None)
        if target is not None and not target.strip():
            raise DataError("the target (tgt) is empty")
        if not any(text.strip() for text in named.values()):
            raise DataError("the source is empty")
        return Seq2SeqRecord(number, tuple(named.values()), knowledge or None, target)

    def __len__(self):
        return len(self._places)

    def __getitem__(self, index):
        try:
            with open(self.path, "rb") as file:
                file.seek(self._places[index])
                return self._record(self._lines[index], file.readline())
        except (OSError, DataError) as error:
            raise DataError(f"{self.path}:{self._lines[index]}: changed since the run began ({error})") from None


def read_references(path, count):
    """Texts to judge by: JSON lines, line n a list of texts (or one text) for record n.

    Raises:
        DataError: unreadable, malformed (named as file:line), or not ``count`` lines.
    """
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    texts = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error})") from None
                texts = [texts] if isinstance(texts, str) else texts
                if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                    raise DataError(f"{path}:{number}: expected a list of texts")
                found.append(texts)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the references: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if len(found) != count:
        raise DataError(f"{path}: {len(found)} lines for {count} records; references go with their records line by line")
    return found
