"""Columns of text on disk: strings end to end as UTF-8 with their ends, memory-mapped."""
import os

import numpy as np

from unimo2_paddle.errors import DataError


class TextColumn:
    """Strings by number.

    Args:
        data: uint8 [bytes]; ends: int64 [N], where each string ends.
    """

    def __init__(self, data, ends):
        self.data, self.ends = data, ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, row):
        start = int(self.ends[row - 1]) if row else 0
        return self.data[start:int(self.ends[row])].tobytes().decode("utf-8")

    @staticmethod
    def arrays(strings):
        """(data, ends) of strings; what UTF-8 cannot hold is escaped."""
        encoded = [string.encode("utf-8", "backslashreplace") for string in strings]
        return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(entry) for entry in encoded], dtype=np.int64)


class TextColumnWriter:
    """Writes a column block by block: bytes straight to a file, ends (8 bytes a string) in memory."""

    def __init__(self, directory, name):
        self._path, self._ends = os.path.join(directory, name), [np.zeros(0, np.int64)]
        self._file, self._size = open(self._path + ".bytes", "wb"), 0

    def add(self, data, ends):
        self._file.write(np.ascontiguousarray(data).tobytes())
        self._ends.append(np.asarray(ends, np.int64) + self._size)
        self._size += len(data)

    def close(self):
        self._file.close()
        np.save(self._path + ".ends.npy", np.concatenate(self._ends))


def open_column(directory, name):
    """The column that a writer left.

    Raises:
        DataError: it is missing or damaged.
    """
    path = os.path.join(directory, name)
    try:
        ends = open_array(directory, name + ".ends.npy")
        size = os.path.getsize(path + ".bytes")
        data = np.asarray(np.memmap(path + ".bytes", np.uint8, "r")) if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path}.bytes: cannot be read: {error.strerror or error}; build this index again") from None
    if size != (int(ends[-1]) if len(ends) else 0):
        raise DataError(f"{path}.bytes: has {size} bytes where its ends say {int(ends[-1]) if len(ends) else 0}; build this index again")
    return TextColumn(data, ends)


def open_array(directory, name):
    """A stored array, memory-mapped.

    Raises:
        DataError: it is missing or damaged.
    """
    path = os.path.join(directory, name)
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # still mapped, without memmap's costly slices
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'damaged'}); build this index again") from None
