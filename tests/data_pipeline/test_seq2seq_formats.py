"""The authors' text generation files: columns, lines that are wrong, places kept instead of records, references."""
import pytest

from unimo2_paddle.data.formats.seq2seq import Seq2SeqFile, read_references, seq2seq_file
from unimo2_paddle.errors import DataError


def write(tmp_path, content, name="train.tsv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_columns_are_told_apart_by_their_names_whatever_their_order(tmp_path):
    file = Seq2SeqFile(write(tmp_path, "tgt\tsrc\tknowledge\ttitle\n9\t1 2\t3\t4\r\n8\t5 \"6\t\t7\n"))
    assert len(file) == 2
    first, second = file[0], file[1]
    assert (first.sources, first.knowledge, first.target, first.line) == (("1 2", "4"), "3", "9", 2)
    assert (second.sources, second.knowledge, second.target, second.line) == (('5 "6', "7"), None, "8", 3)


def test_records_are_read_again_from_their_places_past_empty_lines_and_a_byte_order_mark(tmp_path):
    lines = [f"é{number}\t{number}" for number in range(50)]
    file = Seq2SeqFile(write(tmp_path, "\ufeffsrc\ttgt\n" + "\n\n".join(lines)))
    assert [file[number].target for number in (49, 0, 7)] == ["49", "0", "7"] and file[7].sources == ("é7",) and file[7].line == 16


def test_a_file_without_targets_is_for_prediction(tmp_path):
    assert Seq2SeqFile(write(tmp_path, "src\n1 2\n"))[0].target is None


@pytest.mark.parametrize("content, text", [
    ("src\ttgt\n1\t2\n1\t2\t3\n", "train.tsv:3: 3 fields, the header names 2 (src, tgt)"),
    ("src\ttgt\n1\n", "train.tsv:2: 1 fields"), ("src\ttgt\n1\t \n", "train.tsv:2: the target (tgt) is empty"),
    ("src\ttgt\n\t2\n", "train.tsv:2: the source is empty"), (b"src\ttgt\n\xff\t1\n", "train.tsv:2: not UTF-8"),
    ("tgt\n1\n", "train.tsv:1: the header must name"), ("src\tsrc\n1\t2\n", "train.tsv:1: the header must name"),
    ("", "train.tsv:1: the header must name"), ("src\ttgt\n", "no record in this file"),
])
def test_a_malformed_file_is_refused_by_file_and_line(tmp_path, content, text):
    with pytest.raises(DataError) as caught:
        Seq2SeqFile(write(tmp_path, content))
    assert text in str(caught.value)


def test_few_bad_records_are_left_out_and_counted_many_stop_the_run(tmp_path, caplog):
    lines = [f"{number}\t{number}" for number in range(10)]
    lines[3] = lines[7] = "one field"
    path = write(tmp_path, "src\ttgt\n" + "\n".join(lines) + "\n")
    file = Seq2SeqFile(path, max_bad_ratio=0.2)
    assert [line for line, _ in file.bad] == [5, 9] and len(file) == 8 and file[3].target == "4"
    assert "train.tsv:5: left out: 1 fields" in caplog.text and "2 of 10 records left out" in caplog.text
    with pytest.raises(DataError, match=r"train.tsv:5: 1 fields.*2 of 10 records are bad.*raise data.max_bad_ratio above 0.1"):
        Seq2SeqFile(path, max_bad_ratio=0.1)


def test_a_missing_file_or_split_tells_what_to_give(tmp_path):
    with pytest.raises(DataError, match="no dev.2k.tsv or dev.tsv here.*CNN/DailyMail"):
        seq2seq_file(str(tmp_path), "cnndm", "val")
    write(tmp_path, "src\n", "dev.tsv")
    assert seq2seq_file(str(tmp_path), "cnndm", "val").endswith("dev.tsv")
    with pytest.raises(DataError, match="has no split 'dev'; it has train, val, test"):
        seq2seq_file(str(tmp_path), "coqa", "dev")


def test_references_go_line_by_line(tmp_path):
    path = write(tmp_path, '["a", "b"]\n"c"\n', "r.jsonl")
    assert read_references(path, 2) == [["a", "b"], ["c"]]
    with pytest.raises(DataError, match="2 lines for 3 records"):
        read_references(path, 3)
    for content, text in (("[]\n", "r.jsonl:1: expected a list"), ("{\n", "r.jsonl:1: not JSON"), ('["a"]\n[1]\n', "r.jsonl:2: expected a list")):
        with pytest.raises(DataError, match=text):
            read_references(write(tmp_path, content, "r.jsonl"), 1)
    with pytest.raises(DataError, match="cannot read the references"):
        read_references(str(tmp_path / "none.jsonl"), 1)
