"""Paddle's pickled weights: every form paddle.save writes is read, nothing in them is ever run."""
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.checkpoints.pdparams import read_pdparams, write_pdparams
from unimo2_paddle.errors import CheckpointError


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "model_state.pdparams")


def write(file, value, protocol=4):
    with open(file, "wb") as opened:
        pickle.dump(value, opened, protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_saved_state_dict_gives_arrays_and_parameter_names(file, protocol):
    layer = paddle.nn.Linear(3, 2, weight_attr=paddle.ParamAttr(name=f"text.fc{protocol}.w_0"))
    paddle.save(layer.state_dict(), file, protocol=protocol)
    arrays, names = read_pdparams(file)
    assert np.array_equal(arrays["weight"], layer.weight.numpy()) and np.array_equal(arrays["bias"], layer.bias.numpy())
    assert names["weight"] == f"text.fc{protocol}.w_0" and sorted(arrays) == ["bias", "weight"]


def test_a_dict_of_name_and_array_pairs_is_read(file):
    value = np.arange(6, dtype="float32").reshape(2, 3)
    write(file, {"fc": Calls(tuple, ("vq_emb", value))})
    arrays, names = read_pdparams(file)
    assert np.array_equal(arrays["fc"], value) and names == {"fc": "vq_emb"}


def test_a_static_graph_tensor_is_read_without_evaluating(file):
    value = np.arange(3.0)
    write(file, {"w": Calls(eval, "data", {"data": value})})
    assert np.array_equal(read_pdparams(file).arrays["w"], value)


def test_a_pickle_of_python_2_is_read(file):
    raw = np.array([1.5, -2.0], "<f4").tobytes()
    with open(file, "wb") as opened:  # str written as 8-bit strings, names in __builtin__'s days
        opened.write(b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                     b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
                     b"\x89U" + struct.pack("B", len(raw)) + raw + b"tbs.")
    assert read_pdparams(file).arrays["w"].tolist() == [1.5, -2.0]


def test_bfloat16_weights_are_widened_to_float32(file):
    values = paddle.to_tensor([1.0, -2.5, 0.125])
    paddle.save({"w": values.astype("bfloat16")}, file)
    array = read_pdparams(file).arrays["w"]
    assert array.dtype == np.float32 and array.tolist() == [1.0, -2.5, 0.125]


@pytest.mark.parametrize("array", [
    np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(4, dtype=">f4"), np.float32(2).reshape(()),
    np.zeros((0, 3), "f4"), np.array([True, False]), np.arange(3, dtype="int64"), np.arange(3, dtype="float16")])
def test_any_plain_array_comes_back(file, array):
    for protocol in (2, 3, 4, 5):
        write(file, OrderedDict(w=array), protocol)
        again = read_pdparams(file).arrays["w"]
        assert again.shape == array.shape and np.array_equal(again, array) and again.dtype == array.dtype.newbyteorder("=")


def test_paddle_loads_what_we_write(file):
    layer = paddle.nn.Linear(2, 2, weight_attr=paddle.ParamAttr(name="text.loads_what_we_write.w_0"), bias_attr=False)
    value = np.arange(4, dtype="float32").reshape(2, 2)
    write_pdparams(file, {"text.loads_what_we_write.w_0": value})
    layer.set_state_dict(paddle.load(file), use_structured_name=False)
    assert np.array_equal(layer.weight.numpy(), value)


@pytest.mark.parametrize("function, arguments, named", [
    (os.system, ("echo owned",), "system"),
    (eval, ("__import__('os').getcwd()",), "eval with"),
    (eval, ("data", {"data": 1, "other": 2}), "eval"),
    (exec, ("x = 1",), "builtins.exec"),
    (getattr, ({}, "pop"), "builtins.getattr"),
    (np.load, ("/etc/hostname",), "numpy"),
    (__import__, ("os",), "builtins.__import__"),
    (np.dtype, ("O",), "type 'O'"),
])
def test_anything_but_data_is_refused_by_name(file, function, arguments, named):
    write(file, {"w": np.ones(2), "x": Calls(function, *arguments)})
    with pytest.raises(CheckpointError, match="is refused") as caught:
        read_pdparams(file)
    assert named in str(caught.value) and file in str(caught.value)


def test_the_command_in_a_hostile_file_is_not_run(file, tmp_path):
    write(file, {"w": Calls(os.mkdir, str(tmp_path / "owned"))})
    with pytest.raises(CheckpointError, match="mkdir"):
        read_pdparams(file)
    assert not (tmp_path / "owned").exists()


def test_arrays_of_objects_are_refused(file):
    write(file, {"w": np.array([{}, []], dtype=object)})
    with pytest.raises(CheckpointError, match="refused"):
        read_pdparams(file)


def test_a_pickle_cannot_change_the_reader(file):
    with open(file, "wb") as opened:  # asks for the stand-in of eval and sets an attribute on it
        opened.write(b"\x80\x04c__builtin__\neval\n}X\x01\x00\x00\x00aK\x01sb.")
    with pytest.raises(CheckpointError, match="change to a function"):
        read_pdparams(file)


@pytest.mark.parametrize("value, message", [
    ([np.ones(2)], "holds a list, not a dict"),
    ({}, "holds no weights"),
    ({"model": {"w": np.ones(2)}, "epoch": 3}, r"'model' \(dict\), 'epoch' \(int\)"),
    ({3: np.ones(2)}, "not arrays: '3'"),
    ({"w": np.ones(2), "StructuredToParameterName@@": [1]}, "not a table of names"),
])
def test_other_contents_are_named(file, value, message):
    write(file, value)
    with pytest.raises(CheckpointError, match=message):
        read_pdparams(file)


def test_a_claimed_length_beyond_the_file_is_damage_not_memory(file):
    with open(file, "wb") as opened:
        opened.write(b"\x80\x04}X\x01\x00\x00\x00w" + pickle.BINBYTES8 + struct.pack("<Q", 2 ** 40) + b"ab")
    with pytest.raises(CheckpointError, match="damaged"):
        read_pdparams(file)


@given(st.data())
def test_damaged_files_give_arrays_or_a_checkpoint_error(tmp_path_factory, data):
    file = str(tmp_path_factory.mktemp("p") / "x.pdparams")
    value = {"w": np.arange(3, dtype="float32"), "StructuredToParameterName@@": {"w": "vq_emb"}}
    write(file, value, data.draw(st.integers(2, 4)))
    with open(file, "rb") as opened:
        content = bytearray(opened.read())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start:start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with open(file, "wb") as opened:
        opened.write(content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        assert all(isinstance(array, np.ndarray) for array in read_pdparams(file).arrays.values())
    except CheckpointError as error:
        assert file in str(error)
