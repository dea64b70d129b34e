"""The tokenizer against an independent, slow byte-level BPE written here from the description of GPT-2's rules."""
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo2_paddle.data import tokenizer as tokenizer_module
from unimo2_paddle.data.tokenizer import FILE_NAMES, Tokenizer, train_vocabulary
from unimo2_paddle.errors import VocabularyError

TEXTS = [
    "a large red circle is left of the small blue square .", "Two small green triangles near a yellow star",
    "it's what they'd've done; we're sure he'll go, isn't it?", "in 1990 and 1995 there were 12,345 shapes (or 67.8%)",
    "naïve café über straße — “quotes” … größe", "红色的圆形 和 蓝色的方形", "красный круг и синий квадрат",
    "wow!!! ... ??? :-) 😀😀 👍🏽", "tabs\tand\n\nlines   and   spaces",
] * 3

WHITE_SPACE = set("\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(0x2000, 0x200b)}


def kind(char):
    """space, letter, number or sign: the four classes GPT-2's pre-tokenisation knows."""
    if char in WHITE_SPACE:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(char)[0], "sign")


def run_end(text, start):
    end = start
    while end < len(text) and kind(text[end]) == kind(text[start]):
        end += 1
    return end


def chunks_of(text):
    """GPT-2's words: contractions' endings, runs of one kind with the space before, runs of white space."""
    start = 0
    while start < len(text):
        ending = next((e for e in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(e, start)), None)
        body = start + (text[start] == " ")
        if ending:
            end = start + len(ending)
        elif body < len(text) and kind(text[body]) != "space":
            end = run_end(text, body)
        else:
            end = run_end(text, start)
            if end < len(text) and end - start > 1:
                end -= 1  # the last white space stays with what follows
        yield text[start:end]
        start = end


class SlowTokenizer:
    """Byte-level BPE from the three files; merges all equal pairs at once, best rank first."""

    def __init__(self, directory):
        encoder = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
        merges = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        lines = (directory / "vocab.txt").read_text(encoding="utf-8").split()
        line_of = {line: number for number, line in enumerate(lines)}
        self.ids = {piece: line_of[str(i)] for piece, i in encoder.items()}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.letters, spare = {}, 256
        for byte in range(256):
            self.letters[byte] = chr(byte)
            if not (33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174):
                self.letters[byte], spare = chr(spare), spare + 1

    def split(self, chunk):
        parts = [self.letters[byte] for byte in chunk.encode("utf-8")]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, 10**9))
            if best not in self.ranks:
                break
            merged, at = [], 0
            while at < len(parts):
                both = tuple(parts[at:at + 2]) == best
                merged.append("".join(best) if both else parts[at])
                at += 2 if both else 1
            parts = merged
        return parts

    def encode_with_word_starts(self, text):
        ids, starts = [], []
        for chunk in chunks_of(text):
            parts = self.split(chunk)
            ids += [self.ids[part] for part in parts]
            starts += [True] + [False] * (len(parts) - 1)
        return ids, starts


