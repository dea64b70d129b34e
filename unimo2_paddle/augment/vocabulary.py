"""The words of a corpus by category, and which of one category occur in similar company: what a replacement is drawn from.

Similarity is the cosine of positive pointwise mutual information with the other words of the caption (hashed to ``CONTEXTS`` columns).
Categories of the lexicon (colours, sizes, relations ...) are small and closed; only open ones have similarity.
"""
import zlib
from collections import Counter, defaultdict

import numpy as np
from scipy import sparse

CONTEXTS = 4096
MAX_TERMS = 20000        # per category, the most frequent
PHRASES_PER_HEAD = 20
NEAR = 32                # similar terms kept per term
_CHUNK = 256             # terms compared with all others at once


class VocabularyCounts:
    """Counts over the captions of one part; ``merge_vocabulary`` joins parts.

    Attributes:
        terms: category -> Counter of terms (in captions); phrases: (category, head) -> Counter of noun phrases with attributes.
        context: (category, term) -> Counter of hashed context words.
    """

    def __init__(self):
        self.captions, self.terms = 0, defaultdict(Counter)
        self.phrases, self.context = defaultdict(Counter), defaultdict(Counter)

    def note(self, scene):
        """Count one caption's ``Scene``."""
        self.captions += 1
        found = set()
        for thing in scene.objects:
            found.add((thing.category, thing.name))
            if thing.phrase_start < thing.start:
                self.phrases[thing.category, thing.name][scene.text[thing.phrase_start:thing.end].lower()] += 1
            found.update((unit.category, unit.text) for unit in thing.attributes)
        found.update(("relation", relation.unit.text) for relation in scene.relations)
        found.update(("verb:" + action.unit.category, action.unit.text) for action in scene.actions)
        for category, term in found:
            self.terms[category][term] += 1
        if len(found) > 1:
            # crc32 instead of hash(): the same in every process
            columns = {(category, term): _column(term) for category, term in found}
            for entry in found:
                if is_open(entry[0]):
                    self.context[entry].update(column for other, column in columns.items() if other != entry)

    def add(self, stored):
        """Add terms and phrases of what ``to_json`` of another gave; rare terms are dropped when they become too many."""
        self.captions += stored["captions"]
        for category, terms in stored["terms"].items():
            self.terms[category].update(terms)
            if len(self.terms[category]) > 8 * MAX_TERMS:
                self.terms[category] = Counter(dict(top(self.terms[category], 4 * MAX_TERMS)))
        for category, heads in stored["phrases"].items():
            for head, phrases in heads.items():
                if head not in self.terms[category]:
                    continue
                kept = self.phrases[category, head]
                kept.update(phrases)
                if len(kept) > 4 * PHRASES_PER_HEAD:
                    self.phrases[category, head] = Counter(dict(top(kept, 2 * PHRASES_PER_HEAD)))
        for entry in [entry for entry in self.phrases if entry[1] not in self.terms[entry[0]]]:
            del self.phrases[entry]

    def to_json(self):
        """Plain values, in an order that does not depend on the order of counting."""
        context, phrases = defaultdict(dict), defaultdict(dict)
        for (category, term), columns in sorted(self.context.items()):
            context[category][term] = [number for pair in sorted(columns.items()) for number in pair]
        for (category, head), counts in sorted(self.phrases.items()):
            phrases[category][head] = dict(top(counts, 2 * PHRASES_PER_HEAD))
        return {"captions": self.captions, "terms": {category: dict(sorted(terms.items())) for category, terms in sorted(self.terms.items())},
                "phrases": phrases, "context": context}


