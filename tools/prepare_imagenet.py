"""`python tools/prepare_imagenet.py --root DIR --out DIR`: list files for ImageNet-1k as it is distributed, whose val folder is flat.

Where to get it: image-net.org (ILSVRC2012, registration), or Kaggle's "imagenet-object-localization-challenge" (155 GB), which unpacks to

    ROOT/ILSVRC/Data/CLS-LOC/train/WNID/*.JPEG     1,281,167 pictures
    ROOT/ILSVRC/Data/CLS-LOC/val/*.JPEG            50,000 pictures
    ROOT/LOC_synset_mapping.txt                    "n01440764 tench, Tinca tinca"
    ROOT/LOC_val_solution.csv                      "ILSVRC2012_val_00048981,n03995372 85 1 499 272"

Writes OUT/train_list.txt and OUT/val_list.txt (PaddleClas' form). Then: -o data.format=lists -o data.lists=OUT
-o data.images=ROOT/ILSVRC/Data/CLS-LOC -o data.class_names=ROOT/LOC_synset_mapping.txt -o data.num_classes=1000
"""
import argparse
import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.data.formats.image_classes import read_class_folders  # noqa: E402
from unimo2_paddle.errors import DataError, UserInputError  # noqa: E402


def read_synsets(path):
    """WordNet ids in label order (the file is sorted by them)."""
    try:
        with open(path, encoding="utf-8") as file:
            synsets = [line.split()[0] for line in file if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot read the classes: {error.strerror}") from None
    if not synsets or synsets != sorted(set(synsets)):
        raise DataError(f"{path}: must name every class once, sorted by WordNet id")
    return synsets


def read_solutions(path, label_of):
    """(picture name without its ending, label) of every validation picture."""
    found = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if number == 1 and row[:1] == ["ImageId"] or not row:
                    continue
                synset = row[1].split()[0] if len(row) > 1 and row[1].split() else ""
                if synset not in label_of:
                    raise DataError(f"{path}:{number}: {','.join(row)[:80]!r} does not name a class as in 'ILSVRC2012_val_00048981,n03995372 85 1 499 272'")
                found.append((row[0], label_of[synset]))
    except OSError as error:
        raise DataError(f"{path}: cannot read the validation labels: {error.strerror}") from None
    return sorted(found)


def write_lists(root, out):
    """Write both list files; returns a summary line."""
    images = os.path.join(root, "ILSVRC", "Data", "CLS-LOC")
    synsets = read_synsets(os.path.join(root, "LOC_synset_mapping.txt"))
    label_of = {synset: label for label, synset in enumerate(synsets)}
    val = [(f"val/{name}.JPEG", label) for name, label in read_solutions(os.path.join(root, "LOC_val_solution.csv"), label_of)]
    missing = [name for name, _ in val if not os.path.isfile(os.path.join(images, name))]
    if missing or not val:
        raise DataError(f"{images}: {len(missing)} of {len(val)} validation pictures are missing ({', '.join(missing[:3])}); unpack them there")
    train = read_class_folders(os.path.join(images, "train"), synsets)
    rows = [(os.path.relpath(path, images).replace(os.sep, "/"), label) for path, label in zip(train.paths, train.labels.tolist())]
    os.makedirs(out, exist_ok=True)
    for split, lines in (("train", rows), ("val", val)):
        path = os.path.join(out, f"{split}_list.txt")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(f"{name} {label}\n" for name, label in lines)
        os.replace(path + ".tmp", path)
    return f"{len(rows)} training and {len(val)} validation pictures of {len(synsets)} classes listed in {out}"


def main(argv=None):
    """Run the tool; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, metavar="DIR", help="where the archive was unpacked")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the list files")
    args = parser.parse_args(argv)
    try:
        print(write_lists(args.root, args.out))
    except UserInputError as error:
        print(f"prepare_imagenet: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
