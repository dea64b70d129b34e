"""Region files of any format into a store (``data/region_store.py``): resumable per input file, complete or not there.

Width and height: detectors and the authors' own two readers disagree about which of the two columns comes first. A picture whose boxes
fit in one order only is read in that order; the other pictures of a file follow the order that more of its pictures need, and
the stated one when none needs either. Pictures whose boxes fit in neither order are bad records.
"""
import contextlib
import fcntl
import io
import json
import logging
import os
import shutil

import numpy as np

from unimo2_paddle.data.formats.bottom_up import BOTTOM_UP, read_names
from unimo2_paddle.data.formats.regions import read_regions, size_order
from unimo2_paddle.data.formats.unimo_records import CAPTIONING, ENTAILMENT, RETRIEVAL
from unimo2_paddle.data.pretrain_batches import BadRecords
from unimo2_paddle.data.region_command import DTYPES
from unimo2_paddle.data.region_store import HEADER_BYTES, LABELS, MANIFEST, STORE_VERSION, TEXTS, key_hash
from unimo2_paddle.errors import DataError, UserInputError

logger = logging.getLogger(__name__)

FORMATS = {"bottom_up": BOTTOM_UP, "captioning": CAPTIONING, "entailment": ENTAILMENT, "retrieval": RETRIEVAL}
_PROGRESS, _BAD_RECORDS = "progress.json", "bad_records.jsonl"
_STORED = {"boxes": "<f4", "object_ids": "<i4", "object_confidence": "<f4", "attribute_ids": "<i4", "attribute_confidence": "<f4",
           "object_probs": "<f2", "attribute_probs": "<f2", "pictures": "<i8", "key_ends": "<i8", "hashes": "<u8", "order": "<i8"}


def import_regions(paths, out, layout, dtype="float16", objects=True, probabilities=False, object_names=None, attribute_names=None,
                   max_bad_ratio=0.01, show_progress=True):
    """Writes a store; a finished one of the same arguments is kept, an interrupted import goes on with the next file.

    Args:
        paths: region files, plain or ``.gz``; out: directory to write; layout: a key of ``FORMATS``; dtype: of the stored features.
        objects: also store what the detector calls the regions; probabilities: and the probabilities of all its classes (float16).
        object_names, attribute_names: paths of the detector's vocabularies, or None.
        max_bad_ratio: share of unusable lines above which the import stops; they are listed in ``bad_records.jsonl``.

    Returns:
        the manifest.

    Raises:
        UserInputError: wrong arguments, or ``out`` holds something else. DataError: unusable input.
    """
    wanted = {"version": STORE_VERSION, "format": layout, "dtype": dtype, "objects": objects, "probabilities": objects and probabilities,
              "object_names": object_names and read_names(object_names), "attribute_names": attribute_names and read_names(attribute_names),
              "inputs": [_identity(path) for path in paths]}
    if layout not in FORMATS or dtype not in DTYPES or not 0 <= max_bad_ratio <= 1:
        raise UserInputError(f"format {layout!r} (of {', '.join(FORMATS)}), dtype {dtype!r} (of {', '.join(DTYPES)}) or max_bad_ratio "
                             f"{max_bad_ratio} (0 to 1) is wrong")
    doubled = sorted({path for path in paths if paths.count(path) > 1})
    if doubled or not paths:
        raise UserInputError(f"{doubled[0]}: named twice" if doubled else "no input file is named")
    out = os.path.abspath(out)
    finished = _finished(out, wanted)
    if finished:
        return finished
    unfinished = out + ".unfinished"
    try:
        with _locked(unfinished):
            _import(unfinished, wanted, paths, max_bad_ratio, show_progress)
            os.rename(unfinished, out)
    except OSError as error:
        raise DataError(f"{out}: cannot write the store: {error.strerror or error}") from None
    return _finished(out, wanted)