def merge_vocabulary(parts):
    """The ``Vocabulary`` of a corpus.

    Args:
        parts: function that returns an iterator over what ``VocabularyCounts.to_json`` gave for each part; it is called twice: once to find the
            terms, once for the company of those that are kept. A part at a time is in memory.

    Terms seen less than 1 + captions / 50,000 times (at most 20) are left out: in a large corpus they are misspellings and taggers' errors.
    """
    counts = VocabularyCounts()
    for stored in parts():
        counts.add(stored)
    least = min(20, 1 + counts.captions // 50000)
    terms = {category: dict(top({t: n for t, n in found.items() if n >= least}, MAX_TERMS)) for category, found in sorted(counts.terms.items())}
    terms = {category: found for category, found in terms.items() if found}
    phrases = {category: {} for category in ("object", "objects")}
    for (category, head), found in sorted(counts.phrases.items()):
        if head in terms.get(category, ()):
            phrases[category][head] = [phrase for phrase, _ in top(found, PHRASES_PER_HEAD)]
    rows = {category: {term: row for row, term in enumerate(found)} for category, found in terms.items() if is_open(category)}
    company = {category: sparse.csr_matrix((len(found), CONTEXTS)) for category, found in rows.items()}
    for stored in parts():
        for category, found in stored["context"].items():
            if category in rows:
                company[category] = company[category] + _company(found, rows[category])
    return Vocabulary(terms, {category: _near(company[category], list(terms[category])) for category in rows}, phrases)


def _company(found, rows):
    """Counts of a part as a matrix [terms kept, CONTEXTS]."""
    kept = [(rows[term], pairs) for term, pairs in found.items() if term in rows]
    places = np.repeat([row for row, _ in kept], [len(pairs) // 2 for _, pairs in kept]).astype(np.int64)
    pairs = np.array([number for _, pairs in kept for number in pairs], np.int64).reshape(-1, 2)
    return sparse.csr_matrix((pairs[:, 1].astype(np.float64), (places, pairs[:, 0])), (len(rows), CONTEXTS))


def _near(matrix, terms):
    """term -> its most similar terms, best first; equal ones in the order of ``terms``."""
    if not matrix.nnz:
        return {}
    total, by_row, by_column = matrix.sum(), np.asarray(matrix.sum(1)).ravel(), np.asarray(matrix.sum(0)).ravel()
    pairs = matrix.tocoo()
    pairs.data = np.maximum(0, np.log(pairs.data * total / (by_row[pairs.row] * by_column[pairs.col])))
    matrix = pairs.tocsr()
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    matrix = sparse.diags(1 / np.where(norms > 0, norms, 1)) @ matrix
    transposed, near = matrix.T.tocsr(), {}
    for first in range(0, len(terms), _CHUNK):
        similar = (matrix[first:first + _CHUNK] @ transposed).toarray().round(9)
        for offset, row in enumerate(similar):
            row[first + offset] = -1
            best = np.argsort(-row, kind="stable")[:NEAR]
            near[terms[first + offset]] = [terms[i] for i in best if row[i] > 0]
    return near


class Vocabulary:
    """What replacements are drawn from.

    Args:
        terms: category -> {term: count}, most frequent first; near: category -> {term: similar terms}; phrases: category -> {head: phrases}.
    """

    def __init__(self, terms, near, phrases):
        self.terms, self.near, self.phrases = terms, near, phrases

    def candidates(self, category, term):
        """Terms of the category that may stand in for ``term``, best first: similar ones, then the frequent others."""
        near = self.near.get(category, {}).get(term, [])
        if len(near) >= NEAR // 2 or not is_open(category):
            return near or [other for other in self.terms.get(category, ()) if other != term]
        known = set(near)
        return near + [other for other in list(self.terms.get(category, ()))[:2 * NEAR] if other != term and other not in known]

    def to_json(self):
        return {"terms": self.terms, "near": self.near, "phrases": self.phrases}

    @classmethod
    def from_json(cls, content):
        return cls(content["terms"], content["near"], content["phrases"])


def is_open(category):
    """Whether a category has as many words as the corpus gives it."""
    return category in ("object", "objects", "adjective", "participle") or category.startswith("verb:")


def top(counts, number):
    """The most frequent (term, count), equal ones alphabetically."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]


def _column(term):
    return zlib.crc32(term.encode("utf-8", "surrogatepass")) % CONTEXTS
