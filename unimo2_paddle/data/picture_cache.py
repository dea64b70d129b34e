"""Decoded pictures that are kept: in the memory of a process, or in one file that all processes of a machine read."""
import hashlib
import logging
import os
import zlib

import numpy as np

logger = logging.getLogger(__name__)
CHECKSUM = 4  # bytes


class MemoryPictures:
    """The first pictures that fit into ``limit`` bytes."""

    def __init__(self, limit):
        self.left, self.pictures = limit, {}

    def get(self, number):
        """The picture, or ``None`` when it is not kept."""
        return self.pictures.get(number)

    def put(self, number, picture):
        """Keep a picture uint8 ``[S, S, 3]`` while there is room."""
        if picture.nbytes <= self.left:
            self.pictures[number] = picture
            self.left -= picture.nbytes


class PictureFile:
    """All pictures of a data set in a file under ``directory``, each written by whoever decodes it first.

    Reading goes through the system's page cache: ranks and their workers share it, and the system takes it back when memory is short. Every picture
    has a checksum, so one that was not written whole counts as missing, and writers need not know of each other. The file's name carries what the
    pictures depend on: paths, sizes and times of the files, the edge, the EXIF switch. A full disk ends the writing, not the run.
    """

    def __init__(self, directory, paths, size, exif):
        os.makedirs(directory, exist_ok=True)
        digest = hashlib.sha256(repr((size, exif)).encode())
        for path in paths:
            about = os.stat(path) if os.path.exists(path) else None
            digest.update(repr((path, about and (about.st_size, about.st_mtime_ns))).encode("utf-8", "surrogateescape"))
        self.path = os.path.join(directory, f"pictures-{size}-{digest.hexdigest()[:16]}.u8")
        self.shape, self.bytes, self.first = (size, size, 3), size * size * 3, CHECKSUM * len(paths)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.file, self.first + self.bytes * len(paths))  # sparse: takes room on the disk as it fills
        self.writing = True

    def get(self, number):
        """The picture uint8 ``[S, S, 3]``, or ``None`` when nobody has decoded it yet."""
        stored = os.pread(self.file, CHECKSUM, CHECKSUM * number)
        if not any(stored):
            return None
        data = os.pread(self.file, self.bytes, self.first + self.bytes * number)
        return np.frombuffer(data, np.uint8).reshape(self.shape) if _checksum(data) == stored else None

    def put(self, number, picture):
        """Store a picture."""
        if not self.writing:
            return
        data = np.ascontiguousarray(picture).tobytes()
        try:
            os.pwrite(self.file, data, self.first + self.bytes * number)
            os.pwrite(self.file, _checksum(data), CHECKSUM * number)
        except OSError as error:
            self.writing = False
            logger.warning("%s: %s; the pictures that are not in it are decoded every time", self.path, error.strerror)

    def __del__(self):
        if hasattr(self, "file"):
            os.close(self.file)


def _checksum(data):
    return (zlib.crc32(data) or 1).to_bytes(CHECKSUM, "little")  # 0 stands for a picture that is not there