def shuffle_vocabulary_lines(directory):
    """Break the accidental 'id = piece id + 4' of a trained vocabulary; the last line stays [MASK]."""
    path = directory / "vocab.txt"
    lines = path.read_text(encoding="utf-8").split()
    middle = lines[4:-1]
    random.Random(7).shuffle(middle)
    path.write_text("\n".join(lines[:4] + middle + lines[-1:]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(TEXTS, directory, size=420)
    shuffle_vocabulary_lines(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return Tokenizer.from_directory(vocabulary)


@pytest.fixture(scope="module")
def slow(vocabulary):
    return SlowTokenizer(vocabulary)


ANY_CHARACTER = st.characters(blacklist_categories=("Cs", "Cn"))
SNIPPETS = st.sampled_from([" ", "  ", "\n", "\t ", "\xa0", "\u3000", "'s", "'LL", "'ve", " 're", "''", "red", " circle", "Rot",
                            "12", " 3.5", "!?", " ...", "é", "e\u0301", "ü", "的", "圆形", "😀", "👩‍👩‍👧", "👍🏽", "\u200d",
                            "²", "Ⅷ", "[MASK]", "<|endoftext|>", "Ġ", "\x00", "\x1c", "\ufeff", "\ufffd"])
ANY_TEXT = st.one_of(st.text(ANY_CHARACTER, max_size=40), st.lists(st.one_of(SNIPPETS, ANY_CHARACTER), max_size=25).map("".join))


@settings(max_examples=400, deadline=None)
@given(text=ANY_TEXT)
def test_ids_and_word_starts_equal_the_slow_tokenizer_for_any_text(tokenizer, slow, text):
    ids, starts = slow.encode_with_word_starts(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode_with_word_starts(text) == (ids, starts)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.one_of(st.sampled_from([" ", "  ", "\n", "\t ", "'s", "'LL", "'re", " '", "_", "red", " dot", "12", "!?", "\x1c", "\x0b"]),
                               st.characters(max_codepoint=127)), max_size=25).map("".join))
def test_words_met_before_have_the_ids_and_starts_of_the_slow_tokenizer(tokenizer, slow, text):
    expected = slow.encode_with_word_starts(text)
    for _ in range(2):  # the second time every word is known
        assert (tokenizer.encode(text), tokenizer.encode_with_word_starts(text)) == (expected[0], expected)


def test_a_tokenizer_remembers_a_limited_number_of_words(vocabulary, slow, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_WORDS_KEPT", 3)
    fresh, text = Tokenizer.from_directory(vocabulary), "a red dot and a green dot by a blue one"
    assert fresh.encode(text) == fresh.encode(text) == slow.encode_with_word_starts(text)[0]
    assert len(fresh._words) == 3 and fresh.encode("x" * 1000) and len(fresh._words) == 3


@settings(max_examples=30, deadline=None)
@given(corpus=st.lists(st.text("ab1! é", min_size=1, max_size=30), min_size=1, max_size=6), text=st.text("ab1! é", max_size=60))
def test_ids_equal_the_slow_tokenizer_for_any_trained_vocabulary(tmp_path_factory, corpus, text):
    directory = tmp_path_factory.mktemp("random")
    fast = train_vocabulary(corpus, directory, size=290)
    assert fast.encode(text) == SlowTokenizer(directory).encode_with_word_starts(text)[0]


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_of_unicode_survives_a_round_trip(tokenizer):
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 101)]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text, same_as", [
    ("\ud83d", "\ufffd"), ("a\udc00b", "a\ufffdb"), ("x \ud83d y", "x \ufffd y"), ("\ud83d\ude00", "😀")])
def test_surrogates_are_joined_or_replaced(tokenizer, text, same_as):
    assert tokenizer.encode(text) == tokenizer.encode(same_as)
    assert tokenizer.encode_with_word_starts(text) == tokenizer.encode_with_word_starts(same_as)


def test_text_that_is_not_str_is_refused(tokenizer):
    with pytest.raises(TypeError, match="must be str, not bytes"):
        tokenizer.encode(b"red")


def test_empty_text_has_no_tokens(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode_with_word_starts("") == ([], [])
    assert tokenizer.decode([]) == ""


def test_nothing_is_lower_cased_stripped_or_prefixed(tokenizer):
    assert tokenizer.encode("Red") != tokenizer.encode("red") != tokenizer.encode(" red")
    assert tokenizer.encode("red ") == tokenizer.encode("red") + tokenizer.encode(" ")


def test_batch_equals_single_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_tokens_have_the_vocabulary_line_as_id_and_are_dropped_in_decoding(tokenizer):
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1 == 419
    assert {0, 1, 2, 3, 419} <= set(tokenizer.special_ids)
    ids = tokenizer.encode("red circle")
    assert tokenizer.decode([0] + ids + [419, 2, 1, 1]) == "red circle"
    assert tokenizer.decode(np.array(ids, dtype=np.int64)) == "red circle"


def test_names_of_special_tokens_in_a_text_are_ordinary_text(tokenizer):
    assert not set(tokenizer.encode("[CLS] [MASK] [PAD]")) & set(tokenizer.special_ids)


def test_ids_cut_inside_a_character_decode_to_a_replacement_sign(tokenizer):
    ids = tokenizer.encode("鱼")
    assert len(ids) > 1 and tokenizer.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-1, 420, 50264])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(tokenizer, wrong):
    with pytest.raises(VocabularyError, match=f"id {wrong} is outside the vocabulary of 420"):
        tokenizer.decode([5, wrong])


@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000, "red circle 12 " * 20_000, "😀" * 60_000])
def test_very_long_texts_take_linear_time(tokenizer, text):
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 5
    assert tokenizer.decode(ids) == text


def test_a_pickled_tokenizer_needs_no_files(vocabulary, tokenizer, tmp_path, capfd):
    copied = tmp_path / "copy"
    shutil.copytree(vocabulary, copied)
    stored = pickle.dumps(Tokenizer.from_directory(copied))
    shutil.rmtree(copied)
    loaded = pickle.loads(stored)
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (loaded.vocab_size, loaded.special_ids) == (tokenizer.vocab_size, tokenizer.special_ids)
    assert capfd.readouterr() == ("", "")


