"""Predictions for many inputs: a folder of pictures, a JSON-lines or a CSV file in; JSON lines or CSV out."""
import csv
import itertools
import json
import os
import sys

from unimo2_paddle.errors import DataError, UserInputError
from unimo2_paddle.serving.indexing import picture_files

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def folder_requests(predictor, folder, common):
    """List of (name in messages, mapping), one for every picture below a folder, each with the texts ``common``.

    Raises:
        UserInputError: the model reads no picture files, or needs another text; DataError: the folder has no picture.
    """
    if "image" not in predictor.needs or predictor.kind.reads_regions:
        raise UserInputError(f"--images: this {predictor.task} model reads no picture files")
    missing = [name for name in predictor.needs if name != "image" and name not in common]
    if missing:
        raise UserInputError(f"--images: the {predictor.task} model needs {' and '.join(missing)} too; give --{missing[0].replace('_', '-')}, or name picture "
                             "and text by --input")
    return [(name, {"image": os.path.join(folder, name), **common}) for name in picture_files(folder)]


def file_requests(path, images=None):
    """Yields (name in messages, mapping) of a JSON-lines file, of a CSV or TSV file with a header, or of JSON lines from standard input (``-``).

    Args:
        path: the file; images: folder in which relative picture names are looked up, instead of the working directory.

    Raises:
        DataError: it cannot be read, or a line is malformed; the message names the line.
    """
    ending = os.path.splitext(path)[1].lower()
    try:
        with (sys.stdin if path == "-" else open(path, encoding="utf-8-sig", newline="")) as file:
            for name, request in _csv_rows(file, path, DELIMITERS[ending]) if ending in DELIMITERS else _json_rows(file, path):
                if images is not None and isinstance(request.get("image"), str):
                    request["image"] = os.path.join(images, request["image"])
                yield name, request
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _json_rows(file, path):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(request, dict):
            raise DataError(f"{path}:{number}: expected an object with image and texts")
        yield f"{path}:{number}", request


def _csv_rows(file, path, delimiter):
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        if not reader.fieldnames:
            raise DataError(f"{path}: is empty; the first line must name the columns (image, text or question, text_b)")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{path}:{reader.line_num}: has {'more' if None in row else 'fewer'} fields than the {len(reader.fieldnames)} columns")
            yield f"{path}:{reader.line_num}", {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not readable as a table ({error})") from None


def answer_all(predictor, requests, writer, batch_size=32, skip_bad=False, bar=None):
    """Predict for all requests in order and write every result with the inputs it belongs to.

    Args:
        predictor: ``Predictor``; requests: iterable of (name, mapping); an ``id`` in the mapping is passed on to the result.
        writer: function of a mapping; batch_size: inputs per forward.
        skip_bad: write a wrong input with its ``error`` and go on; else the first one ends it.
        bar: a progress bar.

    Returns:
        numbers of inputs and of wrong ones.

    Raises:
        UserInputError: a wrong input, without ``skip_bad``.
    """
    done, wrong, requests = 0, 0, iter(requests)
    while True:
        block = list(itertools.islice(requests, batch_size))
        if not block:
            return done, wrong
        for (_, request), result in zip(block, _answers(predictor, block, skip_bad)):
            wrong += isinstance(result, UserInputError)
            writer({**request, **({"error": str(result)} if isinstance(result, UserInputError) else result.to_json())})
        done += len(block)
        if bar is not None:
            bar.update(len(block))


def _answers(predictor, block, skip_bad):
    try:
        inputs = [{name: value for name, value in request.items() if name != "id"} for _, request in block]
        return predictor.predict_batch(inputs, len(block), [name for name, _ in block])
    except UserInputError as error:
        if not skip_bad:
            raise
        if len(block) == 1:
            return [error]
    # somewhere in the block is a wrong input: halving finds it and keeps most of the batch together
    middle = len(block) // 2
    return _answers(predictor, block[:middle], True) + _answers(predictor, block[middle:], True)


class Output:
    """Where results go: standard output as JSON lines, or a file that appears when it is complete (CSV or TSV by its ending, else JSON lines).

    Use as a context manager; an error inside leaves no file behind.
    """

    def __init__(self, path=None):
        self.path, self._file, self._rows = path, None, []
        self._delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower()) if path else None

    def __enter__(self):
        if self.path:
            self._temporary = f"{self.path}.tmp{os.getpid()}"
            try:
                self._file = open(self._temporary, "w", encoding="utf-8", newline="")
            except OSError as error:
                raise UserInputError(f"--output {self.path}: cannot be written: {error.strerror}") from None
        return self

    def __call__(self, row):
        if self._delimiter:
            self._rows.append(row)  # the columns are known when all rows are
        else:
            print(json.dumps(row, ensure_ascii=False), file=self._file or sys.stdout, flush=self._file is None)

    def __exit__(self, kind, error, trace):
        if self._file is None:
            return
        try:
            with self._file:
                if kind is None and self._delimiter:
                    columns = list(dict.fromkeys(name for row in self._rows for name in row))
                    table = csv.DictWriter(self._file, columns, delimiter=self._delimiter, restval="", lineterminator="\n")
                    table.writeheader()
                    table.writerows({name: _cell(value) for name, value in row.items()} for row in self._rows)
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            if os.path.exists(self._temporary):
                os.remove(self._temporary)


def _cell(value):
    """A value as a field of a table: lists and mappings as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
