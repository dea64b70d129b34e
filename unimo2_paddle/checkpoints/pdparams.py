"""Paddle's ``.pdparams`` files (pickles) without running anything they contain.

A pickle can call any importable function while it loads. Here only names on a short list are resolved, each to a harmless
stand-in of our own; any other name is refused and named. Understood are the forms ``paddle.save`` of Paddle 2.x and 3.x
writes: a dict of numpy arrays with the ``StructuredToParameterName@@`` entry, a dict of ``(name, array)`` pairs, and the
static graph's ``eval('data', {'data': array})``.
"""
import collections
import mmap
import os
import pickle
import stat
from typing import Dict, NamedTuple

import numpy as np

from unimo2_paddle.checkpoints.released import widen_bfloat16
from unimo2_paddle.errors import CheckpointError

_NAME_TABLE = "StructuredToParameterName@@"
_KINDS = "biuf"  # bool, integers and floats


class PdParams(NamedTuple):
    """A weights file: arrays by the key they were saved under, and the parameter name of each key (often empty)."""

    arrays: Dict[str, np.ndarray]
    parameter_names: Dict[str, str]


class _Refused(Exception):
    """Something in the pickle is not data."""


class _Dtype:
    """Stand-in for numpy.dtype: plain numbers only."""

    def __init__(self, code, *_):
        code = code.decode("latin1") if isinstance(code, bytes) else str(code)
        try:
            self.dtype = np.dtype(code)
        except TypeError:
            raise _Refused(f"numpy type {code!r}") from None
        if self.dtype.kind not in _KINDS or self.dtype.fields:
            raise _Refused(f"arrays of numpy type {code!r}")

    def __setstate__(self, state):
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for numpy.ndarray: checks shape, type and size before it makes an array of the bytes in the file."""

    value = None

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _Dtype):
            raise _Refused("an array without a plain numpy type")
        data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote bytes
        if not isinstance(data, (bytes, bytearray)):
            raise _Refused("an array of objects")
        self.value = _shaped(data, dtype.dtype, shape, "F" if fortran_order else "C")


def _shaped(data, dtype, shape, order):
    size = dtype.itemsize
    for dimension in shape:
        if not isinstance(dimension, int) or dimension < 0:
            raise _Refused(f"an array of impossible shape {shape}")
        size *= dimension
    if size != len(data):
        raise _Refused(f"an array whose shape {list(shape)} of {dtype.name} needs {size} bytes and has {len(data)}")
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    return np.ascontiguousarray(array, dtype.newbyteorder("=")).reshape(shape)


def _reconstruct(*_):
    return _Array()


def _from_buffer(data, dtype, shape, order):
    array = _Array()
    array.value = _shaped(bytes(data), dtype.dtype, shape, order)
    return array


def _scalar(dtype, data):
    array = _Array()
    array.value = _shaped(data, dtype.dtype, (), "C")
    return array


def _eval(expression, names=None, *_):
    """Paddle's way to store a static-graph tensor; any other expression is refused, nothing is evaluated."""
    if expression != "data" or not isinstance(names, dict) or set(names) != {"data"}:
        raise _Refused(f"a call of eval with {str(expression)[:80]!r}")
    return names["data"]


def _bytes():
    """The empty bytes object of pickle protocol 2."""
    return b""


def _encode(text, encoding):
    if encoding != "latin1":
        raise _Refused(f"bytes written in {str(encoding)[:20]!r}")
    return text.encode("latin1")


class _Function:
    """A function that a pickle may call but not alter (pickles can set attributes of what they resolve)."""

    __slots__ = ("_call",)

    def __init__(self, call):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)

    def __setstate__(self, state):
        raise _Refused("a change to a function")


_ALLOWED = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _Function(_encode),
}
for _module in ("builtins", "__builtin__"):
    _ALLOWED.update({f"{_module}.eval": _Function(_eval), f"{_module}.bytes": _Function(_bytes), f"{_module}.tuple": tuple})
for _module in ("numpy.core", "numpy._core"):
    _ALLOWED.update({f"{_module}.multiarray._reconstruct": _Function(_reconstruct),
                     f"{_module}.multiarray.scalar": _Function(_scalar),
                     f"{_module}.numeric._frombuffer": _Function(_from_buffer)})


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        if full_name not in _ALLOWED:
            raise _Refused(f"the name {full_name}")
        return _ALLOWED[full_name]


def read_pdparams(path):
    """Read a ``.pdparams`` weights file.

    Args:
        path: the file; float, integer and bool arrays. Paddle stores bfloat16 as uint16: those come back as float32.

    Returns:
        PdParams.

    Raises:
        CheckpointError: if the file is no such pickle, asks for anything but data, or holds anything but named arrays.
    """
    loaded = _load_data(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dict of named weights")
    table = loaded.pop(_NAME_TABLE, {})
    if not isinstance(table, dict) or not all(isinstance(text, str) for pair in table.items() for text in pair):
        raise CheckpointError(f"{path}: its entry {_NAME_TABLE!r} is not a table of names")
    arrays, foreign = {}, []
    for key, value in loaded.items():
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], _Array):
            table.setdefault(key, value[0])
            value = value[1]
        if not isinstance(key, str) or not isinstance(value, _Array) or value.value is None:
            foreign.append(f"{str(key)[:80]!r} ({type(value).__name__.lstrip('_')})")
        else:
            arrays[key] = widen_bfloat16(value.value) if value.value.dtype == np.uint16 else value.value
    if foreign:
        raise CheckpointError(f"{path} is not a plain weights file: these entries are not arrays: {', '.join(foreign[:10])}"
                              + (f" and {len(foreign) - 10} more" if len(foreign) > 10 else "")
                              + ". Save the model's state_dict alone.")
    if not arrays:
        raise CheckpointError(f"{path} holds no weights")
    return PdParams(arrays, {key: name for key, name in table.items() if key in arrays})


def write_pdparams(path, arrays):
    """Write named arrays so that ``paddle.load`` returns them as a dict of tensors.

    The keys are given as they are, so a model takes them with ``set_state_dict(paddle.load(path),
    use_structured_name=False)`` when they are its parameter names. The caller makes the file appear at once (it writes
    into a temporary directory).
    """
    with open(path, "wb") as file:
        pickle.dump({name: np.asarray(array) for name, array in arrays.items()}, file, protocol=4)


def _load_data(path):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            # Mapped, because reads then end at the file's end whatever length the pickle claims for them.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _DataUnpickler(mapped, encoding="latin1").load()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except _Refused as error:
        raise CheckpointError(f"{path} is refused: it asks for {error}. A weights file holds nothing but named arrays; "
                              "loading more could run somebody's code.") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in many ways, all of them mean the same
        raise CheckpointError(f"{path} is damaged or not a .pdparams file ({type(error).__name__}: {error})") from error
