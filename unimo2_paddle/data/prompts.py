"""Prompt templates: sentences that turn a class name into text for zero-shot classification."""
import os
import re

from unimo2_paddle.errors import DataError

DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")


def read_templates(name_or_path):
    """Templates of a bundled list ("photos", "shapes") or of a text file: one per line with one ``{}``, ``#`` starts a comment line.

    Raises:
        DataError: no such list, or a line without exactly one ``{}`` (with its number).
    """
    path = name_or_path
    if re.fullmatch(r"\w+", name_or_path) and not os.path.isfile(name_or_path):
        path = os.path.join(DIRECTORY, f"{name_or_path}.txt")
        if not os.path.isfile(path):
            known = ", ".join(sorted(name[:-4] for name in os.listdir(DIRECTORY) if name.endswith(".txt")))
            raise DataError(f"{name_or_path}: no such bundled list of prompt templates; known: {known}; or give the path of a text file")
    templates = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if not text or text.startswith("#"):
                    continue
                if text.count("{}") != 1:
                    raise DataError(f"{path}:{number}: {text[:80]!r} must contain {{}} once, where the class name goes")
                templates.append(text)
    except OSError as error:
        raise DataError(f"{path}: cannot read the prompt templates: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
    if not templates:
        raise DataError(f"{path}: has no template")
    return templates


def fill_template(template, name):
    """The sentence for a class; "a {}" becomes "an {}" before a written vowel.

    >>> fill_template("a photo of a {}.", "owl")
    'a photo of an owl.'
    """
    if name[:1].lower() in tuple("aeiou"):
        template = re.sub(r"\b([Aa]) \{\}", r"\1n {}", template)
    return template.replace("{}", name)
