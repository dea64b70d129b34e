"""UNIMO's own record formats: regions and, in two of the three, the tokenised text in the same line.

====================  ===========  =======================================================================================
captioning (COCO)     16 x ``;``   a picture with one caption (none: to be captioned); nine characters stand before the image number
entailment (SNLI-VE)  14 x ``;``   a picture with one hypothesis and its label 0, 1 or 2
retrieval (Flickr30k)  7 x TAB     a picture; its captions are in ``.ids`` files
====================  ===========  =======================================================================================

Columns as the authors' readers name them (reference: unimo1.md sections 3.3 to 3.5). For retrieval files the training reader takes the
width first and the test reader the height: here the width is first, and ``size_order`` finds out when it is not.
"""
from unimo2_paddle.data.formats.coco_captions import coco_image_id, id_lists
from unimo2_paddle.data.formats.regions import RegionFormat, RegionText, plain_id
from unimo2_paddle.errors import DataError

CAPTIONING_COLUMNS = ("image_id", "text_id", "token_ids", "sent_ids", "pos_ids", "seg_labels", "node_attr_b", "node_attr_e", "height", "width",
                      "number_box", "boxes", "object_probs", "attribute_probs", "features", "label")
ENTAILMENT_COLUMNS = ("image_id", "text_id", "label", "token_ids", "sent_ids", "pos_ids", "unused_1", "width", "height", "number_box", "boxes",
                      "features", "unused_2", "unused_3")
RETRIEVAL_COLUMNS = ("image_id", "width", "height", "number_box", "boxes", "features", "object_probs")
_TOKENS = ("token_ids", "sent_ids", "pos_ids")


def _ascii(row, name, where):
    try:
        return row[name].decode("ascii").strip()
    except UnicodeDecodeError:
        raise DataError(f"{where}: {name} is not plain text") from None


def _tokens(row, where):
    return tuple(tuple(ids) for ids in id_lists([_ascii(row, name, where) for name in _TOKENS], range(3), _TOKENS, where))


def _caption(row, where):
    tokens, sentences, positions = _tokens(row, where)
    labels = _ascii(row, "seg_labels", where).split()
    wrong = [label for label in labels if label not in ("-1", "0", "1")]
    if wrong or (labels and len(labels) != len(tokens)):
        told = f"has {wrong[0][:20]!r} where -1, 0 or 1 is expected" if wrong else f"has {len(labels)} numbers for {len(tokens)} tokens"
        raise DataError(f"{where}: seg_labels {told}")
    return RegionText(_ascii(row, "text_id", where), _ascii(row, "label", where), tokens, sentences, positions, tuple(map(int, labels)))


def _hypothesis(row, where):
    label, tokens = _ascii(row, "label", where), _tokens(row, where)
    if label not in ("0", "1", "2"):
        raise DataError(f"{where}: label is {label[:20]!r}, not 0, 1 or 2")
    if not tokens[0]:
        raise DataError(f"{where}: token_ids is empty; a hypothesis is needed")
    return RegionText(_ascii(row, "text_id", where), label, *tokens)


def _told(text):
    row = {"text_id": text.text_id, "label": text.label}
    for name, ids in zip((*_TOKENS, "seg_labels"), (text.token_ids, text.sentence_ids, text.position_ids, text.segment_labels)):
        row[name] = " ".join(map(str, ids))
    return row


CAPTIONING = RegionFormat((CAPTIONING_COLUMNS,), ";", coco_image_id, _caption, _told)
ENTAILMENT = RegionFormat((ENTAILMENT_COLUMNS,), ";", plain_id, _hypothesis, _told)
RETRIEVAL = RegionFormat((RETRIEVAL_COLUMNS,), "\t", plain_id)
