"""An index of captions on disk, searched by TF-IDF cosine or BM25 with bounded memory.

Terms are words and pairs of neighbouring words, hashed to ``FEATURES`` columns; postings (caption number, count) are memory-mapped.
TF-IDF uses words and pairs, BM25 words alone (k1 1.2, b 0.75, idf ln(1 + (N - n + 0.5) / (n + 0.5)); Robertson and Zaragoza 2009).

A search reads the query's rarest terms first until ``budget`` postings are used up; the ``POOL`` best captions so far then get the
scores of the remaining, common terms as well. While the budget lasts the result is exact.
"""
import hashlib
import json
import os
import re
import shutil
import unicodedata

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from unimo2_paddle.augment.lexicon import Lexicon
from unimo2_paddle.augment.parsing import SceneParser
from unimo2_paddle.augment.parts import MANIFEST, Parts, read_manifest, write_json
from unimo2_paddle.augment.tables import TextColumn, TextColumnWriter, open_array, open_column
from unimo2_paddle.augment.vocabulary import Vocabulary, VocabularyCounts, merge_vocabulary
from unimo2_paddle.errors import DataError

FEATURES = 1 << 20
POOL = 1000
BUDGET = 100000
K1, B = 1.2, 0.75
_BATCH = 20000  # captions turned into terms at once
_STEP = 1 << 22  # postings worked on at once
_WORD = re.compile(r"[^\W_]+")
WHAT = "text index"
_SYNONYMS = "synonyms.txt"


