"""Byte-level BPE with the authors' numbering: text <-> vocabulary ids.

Three files make a vocabulary, in the formats the authors released:

- ``encoder.json``: GPT-2's table ``{piece: piece id}``, pieces written in the byte alphabet (a space is ``Ġ``);
- ``vocab.bpe``: a ``#version`` line, then one merge ``left right`` per line, most important first;
- ``vocab.txt``: the line number (from 0) is the model's id, the line holds a GPT-2 piece id or the name of a special token.

The merging runs in the ``tokenizers`` library; the mapping, the checks and the files are ours. Text is taken as it is: no
lower-casing, no normalisation, no space added in front (reference: unimo2.md section 1.2, unimo1.md section 2).
"""
import json
import os
import re
import unicodedata
from itertools import chain
from typing import Iterable, List, Tuple

import numpy as np
from tokenizers import Tokenizer as BpePipeline
from tokenizers import models, pre_tokenizers, trainers

from unimo2_paddle.errors import VocabularyError
from unimo2_paddle.paths import PathLike

FILE_NAMES = ("vocab.txt", "encoder.json", "vocab.bpe")
REQUIRED_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")


def _byte_alphabet():
    """GPT-2's printable stand-in for every byte value: ``{byte: character}``."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}
# GPT-2's words of an ASCII text; those of other texts are found by the library, which knows Unicode's letters and digits.
_ASCII_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_WORDS_KEPT, _LONGEST_KEPT = 1 << 16, 64


class _Words(dict):
    """Ids of every word met before; merging never crosses a word's border, so a word has the same ids wherever it stands."""

    def __init__(self, bpe):
        super().__init__()
        self._bpe = bpe

    def __missing__(self, word):
        ids = self._bpe.encode(word).ids
        if len(self) < _WORDS_KEPT and len(word) <= _LONGEST_KEPT:
            self[word] = ids
        return ids


