"""What the scene parser finds in captions."""
import pytest

from unimo2_paddle.augment.lexicon import Lexicon
from unimo2_paddle.augment.parsing import SceneParser, verb_stem
from unimo2_paddle.errors import DataError


def facts(parser, text):
    return parser.facts(parser.parse(text))


def test_objects_attributes_relations_and_actions_are_found(parser):
    assert facts(parser, "A large red ball is to the left of an old wooden bench.") == {
        ("object", "ball"), ("object", "bench"), ("attribute", "ball", "size", "large"), ("attribute", "ball", "colour", "red"),
        ("attribute", "bench", "age", "old"), ("attribute", "bench", "material", "wooden"), ("relation", "ball", "left of", "bench")}
    assert ("object", "sink") in facts(parser, "A bathroom with a white toilet and a sink.")
    assert ("action", "woman", verb_stem("rides"), "bicycle") in facts(parser, "A woman riding a bike down the hill")


@pytest.mark.parametrize("one, other", [
    ("a big dog above a cat", "a cat below a large dog"),
    ("a couch behind two guys", "two men in front of a sofa"),
    ("A red car and a blue truck.", "a blue truck and a red automobile"),
    ("a dog to the left of a cat", "to the right of a dog there is a cat"),
    ("A cat with a dog to its left.", "A dog left of a cat."),
    ("The wall is white.", "a white wall"),
])
def test_the_same_scene_in_other_words_gives_the_same_facts(parser, one, other):
    assert facts(parser, one) == facts(parser, other)


@pytest.mark.parametrize("one, other", [
    ("a red dog and a blue cat", "a blue dog and a red cat"), ("a dog above a cat", "a dog below a cat"), ("a dog", "a cat"),
    ("two dogs", "three dogs"), ("a man holding a cup", "a man washing a cup"),
])
def test_different_scenes_give_different_facts(parser, one, other):
    assert facts(parser, one) != facts(parser, other)


def test_positions_name_the_words_in_the_text(parser):
    text = "Ünder the tall Tree: two small dogs!"
    for thing in parser.parse(text).objects:
        assert text[thing.start:thing.end].lower() == thing.name
        for unit in thing.attributes:
            assert text[unit.start:unit.end].lower() == unit.text


@pytest.mark.parametrize("text", ["", "   ", "!!! ??? ...", "12 34", "is are of the", "\u0000\ufffd", "😀", "a picture of something"])
def test_text_without_content_gives_an_empty_scene(parser, text):
    assert not parser.parse(text) or all("😀" in thing.name for thing in parser.parse(text).objects)


@pytest.mark.parametrize("text", ["日本 の 犬", "naïve café crème", "x" * 100000, "a/b/c\\d 'quoted' \"dog\"", "dog\u0301 \u202edog"])
def test_any_text_is_parsed(parser, text):
    scene = parser.parse(text)
    assert all(0 <= thing.start < thing.end <= len(text) for thing in scene.objects)


def test_synonyms_of_several_words_are_one_object(tmp_path):
    (tmp_path / "synonyms.txt").write_text("cross, plus sign\nstar, five-pointed star  # as drawn\nsize: tiny, teeny\n", encoding="utf-8")
    parser = SceneParser(Lexicon.load(tmp_path / "synonyms.txt"))
    assert facts(parser, "a teeny plus sign above a five-pointed star") == facts(parser, "a tiny cross above a star")


@pytest.mark.parametrize("line, says", [("dog", "two or more"), ("dog, ", "two or more"), ("speed: fast, quick", "no category 'speed'")])
def test_a_bad_synonym_line_is_named(tmp_path, line, says):
    path = tmp_path / "synonyms.txt"
    path.write_text("cat, kitty\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="synonyms.txt:2: .*" + says):
        Lexicon.load(path)


def test_without_the_tagger_the_remedy_is_named(monkeypatch):
    import sys

    from unimo2_paddle.augment import parsing
    from unimo2_paddle.errors import UserInputError

    parsing._load_tagger.cache_clear()
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    with pytest.raises(UserInputError, match="pip install textblob"):
        SceneParser(Lexicon.load())
    parsing._load_tagger.cache_clear()