def words(text):
    """The words of a text for comparing and indexing: NFKC, case folded, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _words_and_pairs(text):
    found = words(text)
    return found + [one + " " + other for one, other in zip(found, found[1:])]


def _vectorizer(analyzer):
    return HashingVectorizer(analyzer=analyzer, n_features=FEATURES, alternate_sign=False, norm=None, dtype=np.float32)


def build_text_index(directory, source, share, synonyms=None):
    """Write the index of all captions of a source; see ``Parts`` for sharing and resuming.

    Args:
        directory: to write; source: a ``Source``; share: a ``ProcessShare``; synonyms: synonyms file of the ``Lexicon``, or None; a copy is
            kept with the index, because rewriting needs the same words.

    Returns:
        the manifest, or None while other processes' parts are missing.

    Raises:
        DataError: no caption, or too many bad records.
    """
    parser, shards = SceneParser(Lexicon.load(synonyms)), source.shards()
    groups = ""
    if synonyms:
        with open(synonyms, encoding="utf-8-sig") as file:
            groups = file.read()
    parts = Parts(directory, {"what": WHAT, "features": FEATURES, "synonyms": groups})
    parts.run(shards, share, lambda records, target: _make_part(records, target, parser))
    return parts.finish(shards, {"sources": list(source.paths)}, lambda names: _merge(parts, names, groups))


def _make_part(records, target, parser):
    vocabulary, vectorizer = VocabularyCounts(), _vectorizer(_words_and_pairs)
    texts, owners, keys, empty, unparsed = [], [], [], 0, 0
    for record in records:
        keys.append(record.key)
        captions = [caption for caption in record.captions if words(caption)]
        empty += not captions
        for caption in captions:
            texts.append(caption)
            owners.append(len(keys) - 1)
            scene = parser.parse(caption)
            unparsed += not scene
            vocabulary.note(scene)
    blocks = [vectorizer.transform(texts[first:first + _BATCH]) for first in range(0, len(texts), _BATCH)]
    data, ends = TextColumn.arrays(texts)
    key_data, key_ends = TextColumn.arrays(keys)
    counts = [np.minimum(block.data, 255).astype(np.uint8) for block in blocks]
    with open(target(".npz"), "wb") as file:
        np.savez(file, texts=data, text_ends=ends, keys=key_data, key_ends=key_ends, owners=np.array(owners, np.int32),
                 lengths=np.array([min(len(words(text)), 65535) for text in texts], np.uint16),
                 row_sizes=np.concatenate([np.diff(block.indptr) for block in blocks] or [np.zeros(0)]).astype(np.int32),
                 columns=np.concatenate([block.indices for block in blocks] or [np.zeros(0)]).astype(np.int32),
                 counts=np.concatenate(counts or [np.zeros(0, np.uint8)]))
    with open(target(".vocabulary.json"), "w", encoding="utf-8") as file:
        json.dump(vocabulary.to_json(), file, ensure_ascii=False)
    return {"records": len(keys), "captions": len(texts), "records_without_caption": empty, "captions_without_content": unparsed}


def _merge(parts, names, synonyms):
    """Joins the parts: a pass that counts, a pass that places every posting, one that sums the norms; a part at a time in memory."""
    folder = os.path.join(parts.directory, "index")
    temporary = folder + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    texts, keys = TextColumnWriter(temporary, "texts"), TextColumnWriter(temporary, "keys")
    owners, lengths, firsts, records, frequency = [], [], [], 0, np.zeros(FEATURES, np.int64)
    for name in names:
        with np.load(parts.path(name, ".npz"), allow_pickle=False) as part:
            texts.add(part["texts"], part["text_ends"])
            keys.add(part["keys"], part["key_ends"])
            owners.append(part["owners"] + np.int32(records))
            lengths.append(part["lengths"])
            firsts.append(records)
            records += len(part["key_ends"])
            frequency += np.bincount(part["columns"], minlength=FEATURES)
    texts.close()
    keys.close()
    lengths = np.concatenate(lengths)
    if not len(lengths):
        raise DataError(f"{parts.directory}: the source has no caption with a word; nothing to index")
    starts = np.concatenate([[0], np.cumsum(frequency)])
    for name, values in (("starts", starts), ("owners", np.concatenate(owners)), ("lengths", lengths)):
        np.save(os.path.join(temporary, name + ".npy"), values)
    _place_postings(parts, names, temporary, starts)
    np.save(os.path.join(temporary, "norms.npy"), _norms(temporary, starts, len(lengths)))
    with open(os.path.join(temporary, _SYNONYMS), "w", encoding="utf-8") as file:
        file.write(synonyms)
    write_json(os.path.join(temporary, "vocabulary.json"), _merge_vocabulary(parts, names).to_json())
    write_json(os.path.join(temporary, "about.json"), {"shards": names, "first_records": firsts, "captions": len(lengths), "records": records})
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


def _merge_vocabulary(parts, names):
    def load():
        for name in names:
            with open(parts.path(name, ".vocabulary.json"), encoding="utf-8") as file:
                yield json.load(file)

    return merge_vocabulary(load)


def _place_postings(parts, names, folder, starts):
    total = int(starts[-1])
    docs = np.lib.format.open_memmap(os.path.join(folder, "docs.npy"), "w+", np.int32, (total,))
    counts = np.lib.format.open_memmap(os.path.join(folder, "counts.npy"), "w+", np.uint8, (total,))
    free, first = starts[:-1].copy(), 0
    for name in names:
        with np.load(parts.path(name, ".npz"), allow_pickle=False) as part:
            columns, sizes, values = part["columns"], part["row_sizes"], part["counts"]
        rows = np.repeat(np.arange(first, first + len(sizes), dtype=np.int32), sizes)
        order = np.argsort(columns, kind="stable")
        columns = columns[order]
        present, begin, number = np.unique(columns, return_index=True, return_counts=True)
        places = free[columns] + np.arange(len(columns)) - np.repeat(begin, number)
        docs[places], counts[places] = rows[order], values[order]
        free[present] += number
        first += len(sizes)
    docs.flush()
    counts.flush()


def _norms(folder, starts, captions):
    docs, counts = open_array(folder, "docs.npy"), open_array(folder, "counts.npy")
    idf = _tfidf_idf(np.diff(starts), captions)
    squares = np.zeros(captions)
    for first in range(0, len(docs), _STEP):
        last = min(first + _STEP, len(docs))
        terms = np.searchsorted(starts, np.arange(first, last), side="right") - 1
        weights = (1 + np.log(counts[first:last].astype(np.float64))) * idf[terms]
        squares += np.bincount(docs[first:last], weights ** 2, minlength=captions)
    return np.sqrt(squares).astype(np.float32)


def _tfidf_idf(frequency, captions):
    return np.log((1 + captions) / (1 + frequency)) + 1  # smoothed, as scikit-learn's TfidfTransformer


class TextIndex:
    """A built index.

    Args:
        directory: what ``build_text_index`` wrote; budget: postings read per search.

    Raises:
        DataError: it is missing, unfinished or damaged.
    """

    def __init__(self, directory, budget=BUDGET):
        manifest = read_manifest(directory, WHAT)
        if manifest.get("what") != WHAT:
            raise DataError(f"{directory}: is a {manifest.get('what')}, not a {WHAT}")
        self.directory, self.sources, self.budget = directory, manifest.get("sources", []), budget
        self._folder = os.path.join(directory, "index")
        try:
            with open(os.path.join(self._folder, "about.json"), encoding="utf-8") as file:
                about = json.load(file)
            self.shards, self._firsts = about["shards"], np.array(about["first_records"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory}: no usable {WHAT} ({type(error).__name__}); build it again") from None
        self.texts, self.keys = open_column(self._folder, "texts"), open_column(self._folder, "keys")
        self._starts, self._docs, self._counts = (open_array(self._folder, name + ".npy") for name in ("starts", "docs", "counts"))
        self.owners = open_array(self._folder, "owners.npy")
        self._norms = np.array(open_array(self._folder, "norms.npy"))
        lengths = np.array(open_array(self._folder, "lengths.npy"), np.float32)
        self._length_terms = np.float32(K1) * (1 - B + B * lengths / max(lengths.mean(dtype=np.float64), 1e-9)).astype(np.float32)
        self._scores = np.zeros(len(lengths), np.float32)
        self._pairs, self._words = _vectorizer(_words_and_pairs), _vectorizer(words)

    def __len__(self):
        return len(self._scores)

    def fingerprint(self):
        """A short digest of what the index was built from."""
        with open(os.path.join(self.directory, MANIFEST), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:16]

    def lexicon(self):
        """The ``Lexicon`` that its captions were parsed with."""
        return Lexicon.load(os.path.join(self._folder, _SYNONYMS))

    def vocabulary(self):
        """The corpus ``Vocabulary``."""
        with open(os.path.join(self._folder, "vocabulary.json"), encoding="utf-8") as file:
            return Vocabulary.from_json(json.load(file))

    def record_of(self, caption):
        """(shard name, key) of a caption number."""
        owner = int(self.owners[caption])
        return self.shards[int(np.searchsorted(self._firsts, owner, side="right")) - 1], self.keys[owner]

    def bm25(self, text, number):
        """The captions that fit a text best.

        Args:
            text: the query; number: how many.

        Returns:
            (caption numbers int64 [M], scores float32 [M]), M <= number, best first; equal scores in the order of the index.
        """
        row = self._words.transform([text])
        captions = len(self)

        def contribution(term, count, docs, counts):
            frequency = self._starts[term + 1] - self._starts[term]
            idf = np.log(1 + (captions - frequency + 0.5) / (frequency + 0.5))
            counts = counts.astype(np.float32)
            return np.float32(idf * count * (K1 + 1)) * counts / (counts + self._length_terms[docs])

        return self._search(row, contribution, number)

    def tfidf(self, text, number):
        """As :meth:`bm25`, by the cosine of TF-IDF vectors of words and word pairs (1 + ln tf, smoothed idf)."""
        row = self._pairs.transform([text])
        idf = _tfidf_idf(self._frequency(row.indices), len(self))
        weights = (1 + np.log(row.data.astype(np.float64))) * idf
        norm = float(np.sqrt((weights ** 2).sum())) or 1.0
        own = {int(term): (weight / norm, factor) for term, weight, factor in zip(row.indices, weights, idf)}

        def contribution(term, count, docs, counts):
            weight, factor = own[term]
            return np.float32(weight * factor) * (1 + np.log(counts.astype(np.float32))) / self._norms[docs]

        return self._search(row, contribution, number)

    def _frequency(self, terms):
        return self._starts[terms + 1] - self._starts[terms]

    def _postings(self, term):
        first, last = int(self._starts[term]), int(self._starts[term + 1])
        return self._docs[first:last], self._counts[first:last]

    def _search(self, row, contribution, number):
        frequency = self._frequency(row.indices)
        used = sorted((int(n), int(term), float(count)) for n, term, count in zip(frequency, row.indices, row.data) if n)
        scores, touched, spent, rest = self._scores, [], 0, []
        for place, (size, term, count) in enumerate(used):
            if place and spent + size > self.budget:
                rest = used[place:]
                break
            docs, counts = self._postings(term)
            touched.append(docs[scores[docs] == 0])
            scores[docs] += contribution(term, count, docs, counts)
            spent += size
        if not touched:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        found = np.concatenate(touched)
        values = scores[found]
        scores[found] = 0
        if rest:
            chosen = _largest(found, values, max(POOL, number))
            found, values = found[chosen], values[chosen]
            order = np.argsort(found)
            found, values = found[order], values[order]
            for _, term, count in rest:
                docs, counts = self._postings(term)
                places = np.minimum(np.searchsorted(docs, found), len(docs) - 1)
                there = docs[places] == found
                values[there] += contribution(term, count, found[there], counts[places[there]])
        chosen = _largest(found, values, number)
        return found[chosen].astype(np.int64), values[chosen]


def _largest(docs, values, number):
    """Places of the ``number`` largest values, best first; equal values in the order of ``docs``."""
    number = min(number, len(values))
    if not number:
        return np.zeros(0, np.int64)
    border = np.partition(values, len(values) - number)[len(values) - number]
    places = np.flatnonzero(values >= border)
    return places[np.lexsort((docs[places], -values[places]))][:number]