class Tokenizer:
    """The authors' tokenizer; with the released vocabulary its ids are equal to theirs for any text.

    Letters and digits are those of the Unicode version inside the ``tokenizers`` library, the authors' were those of
    Unicode 13: around characters younger than that, word starts can differ (the ids do not: every character was checked).
    An instance can be pickled and shared by forked workers, and it needs its files only while it is built.

    Args:
        vocab_file: path of ``vocab.txt``.
        encoder_json: path of ``encoder.json``.
        vocab_bpe: path of ``vocab.bpe``.

    Raises:
        VocabularyError: a file is missing or malformed, or the three disagree.
    """

    def __init__(self, vocab_file: PathLike, encoder_json: PathLike,
                 vocab_bpe: PathLike) -> None:
        piece_ids = _read_encoder(encoder_json)
        merges = _read_merges(vocab_bpe, piece_ids, encoder_json)
        tokens, is_special = _read_vocab(vocab_file, piece_ids, encoder_json)
        self._build(tokens, is_special, merges)

    @classmethod
    def from_directory(cls, directory: PathLike) -> "Tokenizer":
        """The tokenizer whose three files are in ``directory``: ``vocab.txt`` ... or the authors' ``<prefix>.vocab.txt`` ...

        Raises:
            VocabularyError: no vocabulary, or several, in the directory.
        """
        return cls(*vocabulary_files(directory))

    def _build(self, tokens, is_special, merges):
        self._tokens = tokens  # [V] piece in the byte alphabet, or name of a special token
        self._is_special = is_special  # [V] bool
        self._merges = merges
        self.vocab_size = len(tokens)
        self.special_ids = tuple(i for i, special in enumerate(is_special) if special)
        special = {tokens[i]: i for i in self.special_ids}
        self.cls_id, self.pad_id, self.sep_id, self.unk_id, self.mask_id = (special[name] for name in REQUIRED_SPECIALS)
        self._piece_bytes = [b"" if s else _to_bytes(t) for t, s in zip(tokens, is_special)]
        # The library gets the authors' ids at once, so nothing has to be mapped per text.
        piece_to_id = {token: i for i, token in enumerate(tokens) if not is_special[i]}
        self._bpe = BpePipeline(models.BPE(piece_to_id, merges))
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._words = _Words(self._bpe)

    def __getstate__(self):
        return self._tokens, self._is_special, self._merges

    def __setstate__(self, state):
        self._build(*state)

    def encode(self, text: str) -> List[int]:
        """Vocabulary ids of a text, without special tokens. A lone surrogate counts as U+FFFD.

        Args:
            text: str of any length, may be empty.

        Returns:
            list of int.
        """
        if isinstance(text, str) and text.isascii():  # a look-up per word is four times as fast as a call of the library per text
            return list(chain.from_iterable(map(self._words.__getitem__, _ASCII_WORD.findall(text))))
        return self._bpe.encode(_without_surrogates(text)).ids

    def encode_batch(self, texts: Iterable[str]) -> List[List[int]]:
        """``encode`` for every text: list of lists of int."""
        # One thread on purpose: the library's thread pool must not exist before data workers are forked.
        return [self.encode(text) for text in texts]

    def encode_with_word_starts(self, text: str) -> Tuple[List[int], List[bool]]:
        """Vocabulary ids of a text and which of them begin a word.

        A word is a chunk of GPT-2's pre-tokenisation: a run of letters, of digits or of other signs, each with the space
        before it; a contraction's ending (``'s``); or a run of white space.

        Returns:
            (ids, starts): list of int and list of bool of equal length.
        """
        if isinstance(text, str) and text.isascii():
            words = [self._words[word] for word in _ASCII_WORD.findall(text)]
            return list(chain.from_iterable(words)), [number == 0 for ids in words for number in range(len(ids))]
        encoding = self._bpe.encode(_without_surrogates(text))
        words = encoding.word_ids
        return encoding.ids, [word != previous for word, previous in zip(words, [None] + words)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of vocabulary ids; special tokens are dropped, bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: iterable of int (a list, a numpy array).

        Raises:
            VocabularyError: an id is outside the vocabulary.
        """
        parts = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise VocabularyError(f"id {i} is outside the vocabulary of {self.vocab_size} entries: "
                                      f"the ids were made with another vocabulary")
            parts.append(self._piece_bytes[i])
        return b"".join(parts).decode("utf-8", errors="replace")

    def word_start_table(self) -> np.ndarray:
        """Which vocabulary entries begin a word, for data that come as ids without their text.

        A piece begins a word when its first character is white space or neither letter nor digit; special tokens do too.
        The first token of a text begins a word whatever its piece is. Unlike ``encode_with_word_starts`` this cannot tell
        a word right after an opening bracket, nor a sign in the middle of a run of signs.

        Returns:
            bool ndarray [V].
        """
        begins = [special or _begins_word(piece) for special, piece in zip(self._is_special, self._piece_bytes)]
        return np.array(begins, dtype=bool)


def vocabulary_files(directory):
    """Paths of (vocab.txt, encoder.json, vocab.bpe) in a directory, with or without a common ``<prefix>.``

    Raises:
        VocabularyError: the directory is missing, holds no vocabulary or several.
    """
    directory = os.fspath(directory)
    try:
        present = set(os.listdir(directory))
    except OSError as error:
        raise VocabularyError(f"{directory}: cannot read the vocabulary directory ({error.strerror})") from error
    prefixes = sorted({name[:-len(end)] for name in present for end in FILE_NAMES
                       if name == end or name.endswith("." + end)})
    if "" in prefixes:
        prefixes = [""]
    if not prefixes:
        raise VocabularyError(f"{directory}: no vocabulary here; expected {', '.join(FILE_NAMES)}")
    if len(prefixes) > 1:
        names = ", ".join(prefix + FILE_NAMES[0] for prefix in prefixes)
        raise VocabularyError(f"{directory}: several vocabularies ({names}); name the three files instead")
    missing = [prefixes[0] + end for end in FILE_NAMES if prefixes[0] + end not in present]
    if missing:
        raise VocabularyError(f"{directory}: the vocabulary is incomplete, {', '.join(missing)} missing")
    return tuple(os.path.join(directory, prefixes[0] + end) for end in FILE_NAMES)


def vocabulary_keys(directory):
    """``{key: id}`` of ``vocab.txt`` in a directory: GPT-2 piece ids as texts, and special tokens; files of the authors are written in these.

    Raises:
        VocabularyError: see :func:`vocabulary_files`.
    """
    return {line.strip(): number for number, line in enumerate(_read_text(vocabulary_files(directory)[0]).rstrip().split("\n"))}


def train_vocabulary(texts, directory, size=512):
    """Train a small byte-level BPE and store it as ``vocab.txt``, ``encoder.json`` and ``vocab.bpe``.

    The same texts give the same files. When the texts do not offer enough merges, ``madeupwordNNNN`` lines fill the
    vocabulary up to ``size``, as in the released one.

    Args:
        texts: iterable of str.
        directory: where to write; made if it does not exist.
        size: number of vocabulary entries including 5 special tokens and 256 bytes; at least 261.

    Returns:
        the ``Tokenizer`` of the written files.

    Raises:
        VocabularyError: ``size`` is too small or the directory cannot be written.
    """
    smallest = len(_BYTE_TO_CHAR) + len(REQUIRED_SPECIALS)
    if size < smallest:
        raise VocabularyError(f"a vocabulary of {size} entries is too small: special tokens and single bytes alone need "
                              f"{smallest}")
    pipeline = BpePipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=size - len(REQUIRED_SPECIALS), min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(_CHAR_TO_BYTE))
    pipeline.train_from_iterator((_without_surrogates(text) for text in texts), trainer)
    pieces = sorted(_CHAR_TO_BYTE)
    merges = []
    made = set(pieces)
    for left, right in json.loads(pipeline.to_str())["model"]["merges"]:
        if left + right in made:  # the trainer may reach a piece in two ways; the first is enough
            continue
        made.add(left + right)
        pieces.append(left + right)
        merges.append(f"{left} {right}")
    *first, last = REQUIRED_SPECIALS
    lines = first + [str(i) for i in range(len(pieces))]
    lines += [f"madeupword{n:04d}" for n in range(size - len(lines) - 1)] + [last]
    _write_files(directory, {
        "vocab.txt": "\n".join(lines) + "\n",
        "encoder.json": json.dumps({piece: i for i, piece in enumerate(pieces)}),
        "vocab.bpe": "\n".join(["#version: 0.2"] + merges) + "\n",
    })
    return Tokenizer.from_directory(directory)


def _write_files(directory, contents):
    """Write several text files: all of them completely before the first one appears under its name."""
    temporary = {}
    try:
        os.makedirs(directory, exist_ok=True)
        for name, content in contents.items():
            temporary[name] = os.path.join(directory, f".{name}.{os.getpid()}.tmp")
            with open(temporary[name], "w", encoding="utf-8", newline="\n") as file:
                file.write(content)
        for name in contents:
            os.replace(temporary[name], os.path.join(directory, name))
    except OSError as error:
        for path in temporary.values():
            if os.path.exists(path):
                os.remove(path)
        raise VocabularyError(f"{directory}: cannot write the vocabulary ({error.strerror})") from error


def _without_surrogates(text):
    """``text`` with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it has a UTF-8 form."""
    if not isinstance(text, str):
        raise TypeError(f"text must be str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _to_bytes(piece):
    return bytes(_CHAR_TO_BYTE[char] for char in piece)


def _begins_word(piece):
    for length in range(1, 5):  # the first character is the shortest prefix that is UTF-8
        try:
            first = piece[:length].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return unicodedata.category(first)[0] not in "LN"
    return False


def _read_text(path):
    try:
        with open(path, "r", encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise VocabularyError(f"{path}: cannot read the vocabulary file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path}: not a UTF-8 text file (byte {error.start})") from error


def _some(items):
    """The first few items, for an error message."""
    items = list(items)
    return ", ".join(map(repr, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _read_encoder(path):
    """``encoder.json`` as ``{piece: piece id}``, checked on its own."""
    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            seen = set()
            repeated = [key for key, _ in pairs if key in seen or seen.add(key)]
            raise VocabularyError(f"{path}: repeated pieces: {_some(repeated)}")
        return dict(pairs)

    try:
        table = json.loads(_read_text(path), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{path}: not JSON ({error})") from error
    if not isinstance(table, dict):
        raise VocabularyError(f"{path}: expected one JSON object that maps pieces to ids")
    wrong = [piece for piece, i in table.items() if type(i) is not int or i < 0]
    if wrong:
        raise VocabularyError(f"{path}: the ids of these pieces are not integers >= 0: {_some(wrong)}")
    if len(set(table.values())) != len(table):
        seen = set()
        repeated = [i for i in table.values() if i in seen or seen.add(i)]
        raise VocabularyError(f"{path}: ids given to several pieces: {_some(repeated)}")
    foreign = [piece for piece in table if not piece or not _CHAR_TO_BYTE.keys() >= set(piece)]
    if foreign:
        raise VocabularyError(f"{path}: pieces that are empty or not written in the byte alphabet: {_some(foreign)}")
    lacking = [byte for byte, char in _BYTE_TO_CHAR.items() if char not in table]
    if lacking:
        raise VocabularyError(f"{path}: {len(lacking)} of the 256 single-byte pieces are missing, the first is byte "
                              f"0x{min(lacking):02x}: some text could not be encoded")
    return table


def _read_merges(path, piece_ids, encoder_path):
    """``vocab.bpe`` as a list of (left, right), checked against the pieces."""
    lines = _read_text(path).split("\n")
    if not lines[0].startswith("#version"):
        raise VocabularyError(f"{path}:1: the first line must begin with '#version'")
    if lines[-1] != "":
        raise VocabularyError(f"{path}:{len(lines)}: the last line has no line end: the file may be cut off")
    merges = []
    merge_lines = {}  # (left, right) -> line number
    last_made = dict.fromkeys(_CHAR_TO_BYTE, 0)  # piece -> last line that makes it
    for number, line in enumerate(lines[1:-1], start=2):
        merge = tuple(line.rstrip("\r").split(" "))
        if len(merge) != 2 or "" in merge:
            raise VocabularyError(f"{path}:{number}: expected two pieces with one space between, found {line!r}")
        if merge in merge_lines:
            raise VocabularyError(f"{path}:{number}: {line!r} was already on line {merge_lines[merge]}")
        for piece in merge:
            if piece not in last_made:
                raise VocabularyError(f"{path}:{number}: no line above makes the piece {piece!r}")
        whole = "".join(merge)
        if whole not in piece_ids:
            raise VocabularyError(f"{path}:{number}: the merge result {whole!r} is not in {encoder_path}: "
                                  f"the files belong to different vocabularies")
        merges.append(merge)
        merge_lines[merge] = last_made[whole] = number
    # Merging one pair at a time (the library) equals merging all equal pairs at once (the authors) only under this order.
    for merge, number in merge_lines.items():
        for piece in merge:
            if last_made[piece] > number:
                raise VocabularyError(f"{path}:{last_made[piece]}: makes {piece!r}, which line {number} already uses; "
                                      f"delete this later line")
    return merges


def _read_vocab(path, piece_ids, encoder_path):
    """``vocab.txt`` as (tokens, is_special): one entry per id, GPT-2 ids replaced by their pieces."""
    lines = [line.strip() for line in _read_text(path).rstrip().split("\n")]
    pieces = {str(i): piece for piece, i in piece_ids.items()}
    tokens, is_special = [], []
    first_seen = {}
    for number, line in enumerate(lines, start=1):
        if not line or len(line.split()) != 1:
            raise VocabularyError(f"{path}:{number}: expected one piece id or special token, found {line!r}")
        if line in first_seen:
            raise VocabularyError(f"{path}:{number}: {line!r} was already on line {first_seen[line]}")
        first_seen[line] = number
        if line.isdigit() and line not in pieces:
            raise VocabularyError(f"{path}:{number}: {encoder_path} has no piece with id {line}: "
                                  f"the files belong to different vocabularies")
        tokens.append(pieces.get(line, line))
        is_special.append(line not in pieces)
    absent = [name for name in REQUIRED_SPECIALS if name not in first_seen]
    if absent:
        raise VocabularyError(f"{path}: special tokens missing: {', '.join(absent)}")
    lacking = [i for i in sorted(piece_ids.values()) if str(i) not in first_seen]
    if lacking:
        raise VocabularyError(f"{path}: piece ids of {encoder_path} missing: {_some(lacking)}")
    return tokens, is_special
