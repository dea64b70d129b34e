"""Captions rewritten for contrastive learning (UNIMO, arXiv 2012.15409, section 2.2): paraphrases as positives and hard negatives at
three levels.

* sentence: captions of other records that are near by TF-IDF and name an object or attribute (or another relation of the same two
  objects) that nothing known about the record names;
* phrase: one noun phrase with its attributes, or one relation of several words, replaced by one of the corpus;
* word: one object, attribute, relation or action replaced by a word of the same category.
"""
import hashlib
from collections import Counter
from dataclasses import asdict, dataclass

from unimo2_paddle.augment.parsing import verb_stem
from unimo2_paddle.augment.store import RecordWriter
from unimo2_paddle.augment.text_index import words
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.errors import UserInputError

LEVELS = ("sentence", "phrase", "word")
_CHOICES = 10     # allowed candidates a replacement is drawn from
_SHORTLIST = 50   # TF-IDF neighbours looked at per caption


@dataclass(frozen=True)
class RewriteOptions:
    """What to make.

    Attributes:
        levels: of ``LEVELS``; negatives: hard negatives per caption and level; positives: paraphrases per caption, at most.
        seed: of the draws.
    """

    levels: tuple = LEVELS
    negatives: int = 3
    positives: int = 5
    seed: int = 1

    def __post_init__(self):
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            raise UserInputError(f"--levels {','.join(self.levels)}: use some of {', '.join(LEVELS)}")
        if self.negatives < 1 or self.positives < 0 or self.seed < 0:
            raise UserInputError("--negatives must be at least 1, --positives and --seed at least 0")


@dataclass(frozen=True)
class Slot:
    """A place of a caption that can be replaced: characters [start, end), the vocabulary category and the term that stands there.

    ``phrase``: the whole noun phrase is exchanged and ``term`` is its head. ``alone``: a relation form like "to its left".
    """

    level: str
    category: str
    term: str
    start: int
    end: int
    phrase: bool = False
    alone: bool = False


class Rewriter:
    """Rewrites records.

    Args:
        parser: a ``SceneParser``; index: the ``TextIndex`` of the corpus; paraphrases: list of ``ParaphraseFile``; options: ``RewriteOptions``.
    """

    def __init__(self, parser, index, paraphrases=(), options=RewriteOptions()):  # noqa: B008 (frozen)
        self.parser, self.lexicon, self.index, self.options = parser, parser.lexicon, index, options
        self.paraphrases, self.vocabulary = paraphrases, index.vocabulary()

    def rewrite(self, record):
        """The rewritten captions of an ``AugmentRecord``.

        Returns:
            (mapping with ``key`` and ``captions``: per caption ``text``, ``positives`` and ``negatives`` (level -> list of mappings with
            ``text`` and what was changed, or ``score``)), Counter of what was made and of captions that could not be rewritten).

        The draws are a function of the seed, the record's key and the caption's number.
        """
        counts, rows = Counter(records=1), []
        captions = [caption for caption in record.captions if words(caption)]
        counts["records_without_caption"] += not captions
        positives = [self._positives(record.key, caption) for caption in captions]
        known = _Known(self.parser, captions + [text for texts in positives for text in texts])
        for number, (caption, listed) in enumerate(zip(captions, positives)):
            rng = generator(self.options.seed, _key_number(record.key), number)
            scene, made = self.parser.parse(caption), set()
            counts["captions"] += 1
            counts["captions_without_content"] += not scene
            negatives = {}
            for level in self.options.levels:
                found = self._sentence(record, caption, known, made) if level == "sentence" else self._replaced(scene, level, known, made, rng)
                negatives[level] = found
                counts[f"{level}_negatives"] += len(found)
                counts[f"captions_without_{level}_negative"] += not found
            chosen = [listed[i] for i in sorted(rng.permutation(len(listed))[:self.options.positives])]
            counts["positives"] += len(chosen)
            rows.append({"text": caption, "positives": chosen, "negatives": negatives})
        return {"key": record.key, "captions": rows}, counts

    def _positives(self, key, caption):
        """Listed paraphrases that are not the caption again, each once."""
        found, seen = [], {tuple(words(caption))}
        for text in (text for file in self.paraphrases for text in file.of(key, caption)):
            if words(text) and tuple(words(text)) not in seen:
                seen.add(tuple(words(text)))
                found.append(text)
        return found

    def _sentence(self, record, caption, known, made):
        found, wanted = [], self.options.negatives
        for number, score in zip(*self.index.tfidf(caption, _SHORTLIST)):
            text = self.index.texts[int(number)]
            if self.index.record_of(int(number))[1] == record.key or tuple(words(text)) in made or not known.is_contradicted_by(text):
                continue
            made.add(tuple(words(text)))
            found.append({"text": text, "score": round(float(score), 4)})
            if len(found) == wanted:
                break
        return found

    def _replaced(self, scene, level, known, made, rng):
        """Up to ``negatives`` versions of the caption, each with one slot replaced; slots are visited in turns."""
        slots = [slot for slot in self._slots(scene) if slot.level == level]
        slots, found = [slots[i] for i in rng.permutation(len(slots))], []
        pools = {}
        for turn in range(_CHOICES):
            for slot in slots:
                if len(found) == self.options.negatives:
                    return found
                if turn == 0:
                    pools[slot] = self._drawn(slot, known, rng)
                pool = pools[slot]
                if turn < len(pool):
                    text = _replace(scene.text, slot, pool[turn])
                    if tuple(words(text)) not in made and known.differs(text):
                        made.add(tuple(words(text)))
                        found.append({"text": text, "category": "phrase" if slot.phrase else slot.category, "from": scene.text[slot.start:slot.end],
                                      "to": pool[turn]})
        return found

    def _slots(self, scene):
        for thing in scene.objects:
            yield Slot("word", thing.category, thing.name, thing.start, thing.end)
            if thing.phrase_start < thing.start:
                yield Slot("phrase", thing.category, thing.name, thing.phrase_start, thing.end, phrase=True)
            for unit in thing.attributes:
                yield Slot("word", unit.category, unit.text, unit.start, unit.end)
        for relation in scene.relations:
            unit = relation.unit
            yield Slot("phrase" if " " in unit.text else "word", "relation", unit.text, unit.start, unit.end, alone=relation.alone)
        for action in scene.actions:
            yield Slot("word", "verb:" + action.unit.category, action.unit.text, action.unit.start, action.unit.end)

    def _drawn(self, slot, known, rng):
        """Replacements of a slot in the order of the draw; none of them may be said of the record."""
        if slot.category == "relation":
            candidates = self._relations(slot)
        else:
            same = self._canonical(slot.category)
            own = same(slot.term)
            stated = {same(term) for term in known.terms(slot.category)}
            candidates = [term for term in self.vocabulary.candidates(slot.category, slot.term) if same(term) != own and same(term) not in stated]
        if slot.phrase:
            candidates = [phrases[rng.integers(len(phrases))] for phrases in
                          (self.vocabulary.phrases.get(slot.category, {}).get(head, ()) for head in candidates[:4 * _CHOICES]) if phrases]
        candidates = candidates[:2 * _CHOICES]
        return [candidates[i] for i in rng.permutation(len(candidates))[:_CHOICES]]

    def _relations(self, slot):
        """Forms, attested in the corpus, of relations that exclude the slot's."""
        relation = self.lexicon.relations[self.lexicon.relation_forms[slot.term][0]]
        attested = self.vocabulary.terms.get("relation", {})
        return [form for other in sorted(relation.contrary) for form in self.lexicon.forms_of(other, slot.alone) if form in attested]

    def _canonical(self, category):
        if category == "object":
            return lambda term: self.lexicon.same("object", term)
        if category == "objects":
            return lambda term: self.lexicon.same("object", self.parser.singular(term))
        if category.startswith("verb:"):
            return verb_stem
        return lambda term: self.lexicon.same(category, term)


