"""GLUE's files: official and the authors' headers, CoLA without one, labels, the server's files and their checks."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.data.formats.glue import GLUE, GlueRecord, check_submission, glue_file, read_glue, read_submission, submission_lines
from unimo2_paddle.errors import DataError

MNLI_HEADER = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"


@pytest.fixture
def write(tmp_path):
    def writer(text, name="file.tsv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return str(path)

    return writer


@pytest.mark.parametrize("dataset, text, wanted", [
    ("sst2", "sentence\tlabel\nhide new secretions \t0\nfine\t1\n", [GlueRecord(0, "hide new secretions", None, 0, 2), GlueRecord(1, "fine", None, 1, 3)]),
    ("sst2", "index\tsentence\n7\tuneasy mishmash\n", [GlueRecord(7, "uneasy mishmash", None, None, 2)]),
    ("cola", "gj04\t1\t\tThey drank.\ngj04\t0\t*\tThey drank the.\n", [GlueRecord(0, "They drank.", None, 1, 1), GlueRecord(1, "They drank the.", None, 0, 2)]),
    ("cola", "index\tsentence\n0\tBill ran.\n", [GlueRecord(0, "Bill ran.", None, None, 2)]),
    ("cola", "text_a\tlabel\nBill ran.\t1\n", [GlueRecord(0, "Bill ran.", None, 1, 2)]),
    ("mnli", MNLI_HEADER + "\tlabel1\tgold_label\n4\tp\tq\tfiction\t(\t(\t(\t(\tIt rains.\tIt is wet.\tneutral\tentailment\n",
     [GlueRecord(4, "It rains.", "It is wet.", 2, 2)]),
    ("mnli", "qid\ttext_a\ttext_b\tlabel\n3\tIt rains.\tIt is dry.\t0\n", [GlueRecord(3, "It rains.", "It is dry.", 0, 2)]),
    ("mnli", "Premise\tHypothesis\tLabel\nA\tB\tneutral\n", [GlueRecord(0, "A", "B", 1, 2)]),
    ("stsb", "index\tgenre\tsentence1\tsentence2\tscore\n0\tmain\tA plane.\tA jet.\t3.800\n", [GlueRecord(0, "A plane.", "A jet.", 3.8, 2)]),
])
def test_a_file_is_read_by_its_header(write, dataset, text, wanted):
    assert read_glue(write(text), dataset) == wanted


def test_quotes_line_ends_and_foreign_line_separators_are_text(write):
    text = "\ufeffsentence\tlabel\r\n\"open quote\t1\r\nna\u00efve\u2028two \u0085 \"\"x\"\"\t0\r\n\r\n"
    records = read_glue(write(text), "sst2")
    assert [record.text_a for record in records] == ['"open quote', "na\u00efve\u2028two \u0085 \"\"x\"\""]
    assert [record.label for record in records] == [1, 0]


def test_numbers_follow_the_given_order_of_names(write):
    path = write("text_a\ttext_b\tlabel\na\tb\t0\na\tb\tneutral\n")
    names = ["entailment", "neutral", "contradiction"]
    assert [names[record.label] for record in read_glue(path, "mnli", names)] == ["entailment", "neutral"]


def test_pairs_without_agreement_are_left_out(write):
    records = read_glue(write("sentence1\tsentence2\tgold_label\na\tb\t-\nc\td\tneutral\n"), "mnli")
    assert [record.text_a for record in records] == ["c"]


@pytest.mark.parametrize("dataset, text, told", [
    ("sst2", "words\tlabel\nx\t1\n", ":1: SST-2 needs a header"),
    ("mnli", "sentence1\tlabel\nx\t1\n", "sentence1 and sentence2"),
    ("sst2", "sentence\tlabel\nx\n", ":2: 1 fields, expected 2"),
    ("sst2", "sentence\tlabel\nx\t2\n", ":2: the label '2' is none of 0, 1"),
    ("sst2", "sentence\tlabel\nx\t1\ny\t\n", ":3: the label is empty"),
    ("mnli", "sentence1\tsentence2\tlabel\na\tb\tmaybe\n", "'maybe' is none of contradiction, neutral, entailment"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "not a number from 0 to 5"),
    ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "not a number from 0 to 5"),
    ("sst2", "index\tsentence\nseven\tx\n", "the index 'seven' is not a number"),
    ("sst2", "sentence\tlabel\n", "no sentence"),
    ("sst2", "", "no sentence"),
    ("sst2", b"sentence\tlabel\n\xff\xfe\t1\n", "not UTF-8"),
])
def test_a_wrong_file_is_named_with_its_line(write, dataset, text, told):
    path = write(text)
    with pytest.raises(DataError) as error:
        read_glue(path, dataset)
    assert told in str(error.value) and path in str(error.value)


def test_files_are_found_under_official_and_the_authors_names(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "dev.tsv").touch()
    (tmp_path / "dev_mismatched.tsv").touch()
    assert glue_file(str(tmp_path), "mnli", "val", "matched").endswith("dev.tsv")
    assert glue_file(str(tmp_path), "mnli", "val", "mismatched").endswith("dev_mismatched.tsv")
    assert glue_file(str(tmp_path), "mnli", "test", "ax") is None, "the diagnostic is optional"
    with pytest.raises(DataError, match="no test_matched.tsv or m/test.tsv"):
        glue_file(str(tmp_path), "mnli", "test", "matched")
    with pytest.raises(DataError, match="no split 'dev'; it has train, val, test"):
        glue_file(str(tmp_path), "mnli", "dev", "matched")


@given(st.permutations(list(range(6))), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_a_server_file_is_read_back_as_it_was_written(tmp_path_factory, indices, predictions):
    path = tmp_path_factory.getbasetemp() / "MNLI-m.tsv"
    path.write_text(submission_lines("mnli", indices, predictions))
    assert read_submission(str(path), "mnli") == dict(zip(indices, predictions))
    assert check_submission(str(path), "mnli", "matched", size=6) == 6


def test_server_files_have_names_for_classes_and_scores_within_the_range():
    assert submission_lines("mnli", [1, 0], [2, 0]) == "index\tprediction\n0\tcontradiction\n1\tentailment\n"
    assert submission_lines("stsb", [0, 1, 2], [5.4, -0.2, 2.5]) == "index\tprediction\n0\t5.000\n1\t0.000\n2\t2.500\n"
    assert submission_lines("sst2", [0], [1]) == "index\tprediction\n0\t1\n"


@pytest.mark.parametrize("dataset, text, told", [
    ("sst2", "id\tlabel\n0\t1\n", ":1: the first line"),
    ("sst2", "index\tprediction\n0\t1\n0\t1\n", ":3: index 0 occurs twice"),
    ("sst2", "index\tprediction\n0\t1\n2\t1\n", "no prediction for index 1"),
    ("sst2", "index\tprediction\n0\t0.7\n", "'0.7' is none of 0, 1"),
    ("mnli", "index\tprediction\n0\t2\n", "'2' is none of contradiction"),
    ("stsb", "index\tprediction\n0\t6\n", "not a number from 0 to 5"),
    ("sst2", "index\tprediction\n0 1\n", ":2: expected an index and a prediction"),
    ("sst2", "index\tprediction\n0\t1\n\n1\t1\n", ":3: an empty line"),
])
def test_a_wrong_server_file_is_refused(write, dataset, text, told):
    with pytest.raises(DataError, match="(?s)" + told.replace(".", r"\.")):
        check_submission(write(text), dataset, "matched" if dataset == "mnli" else "", size=0)


def test_the_official_sizes_are_asked_for(write):
    path = write(submission_lines("sst2", list(range(1820)), [1] * 1820))
    with pytest.raises(DataError, match="1820 predictions, the test set has 1821"):
        check_submission(path, "sst2")
    assert {name: size for spec in GLUE.values() for name, size in spec.submissions.values()} == {
        "SST-2.tsv": 1821, "CoLA.tsv": 1063, "STS-B.tsv": 1379, "MNLI-m.tsv": 9796, "MNLI-mm.tsv": 9847, "AX.tsv": 1104}
