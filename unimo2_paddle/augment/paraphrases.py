"""Paraphrase lists and back-translations, looked up by caption or by record key without holding the texts in memory.

A file is JSON lines, ``{"text": CAPTION or "key": RECORD KEY, "paraphrases": [TEXT, ...]}``, or tab-separated lines ``CAPTION, PARAPHRASE,
PARAPHRASE ...`` (``paste captions.txt back_translated.txt`` makes one of two line-parallel files). Captions are compared by their words.
"""
import json
import os
import zlib

import numpy as np

from unimo2_paddle.augment.text_index import words
from unimo2_paddle.errors import DataError


class ParaphraseFile:
    """One file; keeps 16 bytes a line in memory.

    Args:
        path: ending in .jsonl, or else tab-separated.

    Raises:
        DataError: it cannot be read, or a line (named as file:line) is malformed.
    """

    def __init__(self, path):
        self.path, self._json = os.fspath(path), str(path).endswith((".jsonl", ".json"))
        hashes, offsets, position = [], [], 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        entry = self._parse(line, number)
                        hashes.append(_hash(entry[0]))
                        offsets.append(position)
                    position += len(line)
        except OSError as error:
            raise DataError(f"{self.path}: cannot read the paraphrases: {error.strerror}") from None
        if not hashes:
            raise DataError(f"{self.path}: no paraphrase in this file")
        hashes, offsets = np.array(hashes, np.uint64), np.array(offsets, np.int64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._offsets = hashes[order], offsets[order]

    def __len__(self):
        return len(self._hashes)

    def of(self, key, caption):
        """The paraphrases listed for a caption or for its record's key, in file order."""
        found = []
        for name in (("text", " ".join(words(caption))), ("key", key)):
            value = np.uint64(_hash(name))
            first, last = np.searchsorted(self._hashes, value), np.searchsorted(self._hashes, value, side="right")
            for offset in sorted(self._offsets[first:last]):
                with open(self.path, "rb") as file:
                    file.seek(int(offset))
                    other, paraphrases = self._parse(file.readline(), 0)
                if other == name:
                    found += paraphrases
        return found

    def _parse(self, raw, number):
        """((what, name), paraphrases) of a line."""
        try:
            line = raw.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"{self.path}:{number}: not UTF-8 text") from None
        if not self._json:
            caption, *paraphrases = line.split("\t")
            if not paraphrases:
                raise DataError(f"{self.path}:{number}: no tab; a line is a caption, a tab and its paraphrases separated by tabs")
            return ("text", " ".join(words(caption))), [text.strip() for text in paraphrases if text.strip()]
        try:
            entry = json.loads(line)
            paraphrases = entry["paraphrases"]
            name = ("key", entry["key"]) if "key" in entry else ("text", " ".join(words(entry["text"])))
            if not isinstance(name[1], str) or not isinstance(paraphrases, list) or not all(isinstance(text, str) for text in paraphrases):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f'{self.path}:{number}: a line is {{"text" or "key": ..., "paraphrases": [texts]}}') from None
        return name, [text.strip() for text in paraphrases if text.strip()]


def _hash(name):
    data = "\0".join(name).encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data)
