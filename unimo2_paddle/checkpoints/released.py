"""The authors' released checkpoints: a directory with one binary file per variable, read and written with numpy alone.

A file is, in little-endian order: uint32 0 | uint64 number of LoD levels (0) | uint32 0 | int32 n | n bytes of a protobuf
``TensorDesc`` (field 1 the data type, field 2 once per dimension) | the raw data. The file's name is the variable's name.
Source: the layout of Paddle's own save operator, checked byte by byte against Paddle 2.6.2.
"""
import fnmatch
import itertools
import os
import shutil
import stat
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.paths import PathLike

if TYPE_CHECKING:
    from paddle.nn import Layer

_HEAD = struct.Struct("<IQIi")  # tensor version, LoD levels, descriptor version, descriptor length
_BFLOAT16 = 22  # numpy has no such type: read as uint16 and widened to float32, which is exact
_DTYPES = {0: "bool", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<f2", 5: "<f4", 6: "<f8", 20: "u1", 21: "i1", _BFLOAT16: "<u2"}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items() if code != _BFLOAT16}
_MAX_DIMENSIONS = 9  # Paddle's own limit on a tensor's rank
_temporary_number = itertools.count()


class VariableHeader(NamedTuple):
    """What a variable file says before its data: numpy type, shape, Paddle's type code and the data's byte offset."""

    dtype: np.dtype
    shape: Tuple[int, ...]
    code: int
    offset: int


class Mismatch(NamedTuple):
    """A parameter whose stored array does not fit: what the model has and what the checkpoint has."""

    name: str
    expected: str
    found: str

    def __str__(self):
        return f"{self.name}: the model has {self.expected}, the checkpoint {self.found}"


@dataclass
class LoadReport:
    """What happened to every parameter and every stored variable of one load.

    Attributes:
        loaded: names whose values were taken from the checkpoint.
        missing: parameters of the model that the checkpoint does not have; they keep their values.
        unexpected: variables of the checkpoint that the model does not have; they are ignored.
        mismatched: parameters stored with another shape or kind of number; they keep their values.
    """

    loaded: List[str] = field(default_factory=list)
    missing: List[str] = field(default_factory=list)
    unexpected: List[str] = field(default_factory=list)
    mismatched: List[Mismatch] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} parameters loaded, {len(self.missing)} missing, {len(self.mismatched)} mis-shaped, "
                 f"{len(self.unexpected)} variables of the checkpoint unused"]
        for title, entries in (("missing (kept as they were)", self.missing),
                               ("mis-shaped (kept as they were)", self.mismatched),
                               ("in the checkpoint, not in the model", self.unexpected)):
            if entries:
                lines.append(f"{title}:")
                lines += [f"  {entry}" for entry in entries]
        return "\n".join(lines)


# ---- one variable ----


def read_variable(path):
    """Read one variable file.

    Args:
        path: file of bool, int8/16/32/64, uint8, float16/32/64 or bfloat16 (widened to float32) values.

    Returns:
        A writable numpy array of the stored shape.

    Raises:
        CheckpointError: naming file and byte offset, if anything in the file is not as it must be. The sizes are
            compared with the file's before any memory is taken.
    """
    with _open_regular(path) as (file, size):
        header = _read_header(file, size, path)
        data = bytearray(size - header.offset)
        if file.readinto(data) != len(data):
            raise CheckpointError(f"{path}: the file shrank while it was read; read it again when its writer is done")
    array = np.frombuffer(data, header.dtype)
    try:
        array = array.reshape(header.shape)
    except ValueError as error:  # an empty array may still claim dimensions beyond numpy's limits
        raise CheckpointError(f"{path}: impossible dimensions {list(header.shape)}") from error
    return widen_bfloat16(array) if header.code == _BFLOAT16 else array