def test_word_start_table_agrees_with_word_starts_on_plain_sentences(tokenizer):
    table = tokenizer.word_start_table()
    assert table.shape == (420,) and table.dtype == bool and table[list(tokenizer.special_ids)].all()
    for text in ["a large red circle is left of the small blue square .", "Two stars, one circle; it's red!",
                 "il était une fois: красный круг"]:
        ids, starts = tokenizer.encode_with_word_starts(text)
        assert [True] + table[ids[1:]].tolist() == starts


def test_importing_the_tokenizer_does_not_import_paddle():
    code = "import sys, unimo2_paddle.data.tokenizer as t, unimo2_paddle; assert unimo2_paddle.Tokenizer is t.Tokenizer; " \
           "sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- files --------------------------------------------------------------------------------------------------------------

def test_the_authors_prefixed_file_names_are_found(vocabulary, tokenizer, tmp_path):
    for name in FILE_NAMES:
        shutil.copy(vocabulary / name, tmp_path / f"roberta_base_en.{name}")
    assert Tokenizer.from_directory(str(tmp_path)).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    shutil.copy(vocabulary / "vocab.txt", tmp_path / "other.vocab.txt")
    with pytest.raises(VocabularyError, match="several vocabularies.*other.vocab.txt.*roberta_base_en.vocab.txt"):
        Tokenizer.from_directory(tmp_path)


def test_windows_line_ends_in_vocab_txt_change_nothing(vocabulary, tokenizer, tmp_path):
    copied = copy_of(vocabulary, tmp_path)
    for name in ("vocab.txt", "vocab.bpe"):
        (copied / name).write_bytes((copied / name).read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_directory(copied).encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def copy_of(vocabulary, tmp_path):
    return shutil.copytree(vocabulary, tmp_path / "copy")


def edit_text(name, change):
    def apply(directory):
        path = directory / name
        path.write_bytes(change(path.read_bytes()))
    return apply


def edit_json(change):
    def apply(directory):
        path = directory / "encoder.json"
        table = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(change(table) or table), encoding="utf-8")
    return apply


def drop_line(name, number):
    return edit_text(name, lambda data: b"\n".join(line for i, line in enumerate(data.split(b"\n")) if i != number))


def replace_line(name, number, line):
    return edit_text(name, lambda data: b"\n".join(line if i == number else old for i, old in enumerate(data.split(b"\n"))))


def append(name, tail):
    return edit_text(name, lambda data: data + tail)


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "encoder.json").unlink(), r"incomplete, encoder\.json missing"),
    (lambda d: [(d / name).unlink() for name in FILE_NAMES], "no vocabulary here; expected vocab.txt, encoder.json, vocab.bpe"),
    (lambda d: shutil.rmtree(d), "cannot read the vocabulary directory"),
    (edit_text("encoder.json", lambda data: data[:200]), r"encoder\.json: not JSON"),
    (edit_text("encoder.json", lambda data: b"[" * 100_000), r"encoder\.json: not JSON"),
    (edit_text("encoder.json", lambda data: b"[1, 2]"), r"encoder\.json: expected one JSON object"),
    (edit_text("encoder.json", lambda data: data[:-1] + b', "!": 900}'), r"encoder\.json: repeated pieces: '!'"),
    (edit_json(lambda table: table.update({"!": "0"})), r"encoder\.json: .*not integers >= 0: '!'"),
    (edit_json(lambda table: table.update({"!": table["#"]})), r"encoder\.json: ids given to several pieces"),
    (edit_json(lambda table: table.update({"two words": 999})), r"encoder\.json: .*byte alphabet: 'two words'"),
    (edit_json(lambda table: {p: i for p, i in table.items() if p != "!"}), r"encoder\.json: 1 of the 256.*0x21"),
    (edit_json(lambda table: table.update({"zzz": 999})), r"vocab\.txt: piece ids of .*encoder\.json missing: 999"),
    (edit_text("vocab.txt", lambda data: b"\xff\xfe" + data), r"vocab\.txt: not a UTF-8 text file"),
    (edit_text("vocab.txt", lambda data: b""), r"vocab\.txt:1: expected one piece id or special token, found ''"),
    (replace_line("vocab.txt", 2, b""), r"vocab\.txt:3: expected one piece id or special token"),
    (replace_line("vocab.txt", 5, b"13 850314647"), r"vocab\.txt:6: expected one piece id"),
    (append("vocab.txt", b"[SEP]\n"), r"vocab\.txt:421: '\[SEP\]' was already on line 3"),
    (append("vocab.txt", b"60000\n"), r"vocab\.txt:421: .*encoder\.json has no piece with id 60000"),
    (drop_line("vocab.txt", 0), r"vocab\.txt: special tokens missing: \[CLS\]"),
    (drop_line("vocab.txt", 419), r"vocab\.txt: special tokens missing: \[MASK\]"),
    (drop_line("vocab.txt", 100), r"vocab\.txt: piece ids of .*encoder\.json missing: \d+"),
    (drop_line("vocab.bpe", 0), r"vocab\.bpe:1: the first line must begin with '#version'"),
    (edit_text("vocab.bpe", lambda data: data[:-1]), r"vocab\.bpe:\d+: the last line has no line end"),
    (replace_line("vocab.bpe", 1, b"a b c"), r"vocab\.bpe:2: expected two pieces"),
    (replace_line("vocab.bpe", 1, b""), r"vocab\.bpe:2: expected two pieces"),
    (append("vocab.bpe", "Ġ a\n".encode()), r"vocab\.bpe:\d+: 'Ġ a' was already on line \d+"),
    (append("vocab.bpe", b"q q\n"), r"vocab\.bpe:\d+: the merge result 'qq' is not in .*encoder\.json"),
    (append("vocab.bpe", b"qqqq q\n"), r"vocab\.bpe:\d+: no line above makes the piece 'qqqq'"),
])
def test_damaged_or_disagreeing_files_are_named(vocabulary, tmp_path, damage, message):
    directory = copy_of(vocabulary, tmp_path)
    damage(directory)
    with pytest.raises(VocabularyError, match=message):
        Tokenizer.from_directory(directory)


