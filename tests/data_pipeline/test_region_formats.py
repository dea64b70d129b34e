"""Region files: exact round trips, named errors, width against height."""
import base64
import gzip
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data_pipeline.region_records import CAPTION, HYPOTHESIS, record, with_objects, with_probabilities
from unimo2_paddle.data.formats.bottom_up import BOTTOM_UP, COLUMNS, read_names
from unimo2_paddle.data.formats.regions import RegionRecord, format_regions, parse_regions, read_regions, size_order
from unimo2_paddle.data.formats.unimo_records import CAPTIONING, ENTAILMENT, RETRIEVAL
from unimo2_paddle.errors import DataError


def same(one, other):
    for field in fields(RegionRecord):
        mine, yours = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype.kind == yours.dtype.kind and mine.shape == yours.shape, field.name
            np.testing.assert_array_equal(mine, yours, err_msg=field.name)
        else:
            assert mine == yours, field.name


def read_back(given, layout, image_id=None):
    line = format_regions(given, layout, image_id=image_id)
    found = parse_regions((line + "\n").encode(), layout, "here:1")
    assert format_regions(found, layout, image_id=image_id) == line
    return found


@given(st.integers(1, 9), st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 5))
def test_every_format_reads_back_what_it_wrote_bit_for_bit(boxes, width, height, features):
    plain = record(77, boxes, width, height, features)
    same(read_back(plain, BOTTOM_UP), plain)
    same(read_back(with_objects(plain), BOTTOM_UP), with_objects(plain))
    same(read_back(plain, RETRIEVAL), plain)
    objects_only = replace(with_probabilities(plain), attribute_probs=None, attribute_ids=None, attribute_confidence=None)
    same(read_back(objects_only, RETRIEVAL), objects_only)
    captioned = replace(with_probabilities(plain), text=CAPTION)
    same(read_back(captioned, CAPTIONING, image_id="COCO_val_77"), captioned)
    same(read_back(replace(plain, text=HYPOTHESIS), ENTAILMENT), replace(plain, text=HYPOTHESIS))


def test_the_lines_have_the_authors_fields_in_their_order():
    plain = record(77)
    captioning = format_regions(replace(plain, text=CAPTION), CAPTIONING, image_id="123456789" + "0077").split(";")
    assert len(captioning) == 16 and captioning[:6] == ["1234567890077", "4", "0 7 8 2", "0 0 0 0", "2 3 4 5", "-1 0 1 -1"]
    assert captioning[8:11] == ["480", "640", "3"] and captioning[15] == "1"
    assert np.frombuffer(base64.b64decode(captioning[11]), np.float32).reshape(3, 4).tolist() == plain.boxes.tolist()
    assert np.frombuffer(base64.b64decode(captioning[14]), np.float32).reshape(3, -1).tolist() == plain.features.tolist()
    entailment = format_regions(replace(plain, text=HYPOTHESIS), ENTAILMENT).split(";")
    assert len(entailment) == 14 and entailment[:4] == ["77", "h.5", "2", "0 7 8 2"] and entailment[7:10] == ["640", "480", "3"]
    retrieval = format_regions(plain, RETRIEVAL).split("\t")
    assert len(retrieval) == 7 and retrieval[:4] == ["77", "640", "480", "3"]
    longer = format_regions(with_objects(plain), BOTTOM_UP).split("\t")
    assert len(longer) == 10 and longer[:3] == ["77", "480", "640"] and longer[7] == "3"  # height first in this one
    assert format_regions(plain, BOTTOM_UP).split("\t")[:4] == ["77", "640", "480", "3"]


def line_with(**changes):
    row = dict(zip(COLUMNS, format_regions(record(77), BOTTOM_UP).split("\t")))
    row.update(changes)
    return "\t".join(row[name] for name in COLUMNS).encode()


def b64(*values):
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