def write_variable(path, array):
    """Write one array as a variable file, byte for byte as Paddle 2.6.2's save operator writes it.

    The data go to a temporary file in the same directory, which then takes the place of ``path``.

    Raises:
        CheckpointError: for a type of number that the format has no code for.
    """
    head, array = _encode(path, array)
    directory, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(directory, f".{name[:200]}.tmp-{os.getpid()}-{next(_temporary_number)}")
    try:
        with open(temporary, "wb") as file:
            file.write(head)
            file.write(array.data if array.size else b"")
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_header(path):
    """The ``VariableHeader`` of a variable file, checked against the file's size, without reading the data."""
    with _open_regular(path) as (file, size):
        return _read_header(file, size, path)


def widen_bfloat16(bits):
    """The float32 values of bfloat16 numbers given as uint16 bit patterns (the upper half of a float32)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@contextmanager
def _open_regular(path):
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: a named pipe would block
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _read_header(file, size, path):
    def take(count, what):
        offset = file.tell()
        if size - offset < count:
            raise CheckpointError(f"{path}: truncated at byte {size}: {what} at byte {offset} needs {count} bytes, "
                                  f"{size - offset} are left")
        return file.read(count)

    version, lod_levels, inner_version, length = _HEAD.unpack(take(_HEAD.size, "the head"))
    if version:
        raise CheckpointError(f"{path}: byte 0: version {version} instead of 0: not a variable file of the authors' format")
    if lod_levels:
        raise CheckpointError(f"{path}: byte 4: {lod_levels} LoD levels; parameters have none")
    if inner_version:
        raise CheckpointError(f"{path}: byte 12: tensor version {inner_version} instead of 0: "
                              "not a variable file of the authors' format")
    if length < 0:
        raise CheckpointError(f"{path}: byte 16: negative descriptor length {length}")
    code, shape = _parse_descriptor(take(length, "the descriptor"), path)
    offset = _HEAD.size + length
    dtype = np.dtype(_DTYPES[code])
    needed = dtype.itemsize
    for dimension in shape:
        needed *= dimension
    where = f"{path}: byte {offset}: {list(shape)} values of {dtype.name} are {needed} bytes"
    if needed > size - offset:
        raise CheckpointError(f"{where}, the file holds {size - offset}: it is truncated or its dimensions are wrong")
    if needed < size - offset:
        raise CheckpointError(f"{where}, but {size - offset - needed} trailing bytes follow at byte {offset + needed}")
    return VariableHeader(dtype, shape, code, offset)


def _parse_descriptor(data, path):
    """Type code and dimensions of a TensorDesc message as Paddle writes it: tag 8 and the type, then tag 16 and a dimension."""
    code, shape, position = None, [], 0
    while position < len(data):
        start = _HEAD.size + position
        tag, position = _varint(data, position, path)
        if tag not in (0x08, 0x10):
            raise CheckpointError(f"{path}: byte {start}: unknown descriptor tag {tag}; 8 (type) and 16 (dimension) are known")
        value, position = _varint(data, position, path)
        if tag == 0x08:
            if code is not None:
                raise CheckpointError(f"{path}: byte {start}: a second data type")
            if value not in _DTYPES:
                known = ", ".join(f"{k}={np.dtype(v).name}" for k, v in _DTYPES.items() if k != _BFLOAT16)
                raise CheckpointError(f"{path}: byte {start}: data type {value} is not readable (known: {known}, 22=bfloat16)")
            code = value
        else:
            value -= (value >= 1 << 63) << 64  # int64 in two's complement
            if value < 0:
                raise CheckpointError(f"{path}: byte {start}: negative dimension {value}")
            if len(shape) == _MAX_DIMENSIONS:
                raise CheckpointError(f"{path}: byte {start}: more than {_MAX_DIMENSIONS} dimensions")
            shape.append(value)
    if code is None:
        raise CheckpointError(f"{path}: byte {_HEAD.size}: the descriptor ({len(data)} bytes) gives no data type")
    return code, tuple(shape)


def _varint(data, position, path):
    value = 0
    for index in range(10):
        if position + index >= len(data):
            raise CheckpointError(f"{path}: byte {_HEAD.size + len(data)}: the descriptor ends inside a number")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & (1 << 64) - 1, position + index + 1
    raise CheckpointError(f"{path}: byte {_HEAD.size + position}: a number longer than 10 bytes")


def _encode(name, array):
    """The bytes before the data, and the array as contiguous little-endian memory."""
    array = np.asarray(array)
    little = array.dtype.newbyteorder("<")
    if little not in _CODES:
        raise CheckpointError(f"{name}: arrays of type {array.dtype} have no code in the authors' format "
                              f"(known: {', '.join(sorted(d.name for d in _CODES))})")
    if array.ndim > _MAX_DIMENSIONS:
        raise CheckpointError(f"{name}: {array.ndim} dimensions; the format has at most {_MAX_DIMENSIONS}")
    descriptor = bytearray([0x08, _CODES[little]])
    for dimension in array.shape:
        descriptor.append(0x10)
        while dimension >= 0x80:
            descriptor.append(dimension & 0x7F | 0x80)
            dimension >>= 7
        descriptor.append(dimension)
    shape = array.shape  # ascontiguousarray makes a scalar one-dimensional
    return _HEAD.pack(0, 0, 0, len(descriptor)) + bytes(descriptor), np.ascontiguousarray(array, little).reshape(shape)


# ---- a directory of variables ----


def list_variables(directory):
    """Sorted names of the variable files in a directory; hidden files, sub-directories and config.json are not variables."""
    if not os.path.isdir(directory):
        problem = "is a file; the authors' checkpoints are directories" if os.path.exists(directory) else "does not exist"
        raise CheckpointError(f"{directory} {problem}. Give the directory with one file per variable.")
    try:
        names = [entry.name for entry in os.scandir(directory)
                 if not entry.name.startswith(".") and entry.name != "config.json" and not entry.is_dir()]
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error.strerror}") from error
    if not names:
        raise CheckpointError(f"{directory} holds no variable files. Give the directory with one file per variable "
                              "(after unpacking, the innermost one).")
    return sorted(names)


def read_released(directory, names=None):
    """Read an authors' directory.

    Args:
        directory: path of the directory.
        names: the variables wanted; all of them if None.

    Returns:
        dict from variable name to numpy array, sorted by name.

    Raises:
        CheckpointError: if the directory or a wanted file is missing, or a file is malformed.
    """
    present = list_variables(directory)
    if names is not None:
        absent = sorted(set(names) - set(present))
        if absent:
            raise CheckpointError(f"{directory} has no file for {len(absent)} wanted variables: {', '.join(absent)}")
        present = sorted(set(names))
    return {name: read_variable(os.path.join(directory, name)) for name in present}


def write_released(directory, arrays):
    """Write ``arrays`` (name to numpy array) as an authors' directory, all of it or nothing.

    Args:
        directory: path to create; it must not exist or be an empty directory.
        arrays: dict of numpy arrays; the names become file names.

    Raises:
        CheckpointError: for a name that cannot be a file name, a type without a code, or a target in use.
    """
    if not arrays:
        raise CheckpointError(f"nothing to write to {directory}: no variables were given")
    for name, array in arrays.items():
        check_variable_name(name)
        _encode(name, array)
    with new_directory(directory) as temporary:
        for name, array in arrays.items():
            write_variable(os.path.join(temporary, name), array)


def check_variable_name(name):
    """Raise CheckpointError unless ``name`` can be a file of its own inside a directory (no separators, not hidden)."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name or name == "config.json":
        raise CheckpointError(f"variable name {name!r} cannot be a file name in the authors' format")
    if len(os.fsencode(name)) > 200:
        raise CheckpointError(f"variable name {name[:60]!r}... is too long for a file name")


