"""Tokens per second of ``Tokenizer`` against byte-level BPE in plain Python, as the authors' code has it."""
import pickle
import re
import tempfile
from functools import lru_cache
from pathlib import Path

from bench import ROOT, alternate, compare

from unimo2_paddle.data.tokenizer import Tokenizer, train_vocabulary

WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class PlainBpe:
    """GPT-2's algorithm: of a word's neighbouring pairs the one learnt first is joined, until none is left; ``remember`` words or not."""

    def __init__(self, directory, remember):
        import json

        encoder = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
        lines = (directory / "vocab.txt").read_text(encoding="utf-8").split()
        line_of = {line: number for number, line in enumerate(lines)}
        self.ids = {piece: line_of[str(key)] for piece, key in encoder.items()}
        merges = (directory / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
        kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.chars = {byte: chr(byte) for byte in kept}
        self.chars.update({byte: chr(256 + place) for place, byte in enumerate(b for b in range(256) if b not in self.chars)})
        self.word = lru_cache(None)(self.join) if remember else self.join

    def join(self, word):
        parts = [self.chars[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = set(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, float("inf")))
            if best not in self.ranks:
                break
            joined, place = [], 0
            while place < len(parts):
                both = tuple(parts[place: place + 2]) == best
                joined.append("".join(best) if both else parts[place])
                place += 1 + both
            parts = joined
        return [self.ids[part] for part in parts]

    def encode(self, text):
        return [i for word in WORDS.findall(text) for i in self.word(word)]


def sentences():
    """English sentences: the repository's documentation, without what is not ASCII (the plain side splits words by simpler rules)."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]))
    return [sentence for sentence in re.split(r"(?<=[.!?:])\s+|\n+", text) if sentence.isascii() and len(sentence) > 20]


def measure(options):
    texts = sentences()
    with tempfile.TemporaryDirectory() as directory:
        ours = train_vocabulary(texts, directory, size=4000 if options.size == "tiny" else 8000)
        ours = Tokenizer.from_directory(directory)
        plain, remembering = (PlainBpe(Path(directory), remember) for remember in (False, True))
        expected = [plain.encode(text) for text in texts]
        equal = ours.encode_batch(texts) == expected
    tokens, rounds = sum(map(len, expected)), max(5, options.repeats)
    unused = iter([pickle.loads(pickle.dumps(ours)) for _ in range(rounds + 1)])  # a copy has met no word yet
    times = alternate({"ours": lambda: ours.encode_batch(texts), "first": lambda: next(unused).encode_batch(texts),
                       "plain": lambda: [plain.encode(text) for text in texts],
                       "remembering": lambda: [remembering.encode(text) for text in texts]}, rounds)
    what = f"{len(texts)} English sentences, {tokens} tokens; ids {'identical' if equal else 'DIFFERENT'}."
    return [
        compare("tokenizer against byte-level BPE in Python", times["ours"], times["plain"], "tokens/s", amount=tokens, at_least=20 if equal else 1e9,
                note=f"{what} Ours remembers the words of ASCII texts, the Python side works every word out."),
        compare("tokenizer, words not met before", times["first"], times["plain"], "tokens/s", amount=tokens,
                note="A new tokenizer's first pass over the same sentences."),
        compare("tokenizer against BPE in Python that remembers words too", times["ours"], times["remembering"], "tokens/s", amount=tokens,
                note="Both have met every word; what is left is splitting into words."),
    ]
