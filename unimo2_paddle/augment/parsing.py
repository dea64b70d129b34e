"""A rule-based scene parser: the objects, attributes, relations and actions that an English caption names, and where.

Parts of speech come from TextBlob's pattern tagger (Brill's lexicon and rules, shipped as text files inside the package: nothing is
downloaded, 20 microseconds a caption). NLTK's, spaCy's and Stanza's taggers are better on newspapers and download their models.
"""
import functools
import re
from dataclasses import dataclass, field, replace
from typing import List, Optional

from unimo2_paddle.errors import UserInputError

MAX_CHARACTERS = 2000  # what a caption says beyond this is not looked at
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[^\w\s]")
_NOUNS = ("NN", "NNS", "NNP", "NNPS")
_COPULAS = ("is", "are", "was", "were", "'s")
_BREAKS = ".;!?"


@dataclass(frozen=True)
class Unit:
    """A word or fixed phrase: its lower-case text, the characters [start, end) it covers, part-of-speech tag, and kind.

    ``kind`` is "noun", "attribute", "relation", "verb" or "" for the rest; ``category`` the attribute's category, the relation's name or
    the verb's tag.
    """

    text: str
    start: int
    end: int
    tag: str
    kind: str
    category: str = ""


@dataclass
class SceneObject:
    """A named object: ``name`` as written (lower-case), ``same`` its canonical singular, whether it is plural, its span and attributes."""

    name: str
    same: str
    plural: bool
    start: int
    end: int
    attributes: List[Unit] = field(default_factory=list)
    phrase_start: int = 0  # where its first attribute before it begins

    @property
    def category(self):
        """The vocabulary category: nouns are exchanged within one number."""
        return "objects" if self.plural else "object"


@dataclass
class SceneRelation:
    """A relation or action: the unit that names it and the indices of the objects it joins (None where there is none)."""

    unit: Unit
    subject: Optional[int]
    target: Optional[int]
    alone: bool = False  # like "to its left"


@dataclass
class Scene:
    """What a caption says; positions are characters of ``text``."""

    text: str
    objects: List[SceneObject]
    relations: List[SceneRelation]
    actions: List[SceneRelation]

    def __bool__(self):
        return bool(self.objects)