@contextmanager
def new_directory(target):
    """Fill a temporary directory beside ``target``, which takes that name when the block ends without an error.

    An existing empty directory is replaced; anything else at ``target`` is refused before the block runs.
    """
    target = os.path.abspath(target)
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target)):
        raise CheckpointError(f"{target} exists already and is not an empty directory; nothing is overwritten. "
                              "Choose another path or move it away.")
    parent, name = os.path.split(target)
    temporary = os.path.join(parent, f".{name[:200]}.tmp-{os.getpid()}-{next(_temporary_number)}")
    try:
        os.makedirs(parent, exist_ok=True)
        os.mkdir(temporary)
        yield temporary
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- models ----


def load_released(model: "Layer", directory: PathLike, allow_missing: Sequence[str] = ()) -> LoadReport:
    """Load an authors' directory into a model whose parameters carry the authors' variable names.

    Args:
        model: a ``paddle.nn.Layer``.
        directory: path of the directory.
        allow_missing: name patterns (``fnmatch``, for example ``"grounded.mask_g_*"``) of parameters that may be
            missing or mis-shaped; they keep their values and are reported.

    Returns:
        LoadReport.

    Raises:
        CheckpointError: with the list of all missing and mis-shaped parameters, or for a damaged file. The model is
            changed only after everything has been read.
    """
    headers = {name: read_header(os.path.join(directory, name)) for name in list_variables(directory)}
    stored = {name: (h.shape, np.dtype("float32") if h.code == _BFLOAT16 else h.dtype) for name, h in headers.items()}
    report = match_parameters(model, stored, directory, allow_missing)
    assign_parameters(model, read_released(directory, report.loaded))
    return report