def _identity(path):
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read the region features: {error.strerror}") from None
    if os.path.isdir(path):
        raise DataError(f"{path}: a directory stands where a file of region features is expected; name its files")
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _finished(out, wanted):
    """The manifest of the same store at ``out``, None when nothing is there."""
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return None
    remedy = "remove it or choose another --out"
    try:
        with open(os.path.join(out, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        found = {key: manifest[key] for key in wanted}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserInputError(f"{out}: exists and is not a store of region features; {remedy}") from None
    other = [key for key in wanted if found[key] != wanted[key]]
    if other:
        raise UserInputError(f"{out}: holds a store that was made with another value of {', '.join(other)}; {remedy}")
    return manifest


@contextlib.contextmanager
def _locked(directory):
    """Holds the unfinished store for this process alone; the kernel lets go of the lock when the process dies."""
    os.makedirs(directory, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserInputError(f"{directory}: another import is writing this store; wait for it or choose another --out") from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_if_useless(directory, progress):
    """Removes an unfinished store after a failure when it holds no picture to go on from and tells of no bad record."""
    try:
        yield
    except BaseException:
        if not progress["pictures"] and not os.path.exists(os.path.join(directory, _BAD_RECORDS)):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _import(directory, wanted, paths, max_bad_ratio, show_progress):
    from tqdm import tqdm

    progress = _resume(directory, wanted)
    bad_records = BadRecords(os.path.join(directory, _BAD_RECORDS), max_bad_ratio, option="--max-bad-ratio")
    with _removed_if_useless(directory, progress), _Writer(directory, wanted, progress) as writer, \
            tqdm(total=sum(size for _, size, _ in wanted["inputs"]), unit="B", unit_scale=True, desc="region features",
                 disable=None if show_progress else True) as bar:
        for path, identity in zip(paths, wanted["inputs"]):
            before = bar.n
            if not any(part["input"] == identity for part in progress["parts"]):
                part = _import_file(path, writer, bad_records, lambda at, before=before: bar.update(before + at - bar.n))
                progress["parts"].append({"input": identity, **part})
                progress["bad"] += part["bad"]
                writer.commit(progress)
            bar.update(before + identity[1] - bar.n)
        if not progress["pictures"]:
            listed = f"; the reasons are in {bad_records.path}" if progress["bad"] else ""
            raise DataError(f"{', '.join(paths[:3])}: no usable record in {len(paths)} file(s){listed}")
        writer.finish(progress)


def _resume(directory, wanted):
    """The progress of an interrupted import with the same arguments, or that of a new one."""
    path = os.path.join(directory, _PROGRESS)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            progress = json.load(file)
        if progress["wanted"] == wanted:
            return progress
        raise UserInputError(f"{directory}: an interrupted import with other arguments or changed inputs; remove it or choose another --out")
    left = os.listdir(directory)
    foreign = [name for name in left if not name.endswith((".npy", ".tmp")) and name not in ("keys.bin", TEXTS, _BAD_RECORDS)]
    if foreign:
        raise UserInputError(f"{directory}: is in the way of the unfinished store (it holds {foreign[0]}); remove it or choose another --out")
    for name in left:
        os.remove(os.path.join(directory, name))
    return {"wanted": wanted, "parts": [], "bad": 0, "pictures": 0, "feature_size": 0, "texts": 0, "columns": {}, "bytes": {}}


def _import_file(path, writer, bad_records, position):
    """Appends one file's records; returns what happened."""
    told = {"records": 0, "repeated": 0, "bad": 0, "swapped": 0, "order": "stated"}
    orders = []

    def bad(place, error):
        told["bad"] += 1
        bad_records.saw()
        bad_records.note(path, place.rpartition(":")[2], error)

    layout, wanted = FORMATS[writer.wanted["format"]], writer.wanted
    for place, record in read_regions(path, layout, wanted["objects"], bad, position):
        order = size_order(record)
        try:
            if order is None:
                raise DataError(f"{place}: boxes of image {record.image_id} reach {record.boxes[:, 2:].max(axis=0).tolist()}, outside a picture of "
                                f"{record.width} x {record.height} in either order")
            repeated = writer.append(record, place)
        except DataError as error:
            bad(place, error)
            continue
        bad_records.saw()
        told["records"] += 1
        told["repeated"] += repeated
        if not repeated:
            orders.append(order)
    stated, swapped = orders.count("stated"), orders.count("swapped")
    if swapped:
        told["order"] = "swapped" if swapped > stated else "stated"
        writer.swap_sizes([order == "swapped" or (order == "either" and swapped > stated) for order in orders])
        told["swapped"] = swapped if swapped <= stated else len(orders) - stated
        logger.warning("%s: the boxes of %d of %d pictures fit only with width and height exchanged, those of %d only as stated; %d pictures are "
                       "read with the two exchanged", path, swapped, len(orders), stated, told["swapped"])
    return told


class _Writer:
    """Appends records to the arrays of an unfinished store; what was not committed is cut off when it is opened again."""

    def __init__(self, directory, wanted, progress):
        self.directory, self.wanted = directory, wanted
        self.feature_size, self.columns = progress["feature_size"], {name: tuple(value) for name, value in progress["columns"].items()}
        self._files, self._committed = {}, dict(progress["bytes"])
        self._regions, self._key_bytes = progress.get("regions", 0), progress["bytes"].get("keys.bin", 0)
        self._texts = progress["texts"]
        self._rows, self._keys = [], []
        self._known = {}

    def __enter__(self):
        for name in set(os.listdir(self.directory)) - set(self._committed) - {_PROGRESS, _BAD_RECORDS}:
            os.remove(os.path.join(self.directory, name))
        for name in self._committed:
            self._file(name)
        self._remember_known()
        return self

    def __exit__(self, *_):
        for file in self._files.values():
            file.close()

    def _file(self, name):
        if name not in self._files:
            path = os.path.join(self.directory, name)
            self._files[name] = file = open(path, "r+b" if os.path.exists(path) else "w+b")
            if name in self._committed:
                file.truncate(self._committed[name])
            elif name.endswith(".npy"):
                file.write(bytes(HEADER_BYTES))
            file.seek(0, io.SEEK_END)
        return self._files[name]

    def _remember_known(self):
        """Number of regions and a digest of the boxes by picture are not kept over an interruption: read back what tells repeats."""
        if not self._committed:
            return
        pictures = np.fromfile(os.path.join(self.directory, "pictures.npy"), "<i8", offset=HEADER_BYTES).reshape(-1, 4)
        ends = np.fromfile(os.path.join(self.directory, "key_ends.npy"), "<i8", offset=HEADER_BYTES)
        with open(os.path.join(self.directory, "keys.bin"), "rb") as file:
            names = file.read()
        for row, start, end in zip(pictures, np.concatenate([[0], ends[:-1]]), ends):
            self._known[names[start:end]] = int(row[0]), int(row[1])

    def append(self, record, place):
        """Adds a record's text, and its picture unless the store has it.

        Returns:
            whether the picture was there already.

        Raises:
            DataError: the record does not go with what is stored.
        """
        key = record.image_id.encode("utf-8")
        if key in self._known:
            if not self._same_boxes(key, record):
                raise DataError(f"{place}: image {record.image_id} was stored already, with other boxes")
            self._write_text(record, place)
            return True
        arrays = self._arrays(record, place)
        for name, values in arrays.items():
            self._file(name + ".npy").write(values.tobytes())
        self._known[key] = self._regions, len(record.boxes)
        self._rows.append([self._regions, len(record.boxes), record.width, record.height])
        self._keys.append(key)
        self._regions += len(record.boxes)
        self._write_text(record, place)
        return False

    def _same_boxes(self, key, record):
        first, count = self._known[key]
        if count != len(record.boxes):
            return False
        file = self._file("boxes.npy")
        file.flush()
        return os.pread(file.fileno(), count * 16, HEADER_BYTES + first * 16) == record.boxes.astype("<f4").tobytes()

    def _arrays(self, record, place):
        """The record's values as they are stored, checked against the store's columns."""
        width = record.features.shape[1]
        if self.feature_size and width != self.feature_size:
            raise DataError(f"{place}: features are {width} wide where the store has {self.feature_size}; detectors cannot be mixed")
        with np.errstate(over="ignore"):
            features = record.features.astype("<f2" if self.wanted["dtype"] == "float16" else "<f4")
        if not np.isfinite(features).all():
            raise DataError(f"{place}: features up to {np.abs(record.features).max():g} do not fit float16; import with --dtype float32")
        found = {"features": features, "boxes": record.boxes.astype("<f4")}
        for name in LABELS if self.wanted["objects"] else ():
            values = getattr(record, name)
            if values is not None and (not name.endswith("_probs") or self.wanted["probabilities"]):
                found[name] = np.ascontiguousarray(values, _STORED[name])
        for kind in ("object", "attribute"):
            names, ids = self.wanted[f"{kind}_names"], found.get(f"{kind}_ids")
            if ids is not None and (ids.min() < 0 or (names and ids.max() >= len(names))):
                raise DataError(f"{place}: {kind} ids run from {ids.min()} to {ids.max()}" + (f"; there are {len(names)} names" if names else ""))
        columns = {name: values.shape[1:] for name, values in found.items()}
        if not self.columns:
            self.columns, self.feature_size = columns, width
        if columns != self.columns:
            raise DataError(f"{place}: has {_told(columns)} where the store has {_told(self.columns)}; import with --no-objects, or apart")
        return found

    def _write_text(self, record, place):
        if record.text is not None:
            row = {"image_id": record.image_id, "source": os.path.basename(place.rpartition(":")[0]), **vars(record.text)}
            self._file(TEXTS).write((json.dumps(row) + "\n").encode())
            self._texts += 1

    def swap_sizes(self, wrong):
        """Exchanges width and height of the pictures of this file where ``wrong`` says so."""
        for row, exchange in zip(self._rows, wrong):
            if exchange:
                row[2:] = row[3], row[2]

    def commit(self, progress):
        """Makes everything appended so far survive an interruption."""
        self._file("keys.bin").write(b"".join(self._keys))
        ends = self._key_bytes + np.cumsum([len(key) for key in self._keys], dtype="<i8")
        self._file("key_ends.npy").write(ends.tobytes())
        self._file("pictures.npy").write(np.array(self._rows, "<i8").tobytes())
        self._key_bytes = int(ends[-1]) if len(ends) else self._key_bytes
        progress["pictures"] += len(self._rows)
        self._rows, self._keys = [], []
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            progress["bytes"][name] = file.tell()
        progress.update(regions=self._regions, texts=self._texts, feature_size=self.feature_size, columns=self.columns)
        _write_json(os.path.join(self.directory, _PROGRESS), progress)

    def finish(self, progress):
        """Writes hashes, array headers and, last, the manifest."""
        keys = sorted((int(key_hash(key.decode("utf-8"))), number) for number, key in enumerate(self._known))
        hashes, order = np.array(keys, dtype=np.uint64).T
        for name, values in (("hashes", hashes), ("order", order)):
            file = self._file(name + ".npy")
            file.truncate(HEADER_BYTES)
            file.seek(HEADER_BYTES)
            file.write(values.astype(_STORED[name]).tobytes())
        shapes = {name: (self._regions, *tail) for name, tail in self.columns.items()}
        shapes.update(pictures=(progress["pictures"], 4), **{name: (progress["pictures"],) for name in ("key_ends", "hashes", "order")})
        arrays = {}
        for name, shape in shapes.items():
            dtype = {"float16": "<f2", "float32": "<f4"}[self.wanted["dtype"]] if name == "features" else _STORED[name]
            arrays[name] = [dtype, list(shape)]
            self._files[name + ".npy"].seek(0)
            self._files[name + ".npy"].write(_npy_header(dtype, shape))
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = os.fstat(file.fileno()).st_size
        counts = pictures_summary(self.directory, progress["pictures"])
        manifest = {**self.wanted, "pictures": progress["pictures"], "regions": self._regions, "texts": self._texts,
                    "feature_size": self.feature_size, "regions_per_picture": counts, "bad_records": progress["bad"],
                    "parts": progress["parts"], "arrays": arrays, "files": sizes}
        _write_json(os.path.join(self.directory, MANIFEST), manifest)
        os.remove(os.path.join(self.directory, _PROGRESS))


def pictures_summary(directory, pictures):
    """Least, mean and most regions per picture."""
    counts = np.fromfile(os.path.join(directory, "pictures.npy"), "<i8", offset=HEADER_BYTES).reshape(pictures, 4)[:, 1]
    return {"least": int(counts.min()), "mean": round(float(counts.mean()), 2), "most": int(counts.max())}


def _npy_header(dtype, shape):
    """The header of a ``.npy`` file, filled up to ``HEADER_BYTES`` so that it can be written after the data."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": tuple(int(n) for n in shape)})
    text = text.ljust(HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode("ascii")


def _told(columns):
    return ", ".join(f"{name} {' x '.join(map(str, tail)) or '1'}" for name, tail in sorted(columns.items()) if name not in ("features", "boxes")) \
        or "no object columns"


def _write_json(path, content):
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
