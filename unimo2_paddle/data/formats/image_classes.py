"""Pictures with one class each: class folders, PaddleClas list files, and files of class names."""
import os
import re
import zlib
from dataclasses import dataclass
from typing import List

import numpy as np

from unimo2_paddle.data.formats.pictures import picture_path, require_pictures
from unimo2_paddle.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_CHECKED = 200  # pictures of a list file looked up at once: enough to notice a wrong folder, cheap for a million on a network disk


@dataclass
class ClassedImages:
    """The pictures of one split: ``paths`` and their ``labels`` (int64 ``[N]``, numbers of classes)."""

    paths: List[str]
    labels: np.ndarray

    def __len__(self):
        return len(self.paths)

    def part(self, keep):
        """The pictures where the bool array ``keep`` ``[N]`` is true."""
        return ClassedImages([path for path, kept in zip(self.paths, keep) if kept], self.labels[keep])


def list_classes(directory):
    """Names of the class folders in ``directory``, sorted: the place in this list is the label, as in every tool of the field.

    Raises:
        DataError: no such directory, or no folder in it.
    """
    if not os.path.isdir(directory):
        raise DataError(f"{directory}: no such directory; class folders are expected in it, as in {directory}/CLASS/picture.jpg")
    with os.scandir(directory) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{directory}: has no class folders; expected is {directory}/CLASS/picture.jpg")
    return classes


def read_class_folders(directory, classes):
    """Reads ``directory/CLASS/**/picture`` in sorted order; files that are not pictures by their suffix are passed over.

    Args:
        directory: folder of one split; classes: class folder names in label order (it may lack some, for example in a small test set).

    Raises:
        DataError: a folder is not one of the classes, or a class folder holds no picture.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    paths, labels = [], []
    for name in list_classes(directory):
        if name not in label_of:
            raise DataError(f"{directory}/{name}: is not one of the {len(classes)} classes ({', '.join(classes[:3])}, ...); remove the folder, "
                            "or train with it")
        found = []
        for place, folders, files in os.walk(os.path.join(directory, name)):
            folders.sort()
            found += [os.path.join(place, file) for file in sorted(files) if file.lower().endswith(SUFFIXES) and not file.startswith(".")]
        if not found:
            raise DataError(f"{directory}/{name}: holds no picture ({', '.join(SUFFIXES)}); fill or remove the folder")
        paths += found
        labels += [label_of[name]] * len(found)
    return ClassedImages(paths, np.array(labels, dtype=np.int64))


def read_list_file(path, images, classes=0):
    """Reads a PaddleClas list file: one ``relative/path label`` per line, the label a number from 0.

    Args:
        path: the list file (train_list.txt, val_list.txt ...); images: folder the paths are relative to.
        classes: how many classes there are; 0 = not known yet.

    Raises:
        DataError: the file is missing, empty or malformed (with the line number), or pictures are missing.
    """
    paths, labels = [], []
    for number, line in _lines(path):
        name, _, label = line.rpartition(" ")
        where = f"{path}:{number}"
        if not name.strip() or not re.fullmatch(r"\d{1,9}", label):
            raise DataError(f"{where}: {line[:80]!r} is not 'path label' with a label number, for example 'train/n01440764/a.JPEG 0'")
        if classes and int(label) >= classes:
            raise DataError(f"{where}: label {label}, but there are {classes} classes (0 to {classes - 1})")
        paths.append(picture_path(images, name.strip(), where))
        labels.append(int(label))
    if not paths:
        raise DataError(f"{path}: lists no picture")
    some = sorted({round(i) for i in np.linspace(0, len(paths) - 1, _CHECKED)})
    require_pictures(images, [paths[i] for i in some], path)
    return ClassedImages(paths, np.array(labels, dtype=np.int64))


def read_class_names(path, classes):
    """Names to call the classes by, in label order; of several ("tench, Tinca tinca") the first.

    Three forms are understood: ``FOLDER name`` (LOC_synset_mapping.txt), ``LABEL name`` (PaddleClas' label lists), and one name per
    line in label order, where a WordNet id before the name is left out.

    Args:
        path: the file; classes: class folder names, or numbers as text, in label order.

    Raises:
        DataError: the file is missing or malformed, or does not have exactly one name per class.
    """
    rows = [(number, *line.partition(" ")[::2]) for number, line in _lines(path)]
    firsts = [first for _, first, _ in rows]
    numbers = [str(label) for label in range(len(classes))]
    named = all(rest.strip() for _, _, rest in rows)
    if len(set(firsts)) != len(firsts) and (set(firsts) <= set(classes) or set(firsts) <= set(numbers)):
        twice = next(row for place, row in enumerate(rows) if row[1] in firsts[:place])
        raise DataError(f"{path}:{twice[0]}: class {twice[1]!r} is named twice")
    for keys in (list(classes), numbers):
        if named and set(keys) <= set(firsts):
            name_of = {first: rest for _, first, rest in rows}
            names = [name_of[key] for key in keys]
            break
    else:
        wordnet = named and all(re.fullmatch(r"n\d{8}", first) for first in firsts)  # of pictures in list files, whose classes are numbers
        names = [rest if wordnet else f"{first} {rest}" for _, first, rest in rows]
        if len(names) != len(classes):
            raise DataError(f"{path}: has {len(names)} names for {len(classes)} classes; give one line per class, in label order or "
                            f"starting with the class folder ('{classes[0]} its name')")
    names = [name.partition(",")[0].strip() for name in names]
    empty = [label for label, name in enumerate(names) if not name]
    if empty:
        raise DataError(f"{path}: class {empty[0]} ({classes[empty[0]]}) has no name")
    return names


def names_of_folders(classes):
    """Names made of folder names where no file gives better ones: ``red_circle`` is called "red circle"."""
    return [re.sub(r"[_\s]+", " ", name).strip() for name in classes]


def held_out(paths, root, share):
    """Which pictures a training split gives away as a development split: bool ``[N]``, a function of each path below ``root`` alone."""
    keys = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    return np.array([zlib.crc32(key.encode("utf-8", "surrogateescape")) < share * 2 ** 32 for key in keys], dtype=bool)


def _lines(path):
    """(line number, text) of the lines that are not blank."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, " ".join(line.split()) if "\t" in line else line.strip()
    except OSError as error:
        raise DataError(f"{path}: cannot read the file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8") from None