def save_released(model: "Layer", directory: PathLike) -> None:
    """Write a model's parameters as an authors' directory, under their ``Parameter.name``."""
    write_released(directory, parameter_arrays(model))


def parameter_arrays(model):
    """dict from parameter name to numpy array of a model, sorted by name; bfloat16, which numpy lacks, becomes float32."""
    return {p.name: (p.astype("float32") if _is_bfloat16(p) else p).numpy() for p in sorted(model.parameters(), key=lambda p: p.name)}


def match_parameters(model, stored: Dict[str, tuple], source, allow_missing=()):
    """Compare a model's parameters with the stored ``name -> (shape, dtype)``; returns or raises as ``load_released``."""
    if isinstance(allow_missing, str):
        allow_missing = (allow_missing,)
    report, wrong = LoadReport(), []
    names = set()
    for parameter in sorted(model.parameters(), key=lambda p: p.name):
        name, shape, dtype = parameter.name, tuple(parameter.shape), _numpy_dtype(parameter)
        names.add(name)
        if name not in stored:
            report.missing.append(name)
            problem = f"{name}: missing, the model has {list(shape)}"
        elif tuple(stored[name][0]) != shape or stored[name][1].kind != dtype.kind:
            found_shape, found_dtype = stored[name]
            kinds_differ = found_dtype.kind != dtype.kind
            mismatch = Mismatch(name, f"{list(shape)}" + f" {dtype.name}" * kinds_differ,
                                f"{list(found_shape)}" + f" {found_dtype.name}" * kinds_differ)
            report.mismatched.append(mismatch)
            problem = str(mismatch)
        else:
            report.loaded.append(name)
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_missing):
            wrong.append(problem)
    report.unexpected = sorted(set(stored) - names)
    if wrong:
        listing = "\n".join(f"  {line}" for line in wrong)
        raise CheckpointError(f"{source} does not fit the model: {len(wrong)} of {len(names)} parameters are missing or "
                              f"mis-shaped\n{listing}\nUse the config the checkpoint was made with, or allow these names "
                              "with allow_missing (they then keep their initial values).")
    return report


def assign_parameters(model, arrays):
    """Set the parameters named in ``arrays``, cast to the parameter's own precision."""
    for parameter in model.parameters():
        if parameter.name in arrays:
            value = np.ascontiguousarray(arrays[parameter.name], _numpy_dtype(parameter))
            if _is_bfloat16(parameter):
                import paddle

                value = paddle.to_tensor(value).astype("bfloat16")
            parameter.set_value(value)


def _numpy_dtype(parameter):
    return np.dtype("float32" if _is_bfloat16(parameter) else str(parameter.dtype).rsplit(".", 1)[-1])


def _is_bfloat16(parameter):
    return str(parameter.dtype).endswith("bfloat16")