class SceneParser:
    """Parses captions with a ``Lexicon``.

    Raises:
        UserInputError: TextBlob is not installed.
    """

    def __init__(self, lexicon):
        self.lexicon = lexicon
        self._tag, self._singular = _load_tagger()
        fixed = {**dict.fromkeys(lexicon.relation_forms, "relation"), **{term: "noun" for term in lexicon.objects if " " in term or "-" in term}}
        self._fixed = {}
        for phrase, kind in fixed.items():
            words = tuple(_WORD.findall(phrase))
            self._fixed.setdefault(words[0], []).append((words, phrase, kind))
        for entries in self._fixed.values():
            entries.sort(key=lambda entry: (-len(entry[0]), entry[0]))
        self.parse = functools.lru_cache(maxsize=20000)(self._parse)

    def singular(self, noun):
        """The singular of a plural noun (of a compound: its last word's)."""
        head, blank, last = noun.rpartition(" ")
        return head + blank + self._singular(last)

    def facts(self, scene):
        """What a scene states, as a frozenset of tuples that do not depend on wording.

        ``("object", noun)``, ``("attribute", noun, category, value)``, ``("relation", noun, name, noun)`` (a relation and its inverse give
        the same), ``("action", noun, verb stem, noun)``.
        """
        found = set()
        for thing in scene.objects:
            found.add(("object", thing.same))
            for unit in thing.attributes:
                found.add(("attribute", thing.same, unit.category, self.lexicon.same(unit.category, unit.text)))
        name = lambda index: "" if index is None else scene.objects[index].same  # noqa: E731
        for relation in scene.relations:
            found.add(self._relation_fact(name(relation.subject), relation.unit.category, name(relation.target)))
        for action in scene.actions:
            found.add(("action", name(action.subject), verb_stem(action.unit.text), name(action.target)))
        return frozenset(found)

    def _relation_fact(self, subject, relation, target):
        inverse = self.lexicon.relations[relation].inverse
        if inverse and (inverse, target, subject) < (relation, subject, target):
            subject, relation, target = target, inverse, subject
        return "relation", subject, relation, target

    def _parse(self, text):
        scene, sentence = Scene(text, [], [], []), []
        for unit in self._units(text[:MAX_CHARACTERS]):
            if unit.text in _BREAKS:
                self._read_sentence(sentence, scene)
                sentence = []
            else:
                sentence.append(unit)
        self._read_sentence(sentence, scene)
        return scene

    def _units(self, text):
        words = [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]
        if not words:
            return []
        tags = [tag for _, tag in self._tag([word for word, _, _ in words])]
        units, i = [], 0
        while i < len(words):
            word, start, end = words[i]
            fixed = self._fixed_phrase(words, i)
            if fixed is not None:
                count, phrase, kind = fixed
                last = words[i + count - 1]
                category = self.lexicon.relation_forms[phrase][0] if kind == "relation" else ""
                units.append(Unit(phrase, start, last[2], "NN" if kind == "noun" else "IN", kind, category))
                i += count
                continue
            tag = tags[i]
            if tag in ("VB", "VBP") and units and (units[-1].tag in ("DT", "PRP$") or units[-1].kind == "attribute"):
                tag = "NN"  # "a sink": the tagger prefers the verb
            kind, category = self._kind(word, tag)
            if kind == "noun" and tag not in _NOUNS:
                tag = "NN" if word in self.lexicon.objects else "NNS"
            units.append(Unit(word, start, end, tag, kind, category))
            i += 1
        return units

    def _fixed_phrase(self, words, i):
        for phrase_words, phrase, kind in self._fixed.get(words[i][0], ()):
            if tuple(word for word, _, _ in words[i:i + len(phrase_words)]) == phrase_words:
                return len(phrase_words), phrase, kind
        return None

    def _kind(self, word, tag):
        if word in self.lexicon.attributes:
            return "attribute", self.lexicon.attributes[word][0]
        if not word[0].isalpha() or word in self.lexicon.general_verbs or (word in self.lexicon.general_nouns and tag not in _NOUNS):
            return "", ""
        if word in self.lexicon.objects or self._singular(word) in self.lexicon.objects:
            return "noun", ""
        if tag.startswith("JJ") and word not in self.lexicon.general_adjectives:
            return "attribute", "adjective"
        if tag in _NOUNS:
            return "noun", ""
        if tag.startswith("VB"):
            return "verb", tag
        return "", ""

    def _read_sentence(self, units, scene):
        """Finds the noun phrases of a sentence, then what stands between them."""
        ends, i, first = {}, 0, len(scene.objects)  # index of the unit that ends a noun phrase -> object (None: too general)
        starts = {}
        while i < len(units):
            thing, after = self._noun_phrase(units, i)
            if after == i:
                i += 1
                continue
            index = None
            if thing is not None:
                index = len(scene.objects)
                scene.objects.append(thing)
            starts[i], ends[after - 1] = index, index
            i = after
        for i, unit in enumerate(units):
            if unit.kind == "relation":
                self._read_relation(units, i, starts, ends, scene, first)
            elif unit.kind == "verb" and not any(begin <= i <= end for begin, end in zip(starts, ends)):
                before, after = _near(ends, i, -1), _near(starts, i, 1)
                following = units[i + 1] if i + 1 < len(units) else None
                direct = after if following is not None and following.kind != "relation" else None
                scene.actions.append(SceneRelation(unit, before, direct))
            elif unit.kind == "attribute" and i and units[i - 1].text in _COPULAS and not any(b <= i <= e for b, e in zip(starts, ends)):
                subject = _near(ends, i, -1)
                if subject is not None:
                    scene.objects[subject].attributes.append(unit)

    def _noun_phrase(self, units, i):
        """A noun phrase that begins at unit ``i``: (object or None when it is too general, index after it); (None, i) when none does."""
        modifiers, j = [], i
        while j < len(units) and self._modifies(units, j):
            if units[j].kind == "verb":
                modifiers.append(replace(units[j], kind="attribute", category="participle"))
            elif units[j].kind:
                modifiers.append(units[j])
            j += 1
        nouns = []
        while j < len(units) and (units[j].kind == "noun" or (not nouns and units[j].kind == "attribute" and units[j].tag in _NOUNS)):
            nouns.append(units[j])
            j += 1
        if not nouns:
            return None, i
        if len(nouns) > 1 and i and units[i - 1].text in ("a", "an") and nouns[-1].tag == "NNS":  # "a dog jumps", which taggers take for two nouns
            nouns.pop()
            j -= 1
            units[j] = replace(units[j], tag="VBZ", kind="verb", category="VBZ")
        name = " ".join(unit.text for unit in nouns)
        plural = nouns[-1].tag in ("NNS", "NNPS")
        singular = self.singular(name) if plural else name
        if self.lexicon.general_nouns & {singular, nouns[-1].text, self.singular(nouns[-1].text)}:
            return None, j
        thing = SceneObject(name, self.lexicon.same("object", singular), plural, nouns[0].start, nouns[-1].end, modifiers)
        thing.phrase_start = modifiers[0].start if modifiers else thing.start
        return thing, j

    def _modifies(self, units, j):
        """Whether unit ``j`` is an attribute (or "and" and comma between two) of a noun that follows."""
        rest = units[j + 1:j + 6]
        if units[j].text in ("and", ","):
            return j > 0 and units[j - 1].kind == "attribute" and bool(rest) and rest[0].kind == "attribute" and self._leads_to_noun(rest)
        participle = units[j].kind == "verb" and units[j].tag in ("VBN", "VBG") and j > 0 and (units[j - 1].tag in ("DT", "CD", "PRP$")
                                                                                            or units[j - 1].kind == "attribute")
        if units[j].kind != "attribute" and not participle:
            return False
        return self._leads_to_noun(rest)

    @staticmethod
    def _leads_to_noun(units):
        for unit in units:
            if unit.kind == "noun":
                return True
            if unit.kind != "attribute" and unit.text not in ("and", ",") and unit.tag not in ("VBN", "VBG"):
                return False
            if unit.text not in ("and", ",") and unit.tag in _NOUNS:
                return True
        return False

    def _read_relation(self, units, i, starts, ends, scene, first):
        unit, alone = units[i], self.lexicon.relation_forms[units[i].text][1]
        if alone:  # "B with A to its left"; "B and, to its left, A"
            if i + 1 < len(units) and units[i + 1].text == ",":
                subject, target = _near(starts, i, 1), _near(ends, i, -1)
            else:
                subject = _near(ends, i, -1)
                target = None if subject is None or subject == first else subject - 1
        else:
            target = _near(starts, i, 1)
            before = units[i - 1] if i else None
            fronted = before is None or before.text in ("and", ",", ":", "that")
            if fronted and target is not None and target + 1 < len(scene.objects):
                subject = target + 1
            else:
                subject = None if before is None else _near(ends, i, -1)
        if target is None and not alone:  # "on the left": a place, not a relation of two
            return
        scene.relations.append(SceneRelation(unit, subject, target, alone))


def _near(places, i, step):
    """The object whose noun phrase is nearest before (step -1) or after (step 1) unit ``i``; None when that one is too general."""
    found = [place for place in places if (place - i) * step > 0]
    return places[min(found) if step > 0 else max(found)] if found else None


def verb_stem(verb):
    """Form-independent beginning of a verb: "riding", "rides" and "ride" give the same."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if verb.endswith(ending) and len(verb) - len(ending) >= 3:
            verb = verb[:-len(ending)]
            break
    return verb[:-1] if len(verb) > 3 and verb[-1] == verb[-2] else verb


@functools.lru_cache(maxsize=1)
def _load_tagger():
    """(function: list of words -> (word, tag) pairs, singularize) of TextBlob; imported on first use because NLTK behind it takes seconds."""
    try:
        from textblob.en import parser
        from textblob.en.inflect import singularize
    except ImportError:
        raise UserInputError("rewriting captions needs TextBlob for parts of speech: pip install textblob (pinned in requirements.txt)") from None
    return parser.find_tags, functools.lru_cache(maxsize=100000)(singularize)
