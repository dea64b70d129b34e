"""Words of one kind: which mean the same, which exclude each other, which are too general to be exchanged."""
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, FrozenSet, Tuple

import yaml

from unimo2_paddle.errors import DataError

_BUILT_IN = Path(__file__).with_name("lexicon.yaml")


@dataclass(frozen=True)
class Relation:
    """A relation of the lexicon: its name, the name of its inverse ("" when it has none) and what cannot hold beside it."""

    name: str
    inverse: str
    contrary: FrozenSet[str]


@dataclass(frozen=True)
class Lexicon:
    """What the parser and the rewriter know about terms; all terms are lower-case, words separated by one blank.

    Attributes:
        attributes: term -> (category, canonical term).
        relations: name -> Relation.
        relation_forms: form -> (relation name, whether the form stands alone, like "to its left").
        objects: singular noun or compound -> canonical term.
        general_nouns, general_adjectives, general_verbs: terms that are left alone.
    """

    attributes: Dict[str, Tuple[str, str]]
    relations: Dict[str, Relation]
    relation_forms: Dict[str, Tuple[str, bool]]
    objects: Dict[str, str]
    general_nouns: FrozenSet[str]
    general_adjectives: FrozenSet[str]
    general_verbs: FrozenSet[str]

    @classmethod
    def load(cls, synonyms=None):
        """The built-in lexicon, with the groups of a synonyms file.

        Args:
            synonyms: text file or None; a line is ``term, term, ...`` (nouns) or ``CATEGORY: term, term, ...`` with an attribute category;
                terms of a line mean the same. ``#`` begins a comment.

        Raises:
            DataError: the file cannot be read, or a line (named as file:line) is malformed.
        """
        with open(_BUILT_IN, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        attributes = {term: (category, group[0]) for category, groups in content["attributes"].items() for group in groups for term in group}
        objects = {term: group[0] for group in content["objects"] for term in group}
        for place, category, terms in _read_synonyms(synonyms) if synonyms else ():
            if category is None:
                canonical = objects.get(terms[0], terms[0])
                objects.update(dict.fromkeys(terms, canonical))
            elif category in content["attributes"]:
                canonical = attributes[terms[0]][1] if attributes.get(terms[0], ("",))[0] == category else terms[0]
                attributes.update(dict.fromkeys(terms, (category, canonical)))
            else:
                raise DataError(f"{place}: no category {category!r}; there are {', '.join(content['attributes'])}, or none for nouns")
        relations, forms = {}, {}
        for name, entry in content["relations"].items():
            relations[name] = Relation(name, entry.get("inverse", ""), frozenset(entry["contrary"]))
            forms.update({form: (name, False) for form in entry["forms"]})
            forms.update({form: (name, True) for form in entry.get("it", ())})
        general = content["general"]
        return cls(attributes, relations, forms, objects, frozenset(general["nouns"]), frozenset(general["adjectives"]), frozenset(general["verbs"]))

    def same(self, category, term):
        """The canonical form of a term: equal for terms that mean the same."""
        if category == "object":
            return self.objects.get(term, term)
        return self.attributes[term][1] if term in self.attributes else term

    def forms_of(self, relation, alone):
        """All forms of a relation, in a fixed order."""
        return sorted(form for form, entry in self.relation_forms.items() if entry == (relation, alone))


def _read_synonyms(path):
    """Yields (place, category or None, terms) of every line."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{os.fspath(path)}: cannot read the synonyms: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        category, colon, rest = line.rpartition(":")
        terms = [" ".join(term.lower().split()) for term in rest.split(",")]
        if len(terms) < 2 or not all(terms):
            raise DataError(f"{path}:{number}: a line is two or more terms separated by commas, optionally after CATEGORY:")
        yield f"{path}:{number}", category.strip().lower() if colon else None, terms
