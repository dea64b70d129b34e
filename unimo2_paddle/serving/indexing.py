"""Filling an index from a folder of pictures or a file of sentences, and bringing it up to date: only what is new or changed is encoded."""
import os
from dataclasses import asdict, dataclass, field
from typing import Dict, List

import numpy as np

from unimo2_paddle.errors import DataError, ImageError, UserInputError
from unimo2_paddle.serving.codes import WordTable, code_pictures, code_texts, grounded_model, text_batch, word_spans, words_best
from unimo2_paddle.serving.index import ABOUT, THUMBNAILS, RetrievalIndex, encode_texts, may_hold_index, require_retrieval
from unimo2_paddle.serving.predictor import read_picture
from unimo2_paddle.tasks.reporting import jpeg_bytes

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SAVE_EVERY = 4096  # new items between two saves: an interrupted run loses no more


@dataclass
class Changes:
    """What an update did: numbers of items, and of every skipped picture its name and the reason."""

    items: int = 0
    new: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    skipped: List[Dict] = field(default_factory=list)

    def to_json(self):
        """Plain Python; ``skipped`` as a number."""
        return {**asdict(self), "skipped": len(self.skipped)}


@dataclass
class IndexOptions:
    """``codes``: also store every item's codes, for ``unimo2 explain``; ``thumbnails``: edge of stored thumbnails in pixels, 0: none."""

    codes: bool = False
    thumbnails: int = 0
    batch_size: int = 32

    def __post_init__(self):
        if self.batch_size < 1 or self.thumbnails < 0:
            raise UserInputError("--batch-size must be at least 1, --thumbnails at least 0")


