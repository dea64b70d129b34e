"""The guarantees of rewritten captions."""
import json

import pytest

from unimo2_paddle.augment.rewriting import LEVELS, RewriteOptions, Rewriter, Slot, _replace
from unimo2_paddle.augment.sources import AugmentRecord, Source
from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.augment.text_index import TextIndex, words
from unimo2_paddle.errors import UserInputError


@pytest.fixture(scope="module")
def index(corpus):
    return TextIndex(corpus[1])


@pytest.fixture(scope="module")
def records(corpus):
    return [record for shard in Source([corpus[0]], kind="texts").shards() for record in shard.read(bad=pytest.fail)]


@pytest.fixture(scope="module")
def rewriter(parser, index):
    return Rewriter(parser, index)


def test_every_level_is_made_and_counted(rewriter, records):
    row, counts = rewriter.rewrite(records[3])
    assert [caption["text"] for caption in row["captions"]] == records[3].captions
    for caption in row["captions"]:
        assert tuple(caption["negatives"]) == LEVELS and all(len(found) == 3 for found in caption["negatives"].values())
    assert counts["captions"] == 2 and all(counts[f"{level}_negatives"] == 6 for level in LEVELS)


def test_a_hard_negative_equals_no_known_text_and_states_something_no_known_text_states(rewriter, parser, records):
    for record in records:
        known_facts = frozenset().union(*(parser.facts(parser.parse(caption)) for caption in record.captions))
        for caption in rewriter.rewrite(record)[0]["captions"]:
            for entry in (entry for found in caption["negatives"].values() for entry in found):
                assert words(entry["text"]) not in [words(text) for text in record.captions]
                assert parser.facts(parser.parse(entry["text"])) - known_facts, (caption["text"], entry["text"])


def test_replacements_are_of_the_same_category_and_occur_in_the_corpus(rewriter, records, parser, index):
    terms, lexicon = index.vocabulary().terms, parser.lexicon
    seen = set()
    for record in records:
        for caption in rewriter.rewrite(record)[0]["captions"]:
            for entry in caption["negatives"]["word"] + caption["negatives"]["phrase"]:
                category = entry["category"]
                seen.add(category)
                if category == "phrase":
                    scene = parser.parse(entry["to"])
                    assert len(scene.objects) == 1 and scene.objects[0].name in terms["object"]
                else:
                    assert entry["to"] in terms[category] and entry["from"].lower() in terms[category]
                if category == "relation":
                    names = [lexicon.relation_forms[entry[side].lower()][0] for side in ("from", "to")]
                    assert names[1] in lexicon.relations[names[0]].contrary
                elif category in ("colour", "size"):
                    assert lexicon.attributes[entry["to"]][0] == category
                    assert lexicon.same(category, entry["to"]) != lexicon.same(category, entry["from"].lower())
    assert {"object", "colour", "size", "relation", "phrase"} <= seen


def test_nothing_true_of_the_record_is_put_in(rewriter, records):
    for record in records:
        named = set(words(" ".join(record.captions)))
        for caption in rewriter.rewrite(record)[0]["captions"]:
            for entry in caption["negatives"]["word"]:
                if entry["category"] in ("object", "colour", "size"):
                    assert not set(words(entry["to"])) & named


def test_listed_paraphrases_become_positives_and_never_negatives(run, corpus, tmp_path, records):
    caption, truth = records[0].captions[0], records[31].captions[0]
    (tmp_path / "by_text.tsv").write_text(f"{caption}\t{truth}\t{caption.upper()}\n", encoding="utf-8")
    (tmp_path / "by_key.jsonl").write_text(json.dumps({"key": records[0].key, "paraphrases": ["An entirely red thing.", truth]}) + "\n", encoding="utf-8")
    run("rewrite", "--source", corpus[0], "--index", corpus[1], "--out", tmp_path / "out", "--negatives", "50",
        "--paraphrases", tmp_path / "by_text.tsv", "--paraphrases", tmp_path / "by_key.jsonl")
    entry = Augmentations(tmp_path / "out").get(records[0].key).captions[0]
    assert entry.positives == [truth, "An entirely red thing."]  # the caption again, in capitals, is no paraphrase
    negatives = [words(found["text"]) for level in LEVELS for found in entry.negatives[level]]
    assert negatives and words(truth) not in negatives


def test_captions_of_the_same_record_are_no_sentence_negatives(parser, index, records):
    rewriter = Rewriter(parser, index, options=RewriteOptions(("sentence",), negatives=50))
    for record in records[:10]:
        for caption in rewriter.rewrite(record)[0]["captions"]:
            texts = [entry["text"] for entry in caption["negatives"]["sentence"]]
            assert len(texts) > 10 and not set(texts) & set(record.captions)
            scores = [entry["score"] for entry in caption["negatives"]["sentence"]]
            assert scores == sorted(scores, reverse=True)


def test_the_draw_is_a_function_of_seed_and_key(parser, index, rewriter, records):
    same = Rewriter(parser, index).rewrite(records[7])
    assert same == rewriter.rewrite(records[7])
    assert Rewriter(parser, index, options=RewriteOptions(seed=2)).rewrite(records[7]) != same
    other = AugmentRecord("another key", records[7].shard, records[7].captions)
    assert rewriter.rewrite(other)[0]["captions"][0]["negatives"]["word"] != same[0]["captions"][0]["negatives"]["word"]


@pytest.mark.parametrize("captions, counted", [
    ([], "records_without_caption"), (["", " ", "!!!"], "records_without_caption"), (["one two of the"], "captions_without_content"),
    (["日本 😀 の"], "captions_without_phrase_negative"),
])
def test_captions_without_content_are_counted(rewriter, captions, counted):
    row, counts = rewriter.rewrite(AugmentRecord("k", "s", captions))
    assert counts[counted] == 1 and row["key"] == "k"


@pytest.mark.parametrize("text, start, end, term, wanted", [
    ("a red dog", 2, 5, "orange", "an orange dog"), ("An old cat", 3, 6, "big", "A big cat"), ("Above a cat", 0, 5, "below", "Below a cat"),
    ("the banana dog", 4, 10, "apple", "the apple dog"), ("with an apple.", 8, 13, "pear", "with a pear."),
])
def test_article_and_capital_follow_the_replacement(text, start, end, term, wanted):
    assert _replace(text, Slot("word", "object", text[start:end], start, end), term) == wanted


@pytest.mark.parametrize("arguments, says", [
    (("--levels", "word,letter"), "letter"), (("--negatives", "0"), "--negatives"), (("--shard", "2/2"), "i from 0"), (("--shard", "x"), "--shard x"),
])
def test_wrong_options_are_refused_before_anything_is_written(run, corpus, tmp_path, arguments, says):
    with pytest.raises(UserInputError, match=says):
        run("rewrite", "--source", corpus[0], "--index", corpus[1], "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
