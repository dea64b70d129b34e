"""The authors' one-file-per-variable directories: exact both ways, every damage named, nothing half-done."""
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unimo2_paddle.checkpoints.released import (
    load_released,
    read_header,
    read_released,
    read_variable,
    save_released,
    write_released,
    write_variable,
)
from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.models.configuration import Unimo2Config
from unimo2_paddle.models.unimo2 import Unimo2Model

DATA = Path(__file__).parents[1] / "data"
TINY = str(DATA / "tiny_release")  # written by Paddle 2.6.2's own save operator
DTYPES = ["bool", "i1", "i2", "<i4", "<i8", "u1", "<f2", "<f4", "<f8"]


def tiny_model(**changes):
    config = Unimo2Config.from_json(str(DATA / "golden" / "tiny_config.json"), **changes)
    with paddle.utils.unique_name.guard():
        return Unimo2Model(config)


def variable(data=b"\0" * 24, code=5, dims=(2, 3), head=(0, 0, 0), length=None, descriptor=None):
    """The bytes of a variable file, with any part replaced."""
    if descriptor is None:
        descriptor = bytes([8, code]) + b"".join(b"\x10" + varint(d) for d in dims)
    length = len(descriptor) if length is None else length
    return struct.pack("<IQIi", *head, length) + descriptor + data


def varint(value):
    value, out = value & (1 << 64) - 1, b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


# ---- one variable ----


SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5)


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_any_array_comes_back_exactly(tmp_path_factory, array):
    file = str(tmp_path_factory.mktemp("v") / "x")
    write_variable(file, array)
    again = read_variable(file)
    assert again.dtype == array.dtype and again.shape == array.shape and again.tobytes() == array.tobytes()
    assert again.flags.writeable


def test_files_of_paddle_s_own_save_operator_come_back_byte_for_byte(tmp_path):
    target = str(tmp_path / "again")
    write_released(target, read_released(TINY))
    assert sorted(os.listdir(target)) == sorted(os.listdir(TINY))
    for name in os.listdir(TINY):
        assert Path(TINY, name).read_bytes() == Path(target, name).read_bytes(), name


def test_paddle_reads_what_we_write(tmp_path):
    array = np.arange(6, dtype="float32").reshape(2, 3)
    write_variable(str(tmp_path / "x"), array)
    assert np.array_equal(paddle.load(str(tmp_path / "x")).numpy(), array)


def test_layouts_in_memory_do_not_matter(tmp_path):
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    for number, view in enumerate((array.T, array[:, ::2], np.asfortranarray(array))):
        write_variable(str(tmp_path / str(number)), view)
        assert np.array_equal(read_variable(str(tmp_path / str(number))), view)


def test_bfloat16_is_widened_to_float32(tmp_path):
    (tmp_path / "x").write_bytes(variable(struct.pack("<3H", 0x3F80, 0xC000, 0x3E80), code=22, dims=(3,)))
    assert read_variable(str(tmp_path / "x")).tolist() == [1.0, -2.0, 0.25]


def test_a_type_without_a_code_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="complex64"):
        write_variable(str(tmp_path / "x"), np.zeros(2, "complex64"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content, message", [
    (b"", r"truncated at byte 0"),
    (variable()[:19], r"truncated at byte 19: the head at byte 0 needs 20 bytes, 19 are left"),
    (variable()[:23], r"truncated at byte 23: the descriptor at byte 20 needs 6 bytes, 3 are left"),
    (variable()[:-1], r"byte 26: \[2, 3\] values of float32 are 24 bytes, the file holds 23"),
    (variable() + b"x", r"1 trailing bytes follow at byte 50"),
    (variable(head=(1, 0, 0)), r"byte 0: version 1"),
    (variable(head=(0, 2, 0)), r"byte 4: 2 LoD levels"),
    (variable(head=(0, 0, 7)), r"byte 12: tensor version 7"),
    (variable(length=-6), r"byte 16: negative descriptor length -6"),
    (variable(length=2 ** 31 - 1), r"the descriptor at byte 20 needs 2147483647 bytes"),
    (variable(dims=(-2, -3)), r"byte 22: negative dimension -2"),
    (variable(dims=(2 ** 62, 2 ** 62)), r"the file holds 24"),
    (variable(data=b"", dims=(0, 2 ** 62, 2 ** 62)), r"impossible dimensions"),
    (variable(dims=(1,) * 10), r"more than 9 dimensions"),
    (variable(code=99), r"byte 20: data type 99 is not readable"),
    (variable(descriptor=b""), r"gives no data type"),
    (variable(descriptor=b"\x08\x05\x08\x05"), r"byte 22: a second data type"),
    (variable(descriptor=b"\x08\x05\x1a\x01"), r"byte 22: unknown descriptor tag 26"),
    (variable(descriptor=b"\x08\x05\x10\x80"), r"byte 24: the descriptor ends inside a number"),
    (variable(descriptor=b"\x08\x05\x10" + b"\xff" * 11), r"byte 23: a number longer than 10 bytes"),
    (b"PK\x03\x04 a zip file, not a variable", r"byte 0: version"),
])
def test_damage_is_named_with_file_and_byte(tmp_path, content, message):
    file = tmp_path / "vq_emb"
    file.write_bytes(content)
    for read in (read_variable, read_header):
        if "impossible" in message and read is read_header:
            continue  # an empty array's dimensions are only judged when it is made
        with pytest.raises(CheckpointError, match=message) as caught:
            read(str(file))
        assert str(file) in str(caught.value)