def picture_files(folder, without=None):
    """Names of the picture files below a folder, relative to it, in order; ``without``: a directory that is passed over.

    Raises:
        DataError: there is none.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if os.path.abspath(os.path.join(place, name)) != without]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names if name.lower().endswith(PICTURE_ENDINGS)]
    if not found:
        raise DataError(f"{folder}: no picture in this folder ({', '.join(PICTURE_ENDINGS)})")
    return sorted(found)


def collect_items(source):
    """(kind, items) of a source: a folder of pictures (searched through, in order of their names), or a text file of one sentence a line.

    Raises:
        DataError: there is nothing usable.
    """
    if os.path.isdir(source):
        return "images", [os.path.join(source, name) for name in picture_files(source)]
    try:
        with open(source, encoding="utf-8") as file:
            sentences = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: neither a folder of pictures nor a text file ({getattr(error, 'strerror', None) or 'not UTF-8'})") from None
    if not sentences:
        raise DataError(f"{source}: no sentence in this file")
    return "texts", sentences


def update_index(predictor, source, directory, options=None, rebuild=False, show_progress=False):
    """Make the index of a source, or bring it up to date.

    A picture is encoded again when its size or time of change differs from what the index remembers, a sentence when it is not in the index.
    Unreadable pictures are skipped, and tried again only when they have changed.

    Args:
        predictor: ``Predictor`` of a retrieval or pre-trained model; source: folder of pictures, or text file of one sentence a line.
        directory: of the index; options: ``IndexOptions``; rebuild: encode everything again.

    Returns:
        (``RetrievalIndex``, ``Changes``).

    Raises:
        UserInputError: the model does not retrieve, or the directory holds something else or an index of another source or model.
        DataError: the source has nothing that can be read.
    """
    require_retrieval(predictor)
    options, directory = options or IndexOptions(), os.path.abspath(directory)
    if os.path.lexists(directory) and not may_hold_index(directory):
        raise UserInputError(f"{directory} exists and is no index; choose another --out")
    if os.path.isdir(source):
        update = _PictureUpdate(predictor, source, directory, options)
    else:
        update = _TextUpdate(predictor, source, directory, options)
    if os.path.isfile(os.path.join(directory, ABOUT)) and not rebuild:
        update.take_over(RetrievalIndex.load(directory))
    return update.run(show_progress)


class _Update:
    """Common part: which items are known, and the rows of those that are."""

    kind = ""

    def __init__(self, predictor, root, names, stamps, directory, options):
        self.predictor, self.root, self.directory, self.options = predictor, root, directory, options
        self.stamps = dict(zip(names, stamps))
        self.features, self.codes, self.skipped, self.changes = {}, {}, {}, Changes()
        if options.codes:
            grounded_model(predictor)

    def take_over(self, old):
        """Keep the rows of an index that still hold.

        Raises:
            UserInputError: it is of another source, or of another model.
        """
        if old.kind != self.kind or old.root != self.root:
            raise UserInputError(f"{self.directory} is an index of {old.root} ({old.kind}); choose another --out, or give --rebuild")
        if old.model != self.predictor.kind.fingerprint():
            raise UserInputError(f"{self.directory} was made with the weights of {old.about.get('model_directory', 'another model')}, which are not those of "
                                 f"{self.predictor.directory}; give --rebuild")
        self.options.codes = self.options.codes or "codes" in old.arrays
        self.options.thumbnails = self.options.thumbnails or old.about.get("thumbnails", 0)
        usable = "codes" in old.arrays or not self.options.codes
        remembered = dict(zip(old.items, old.about.get("stamps", [])))
        for place, name in enumerate(old.items):
            if usable and name in self.stamps and remembered.get(name) == self.stamps[name]:
                self.features[name] = old.features[place]
                if self.options.codes:
                    self.codes[name] = old.arrays["codes"][place]
        for entry in old.about.get("skipped", []):
            if self.stamps.get(entry["item"]) == entry["stamp"] and entry["item"] in self.stamps:
                self.skipped[entry["item"]] = entry
        self.changes.unchanged, self.changes.removed = len(self.features), sum(name not in self.stamps for name in old.items)
        self.changes.changed = sum(name in self.stamps and name not in self.features and name not in self.skipped for name in old.items)

    def run(self, show_progress):
        todo = [name for name in self.stamps if name not in self.features and name not in self.skipped]
        with _progress(show_progress, len(todo), self.kind) as bar:
            for number, first in enumerate(range(0, len(todo), self.options.batch_size), 1):
                names = todo[first: first + self.options.batch_size]
                self.encode(names)
                bar.update(len(names))
                if number % max(1, SAVE_EVERY // self.options.batch_size) == 0 and self.features:
                    self.save()
        if not self.features:
            told = next(iter(self.skipped.values()), {"reason": "nothing to read"})["reason"]
            raise DataError(f"{self.root}: none of {len(self.stamps)} items can be read; the first: {told}")
        index = self.save()
        self.changes.items, self.changes.skipped = len(index), list(self.skipped.values())
        self.changes.new = len(todo) - self.changes.changed - sum(name in self.skipped for name in todo)
        return index, self.changes

    def keep(self, names, features, codes):
        for n, name in enumerate(names):
            self.features[name] = features[n]
            if codes is not None:
                self.codes[name] = codes[n].astype(np.float16)

    def save(self):
        names = [name for name in self.stamps if name in self.features]
        arrays = {"codes": np.stack([self.codes[name] for name in names])} if self.options.codes else {}
        about = {"model_directory": os.path.abspath(self.predictor.directory), "stamps": [self.stamps[name] for name in names],
                 "skipped": list(self.skipped.values()), "thumbnails": self.options.thumbnails}
        self.extend(arrays, about)
        index = RetrievalIndex(self.kind, names, np.stack([self.features[name] for name in names]), self.predictor.kind.fingerprint(), self.root,
                               arrays=arrays, about=about)
        index.save(self.directory, replace=True)
        return index

    def extend(self, arrays, about):
        """Add what this kind of index has besides."""


class _PictureUpdate(_Update):
    kind = "images"

    def __init__(self, predictor, source, directory, options):
        root = os.path.abspath(source)
        names = picture_files(root, without=directory)
        super().__init__(predictor, root, names, [_stamp(os.path.join(root, name)) for name in names], directory, options)

    def encode(self, names):
        read, pictures = [], []
        for name in names:
            try:
                picture = read_picture(os.path.join(self.root, name))
            except ImageError as error:
                self.skipped[name] = {"item": name, "reason": str(error), "stamp": self.stamps[name]}
                continue
            read.append(name)
            pictures.append(self.predictor.kind.picture(picture))
            if self.options.thumbnails:
                self._write_thumbnail(name, picture)
        if read:
            pixels = np.stack(pictures)
            features = self.predictor.kind.encode_images(pixels).features.numpy()
            self.keep(read, features, code_pictures(grounded_model(self.predictor), pixels).share() if self.options.codes else None)

    def _write_thumbnail(self, name, picture):
        folder = os.path.join(self.directory, THUMBNAILS)
        os.makedirs(folder, exist_ok=True)
        one = RetrievalIndex(self.kind, [name], None, "", about={"stamps": [self.stamps[name]]})
        path = os.path.join(folder, one.thumbnail_name(0))
        with open(path + ".tmp", "wb") as file:
            file.write(jpeg_bytes(picture, self.options.thumbnails))
        os.replace(path + ".tmp", path)

    def run(self, show_progress):
        index, changes = super().run(show_progress)
        if self.options.thumbnails:
            self._complete_thumbnails(index)
        return index, changes

    def _complete_thumbnails(self, index):
        """Write those of pictures that were indexed without, drop those of pictures that are gone."""
        folder = os.path.join(self.directory, THUMBNAILS)
        present = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        wanted = {index.thumbnail_name(place): place for place in range(len(index))}
        for name in set(wanted) - present:
            self._write_thumbnail(index.items[wanted[name]], read_picture(index.path(wanted[name])))
        for name in present - set(wanted):
            os.remove(os.path.join(folder, name))


class _TextUpdate(_Update):
    kind = "texts"

    def __init__(self, predictor, source, directory, options):
        names = list(dict.fromkeys(collect_items(source)[1]))
        super().__init__(predictor, os.path.abspath(source), names, [None] * len(names), directory, options)
        self.words = WordTable()

    def take_over(self, old):
        super().take_over(old)
        if self.options.codes and (self.changes.removed or len(self.features) < len(self.stamps)):
            self.features, self.codes = {}, {}  # means over all occurrences of a word need all sentences

    def encode(self, names):
        self.keep(names, encode_texts(self.predictor, names).features.numpy(), self._codes(names) if self.options.codes else None)

    def _codes(self, names):
        side = code_texts(grounded_model(self.predictor), text_batch(self.predictor, names))
        for number, name in enumerate(names):
            spans = word_spans(self.predictor, name)[:-1]
            if spans:
                self.words.add([word for word, _, _ in spans], words_best(side.relevance[number], spans))
        return side.share()

    def extend(self, arrays, about):
        if not self.options.codes:
            return
        words, occurrences, means = self.words.arrays()
        if not words:  # nothing was encoded: the table is as it was
            old = RetrievalIndex.load(self.directory)
            words, occurrences, means = old.about["words"], old.about["occurrences"], np.array(old.arrays["word_codes"])
        arrays["word_codes"] = means
        about.update(words=words, occurrences=occurrences)


def _stamp(path):
    """[size, time of change] of a file, or ``None`` where it has gone."""
    try:
        told = os.stat(path)
        return [told.st_size, told.st_mtime_ns]
    except OSError:
        return None


def _progress(show, total, kind):
    from tqdm import tqdm

    return tqdm(total=total, desc=f"index {kind}", unit="item", leave=False, disable=None if show else True)