@pytest.mark.parametrize("line, told", [
    (b"1\t2\t3", r"3 fields instead of 6 \(image_id width"),
    (line_with(boxes="%%%%"), "boxes is not base64"),
    (line_with(features="AAA"), "features is not base64"),
    (line_with(features=""), "features is empty"),
    (line_with(number_box="2"), "boxes holds 48 bytes, which are not 2 rows of 4 numbers of 4 bytes; number_box is 2"),
    (line_with(features=b64(*range(17))), "features holds 68 bytes, which are not 3 rows numbers of 4 bytes|features holds 68 bytes"),
    (line_with(number_box="0"), "image 77 has no box"),
    (line_with(number_box="-3"), "number_box is '-3' where a whole number"),
    (line_with(width="0"), "has the size 0 x 480"),
    (line_with(height="48O"), "height is '48O'"),
    (line_with(image_id=" "), "image_id is empty"),
    (line_with(features=b64(*[1, 2, float("nan")])), "features hold numbers that are not finite"),
    (line_with(number_box="1", boxes=b64(5, 5, 4, 9), features=b64(1)), r"box 0 is \[5.0, 5.0, 4.0, 9.0\]"),
])
def test_a_wrong_line_is_named_with_file_line_and_column(tmp_path, line, told):
    path = tmp_path / "part.tsv"
    path.write_bytes(format_regions(record(1), BOTTOM_UP).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=told) as error:
        list(read_regions(path, BOTTOM_UP))
    assert str(error.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("column, value, told", [
    (2, "0 7 x 2", "token_ids has 'x'"), (3, "0 0", "different numbers of ids"), (5, "-1 0", "seg_labels has 2 numbers for 4 tokens"),
    (5, "-1 0 4 -1", "seg_labels has '4'"), (0, "x77", "image_id 'x77' is neither a number nor"), (12, "AAAA", "object_probs holds 3 bytes.*--no-objects"),
])
def test_a_wrong_caption_record_is_named(column, value, told):
    row = format_regions(replace(with_probabilities(record(77)), text=CAPTION), CAPTIONING).split(";")
    row[column] = value
    with pytest.raises(DataError, match=told):
        parse_regions(";".join(row).encode(), CAPTIONING, "part:9")


@pytest.mark.parametrize("column, value, told", [(2, "3", "label is '3'"), (3, "", "different numbers"), (1, "\xe9", "text_id is not plain text")])
def test_a_wrong_entailment_record_is_named(column, value, told):
    row = format_regions(replace(record(77), text=HYPOTHESIS), ENTAILMENT).split(";")
    row[column] = value
    with pytest.raises(DataError, match=told):
        parse_regions(";".join(row).encode(), ENTAILMENT, "part:9")


def test_an_undecodable_detector_column_can_be_left_out():
    row = format_regions(with_probabilities(record(77)), RETRIEVAL).split("\t")
    row[6] = "not base64"
    line = "\t".join(row).encode()
    with pytest.raises(DataError, match="--no-objects"):
        parse_regions(line, RETRIEVAL, "part:9")
    assert parse_regions(line, RETRIEVAL, "part:9", labels=False).object_probs is None


def test_bad_lines_can_be_skipped_and_gzip_reads_the_same(tmp_path):
    lines = [format_regions(record(n), BOTTOM_UP) for n in (1, 2)]
    content = "\n".join([lines[0], "broken", lines[1]]).encode()
    plain, packed = tmp_path / "a.tsv", tmp_path / "a.tsv.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        bad, positions = {}, []
        found = list(read_regions(path, BOTTOM_UP, bad_record=bad.setdefault, position=positions.append))
        assert [(place, r.image_id) for place, r in found] == [(f"{path}:1", "1"), (f"{path}:3", "2")]
        assert list(bad) == [f"{path}:2"]
        assert positions == sorted(positions) and positions[-1] == path.stat().st_size


def test_a_cut_gzip_file_names_the_line_it_breaks_after(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress("".join(format_regions(record(n), BOTTOM_UP) + "\n" for n in range(50)).encode())[:-3000])
    with pytest.raises(DataError, match=r"a.tsv.gz: cannot be read after line \d+: .*fetch this file again"):
        list(read_regions(path, BOTTOM_UP))


@pytest.mark.parametrize("boxes, sizes, expected", [
    ([[0, 0, 600, 400]], (640, 480), "stated"), ([[0, 0, 600, 400]], (480, 640), "swapped"), ([[0, 0, 400, 400]], (640, 480), "either"),
    ([[0, 0, 700, 700]], (640, 480), None), ([[0, 0, 640.9, 480.9]], (640, 480), "stated"), ([[-9, 0, 5, 5]], (640, 480), None),
])
def test_boxes_tell_in_which_order_the_sizes_stand(boxes, sizes, expected):
    assert size_order(RegionRecord("1", *sizes, np.array(boxes, np.float32), np.ones((1, 2), np.float32))) == expected


def test_names_take_the_first_synonym_and_refuse_holes(tmp_path):
    path = tmp_path / "objects_vocab.txt"
    path.write_text("yolk\nbath mat,mat\n", encoding="utf-8")
    assert read_names(path) == ["yolk", "bath mat"]
    path.write_text("yolk\n\nmat\n", encoding="utf-8")
    with pytest.raises(DataError, match=":2: no name"):
        read_names(path)