class _Known:
    """Everything known to be true of a record: its captions and their paraphrases."""

    def __init__(self, parser, texts):
        self.parser, self._scenes = parser, [parser.parse(text) for text in texts]
        self.texts = {tuple(words(text)) for text in texts}
        self._facts = [parser.facts(scene) for scene in self._scenes]
        self._all = frozenset().union(*self._facts)
        self._joined = {fact[1:] for fact in self._all if fact[0] == "relation"}

    def terms(self, category):
        """The terms of a vocabulary category that occur; for nouns of both numbers, in the singular too; for verbs in every form."""
        for scene in self._scenes:
            if category in ("object", "objects"):
                for thing in scene.objects:
                    yield thing.name
                    yield thing.same
            elif category.startswith("verb:"):
                yield from (action.unit.text for action in scene.actions)
            else:
                yield from (unit.text for thing in scene.objects for unit in thing.attributes)

    def differs(self, text):
        """Whether a replaced caption is none of the known texts and states other facts than each of them."""
        if tuple(words(text)) in self.texts:
            return False
        facts = self.parser.facts(self.parser.parse(text))
        return not facts <= self._all

    def is_contradicted_by(self, text):
        """Whether another record's caption names an object or attribute that nothing known names, or another relation of two known objects."""
        if tuple(words(text)) in self.texts:
            return False
        facts = self.parser.facts(self.parser.parse(text))
        new = facts - self._all
        if any(fact[0] in ("object", "attribute") for fact in new):
            return True
        pairs = {(one, other) for one, _, other in self._joined}
        return any(fact[0] == "relation" and ((fact[1], fact[3]) in pairs or (fact[3], fact[1]) in pairs) for fact in new)


def _replace(text, slot, term):
    """The text with a slot's characters replaced: capital and indefinite article follow the new term."""
    head, old, tail = text[:slot.start], text[slot.start:slot.end], text[slot.end:]
    first = slot.start
    for article, other in (("a", "an"), ("an", "a")):
        if head.lower().endswith(" " + article + " ") or head.lower() == article + " ":
            wanted = "an" if term[0] in "aeiou" else "a"
            if wanted == other:
                written = head[-len(article) - 1:-1]
                head = head[:-len(article) - 1] + (wanted.capitalize() if written[0].isupper() else wanted) + " "
            break
    if old[:1].isupper() and (first == 0 or not text[:first].strip()):
        term = term[0].upper() + term[1:]
    return head + term + tail


def _key_number(key):
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def rewrite_part(rewriter, records, target):
    """Write the rewritten records of an input shard (see ``Parts``); returns the counts."""
    counts = Counter()
    with RecordWriter(target) as writer:
        for record in records:
            row, made = rewriter.rewrite(record)
            counts.update(made)
            writer.write(record.key, row)
    return dict(sorted(counts.items()))


def rewrite_settings(options, index, paraphrases):
    """What the rewritten parts are a function of, for ``Parts``."""
    return {"what": "rewrites", **asdict(options), "levels": list(options.levels), "index": index.fingerprint(),
            "paraphrases": [[file.path, len(file)] for file in paraphrases]}