@given(st.binary(max_size=60), st.integers(0, 60))
def test_any_bytes_give_an_array_or_a_checkpoint_error(tmp_path_factory, junk, position):
    file = tmp_path_factory.mktemp("junk") / "x"
    good = variable()
    for content in (junk, good[:position] + junk + good[position:], good[:position] + junk):
        file.write_bytes(content)
        try:
            assert read_variable(str(file)).nbytes <= len(content) * 2
        except CheckpointError:
            pass


def test_memory_stays_within_the_file_size_whatever_the_header_says(tmp_path):
    (tmp_path / "x").write_bytes(variable(dims=(10 ** 6, 10 ** 6)))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_variable(str(tmp_path / "x"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 ** 6


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_variable(str(tmp_path / "x"), np.ones(3, "float32"))
    with pytest.raises(CheckpointError):
        write_variable(str(tmp_path / "x"), np.array([object()]))
    assert read_variable(str(tmp_path / "x")).tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["x"]


# ---- directories ----


def test_hidden_files_and_subdirectories_are_ignored(tmp_path):
    write_variable(str(tmp_path / "vq_emb"), np.ones(2, "float32"))
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "notes").mkdir()
    assert list(read_released(str(tmp_path))) == ["vq_emb"]


def test_only_wanted_names_are_read_and_absent_ones_listed():
    assert list(read_released(TINY, ["vq_emb", "cmcl_temperature"])) == ["cmcl_temperature", "vq_emb"]
    with pytest.raises(CheckpointError, match="no file for 2 wanted variables: another, nothing"):
        read_released(TINY, ["vq_emb", "nothing", "another"])


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_text("x"), "is a file; the authors' checkpoints are directories"),
    (lambda path: path.mkdir(), "holds no variable files"),
    (lambda path: (path.mkdir(), (path / "sub").mkdir(), (path / ".x").write_text("")), "holds no variable files"),
    (lambda path: (path.mkdir(), os.mkfifo(path / "pipe")), "pipe is not a regular file"),
    (lambda path: (path.mkdir(), (path / "README").write_text("Weights of UNIMO-2")), "README: truncated|README: byte 0"),
])
def test_a_wrong_path_is_named_with_the_way_out(tmp_path, make, message):
    make(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=message):
        read_released(str(tmp_path / "weights"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../b", ".hidden", "a\0b", "config.json", "x" * 300])
def test_names_that_are_no_plain_file_names_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(CheckpointError):
        write_released(str(tmp_path / "new"), {"good": np.ones(1, "float32"), name: np.ones(1, "float32")})
    assert os.listdir(tmp_path) == []


def test_a_directory_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    arrays, replace = {f"v{i}": np.ones(1, "float32") for i in range(5)}, os.replace

    def failing(source, target):
        if target.endswith("v3"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        write_released(str(tmp_path / "new"), arrays)
    assert os.listdir(tmp_path) == []


def test_a_directory_in_use_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    write_released(str(tmp_path / "empty"), {"a": np.ones(1, "float32")})
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        write_released(str(tmp_path / "empty"), {"b": np.ones(1, "float32")})
    assert os.listdir(tmp_path / "empty") == ["a"] and os.listdir(tmp_path) == ["empty"]


# ---- models ----


def test_the_released_files_compute_what_the_authors_code_computed():
    model = tiny_model(grounding_counts_padding=True)
    report = load_released(model, TINY)
    model.eval()
    assert len(report.loaded) == len(model.parameters()) and not report.missing and not report.mismatched
    assert "grounded.cmcl_pooled_fc_image.w_0" in report.unexpected and "parameters loaded" in str(report)
    with np.load(str(DATA / "golden" / "case01_joint.npz")) as case:
        given_inputs = [paddle.to_tensor(case[f"in/{name}"]) for name in ("image_pixel_input", "src_ids", "pos_ids")]
        mask = paddle.to_tensor(case["in/text_mask"].reshape(len(case["in/src_ids"]), -1).astype("float32"))
        image, ids, positions = given_inputs
        out = model(image=image.astype("float32"), input_ids=ids.reshape(mask.shape).astype("int64"),
                    position_ids=positions.reshape(mask.shape).astype("int64"), text_mask=mask)
        assert np.abs(model.retrieval_score(out).numpy() - case["out/score"].reshape(-1)).max() < 1e-5


def test_save_then_load_is_exact(tmp_path):
    model, other = tiny_model(), tiny_model()
    save_released(model, str(tmp_path / "out"))
    load_released(other, str(tmp_path / "out"))
    for a, b in zip(model.parameters(), other.parameters()):
        assert a.name == b.name and np.array_equal(a.numpy(), b.numpy())


def damaged_release(tmp_path):
    """A release in which two variables are missing, one is mis-shaped and one has integers."""
    directory = str(tmp_path / "release")
    shutil.copytree(TINY, directory)
    os.remove(os.path.join(directory, "vq_emb"))
    os.remove(os.path.join(directory, "text.pos_embedding"))
    write_variable(os.path.join(directory, "text.word_embedding"), np.zeros((99, 32), "float32"))
    write_variable(os.path.join(directory, "cmcl_temperature"), np.zeros(1, "int64"))
    return directory


def test_all_missing_and_mis_shaped_parameters_are_listed_and_the_model_is_untouched(tmp_path):
    model = tiny_model()
    before = {p.name: p.numpy().copy() for p in model.parameters()}
    with pytest.raises(CheckpointError) as caught:
        load_released(model, damaged_release(tmp_path))
    text = str(caught.value)
    assert "4 of" in text and "vq_emb: missing, the model has [64, 32]" in text and "text.pos_embedding: missing" in text
    assert "text.word_embedding: the model has [120, 32], the checkpoint [99, 32]" in text
    assert "cmcl_temperature: the model has [1] float32, the checkpoint [1] int64" in text
    assert all(np.array_equal(before[p.name], p.numpy()) for p in model.parameters())


def test_allowed_names_keep_their_values_and_are_reported(tmp_path):
    model = tiny_model()
    words = model.text.words.weight.numpy().copy()
    report = load_released(model, damaged_release(tmp_path), allow_missing=("vq_*", "text.*_embedding", "cmcl_temperature"))
    assert report.missing == ["text.pos_embedding", "vq_emb"]
    assert [m.name for m in report.mismatched] == ["cmcl_temperature", "text.word_embedding"]
    assert np.array_equal(model.text.words.weight.numpy(), words)
    assert "text.word_embedding: the model has [120, 32], the checkpoint [99, 32]" in str(report)


def test_a_damaged_file_leaves_the_model_untouched(tmp_path):
    directory = str(tmp_path / "release")
    shutil.copytree(TINY, directory)
    file = Path(directory, "vq_emb")
    file.write_bytes(file.read_bytes()[:-4])
    model = tiny_model()
    before = [p.numpy().copy() for p in model.parameters()]
    with pytest.raises(CheckpointError, match="vq_emb: byte 26"):
        load_released(model, directory)
    assert all(np.array_equal(a, p.numpy()) for a, p in zip(before, model.parameters()))


def test_half_precision_files_load_into_a_single_precision_model(tmp_path):
    write_released(str(tmp_path / "half"), {n: a.astype("float16") for n, a in read_released(TINY).items()})
    model = tiny_model()
    load_released(model, str(tmp_path / "half"))
    assert np.array_equal(model.dictionary.codebook.numpy(), read_variable(os.path.join(TINY, "vq_emb")))