def test_a_missing_file_is_named(vocabulary, tmp_path):
    with pytest.raises(VocabularyError, match="nowhere.bpe: cannot read the vocabulary file"):
        Tokenizer(vocabulary / "vocab.txt", vocabulary / "encoder.json", tmp_path / "nowhere.bpe")


def test_merges_in_an_order_the_library_would_read_differently_are_refused(tmp_path):
    directory = tmp_path / "v"
    train_vocabulary([], directory, size=270)
    edit_json(lambda table: table.update({"ab": 256, "bc": 257, "abc": 258, "abca": 259}))(directory)
    edit_text("vocab.txt", lambda data: data.replace(b"madeupword0000\nmadeupword0001\nmadeupword0002\nmadeupword0003",
                                                     b"256\n257\n258\n259"))(directory)
    (directory / "vocab.bpe").write_text("#version: 0.2\na b\nb c\nab c\nabc a\na bc\n", encoding="utf-8")
    with pytest.raises(VocabularyError, match=r"vocab\.bpe:6: makes 'abc', which line 5 already uses"):
        Tokenizer.from_directory(directory)


# --- training -----------------------------------------------------------------------------------------------------------

def test_training_is_deterministic_and_writes_the_three_files(tmp_path):
    for name in ("one", "two"):
        train_vocabulary(iter(TEXTS), tmp_path / name, size=400)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(FILE_NAMES)
    for name in FILE_NAMES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_trained_vocabulary_has_the_released_layout_and_the_asked_size(tmp_path):
    tokenizer = train_vocabulary(TEXTS, tmp_path, size=512)
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines[:4] == ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] and lines[-2:] == ["[MASK]", ""] and len(lines) == 513
    assert (tmp_path / "vocab.bpe").read_text(encoding="utf-8").startswith("#version: 0.2\n")
    assert tokenizer.vocab_size == 512
    assert len(tokenizer.encode("a large red circle")) < len("a large red circle") / 2
    tiny = train_vocabulary(["red"], tmp_path / "tiny", size=300)
    assert tiny.vocab_size == 300 and tiny.decode(tiny.encode("blue 😀")) == "blue 😀"
    assert "madeupword0000" in (tmp_path / "tiny" / "vocab.txt").read_text(encoding="utf-8")


def test_training_refuses_a_size_without_room_for_all_bytes(tmp_path):
    with pytest.raises(VocabularyError, match="260 entries is too small.*261"):
        train_vocabulary(TEXTS, tmp_path / "v", size=260)
    assert not (tmp_path / "v").exists()
    assert train_vocabulary(TEXTS, tmp_path / "v", size=261).vocab_size == 261


def test_training_into_an_unusable_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VocabularyError, match="file: cannot write the vocabulary"):
        train_vocabulary(TEXTS, tmp_path / "file", size=300)
    blocked = tmp_path / "blocked"
    (blocked / "encoder.json").mkdir(parents=True)
    with pytest.raises(VocabularyError, match="blocked: cannot write the vocabulary"):
        train_vocabulary(TEXTS, blocked, size=300)
    assert not [p.name for p in blocked.iterdir() if p.name.endswith(".tmp")]
