"""Captions of the generated pictures in the files of COCO captioning.

::

    DIR/dataset_shapes.json, DIR/images/*.jpg           Karpathy's format with cocoid; splits train, val, test
    DIR/{train,val,test}_filelist, DIR/*.ids.gz         the authors' tokenised records
    DIR/objects.ids                                     object tags (what a detector might say: colour and shape, one in ten missed)
    DIR/captions_{val,test}.json                        references as COCO annotations
    DIR/captions_nocaps.json                            NoCaps' format: seen combinations (in-domain), unseen ones (out-domain)
"""
import gzip
import json
import os

from unimo2_paddle.data.demo_tasks.pictures import copy_pictures
from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.shapes import SHAPES, caption
from unimo2_paddle.data.shards import ShardSet
from unimo2_paddle.data.tokenizer import Tokenizer

SPLITS = {"train": "train", "dev": "val", "test": "test"}
_MISSED = 0.1      # share of the objects without a tag
_IN_DOMAIN = 100   # pictures of seen combinations in the NoCaps file


def write(directory, demo_directory, seed):
    """Write the data set; the same arguments give the same files.

    Args:
        directory: folder to write; demo_directory: what ``unimo2 demo-data`` wrote; seed: of the tags and the NoCaps captions.

    Returns:
        a summary line.
    """
    os.makedirs(os.path.join(directory, "images"), exist_ok=True)
    tokenizer = Tokenizer.from_directory(os.path.join(demo_directory, "vocab"))
    rows, tags, pictures = {split: [] for split in SPLITS}, [], []
    number = 0
    for split, number, row, scene, told in described_pictures(demo_directory):
        rows[split].append((number, row["key"] + ".jpg", told))
        tags.append((number, _tags(scene, tokenizer, generator(seed, 0, number))))
        pictures.append((row, os.path.join(directory, "images", row["key"] + ".jpg")))
    counts = {split: len(found) for split, found in rows.items()}
    described = []
    # pictures of the image corpus: nobody has described them in training
    unseen = [(row, scene) for row, scene in read_scenes(demo_directory, "train") if row["key"].startswith("image")]
    for row, scene in unseen[:_IN_DOMAIN]:
        number += 1
        described.append((number, row["key"] + ".jpg", caption(scene, generator(seed, 1, number))))
        pictures.append((row, os.path.join(directory, "images", row["key"] + ".jpg")))
    copy_pictures(demo_directory, pictures)
    _write_karpathy(directory, rows)
    for split, name in SPLITS.items():
        _write_records(directory, name, rows[split], tokenizer, with_captions=split == "train")
    _write_lines(os.path.join(directory, "objects.ids"), (f"{i};{_ids(ids)};{_ids([0] * len(ids))};{_positions(ids)}" for i, ids in tags))
    for split in ("dev", "test"):
        _write_coco(directory, SPLITS[split], [(*row, "") for row in rows[split]])
    _write_coco(directory, "nocaps", [(*row, "in-domain") for row in described] + [(*row, "out-domain") for row in rows["test"]])
    return "captioning: " + ", ".join(f"{count} pictures in {split}" for split, count in counts.items()) + f" ({directory})"


def described_pictures(demo_directory):
    """Yields (split, number, scene row, Scene, captions) of every picture with captions; the number is its id in this data set, from 1."""
    captions, number = _captions(demo_directory), 0
    for split in SPLITS:
        for row, scene in read_scenes(demo_directory, split):
            if row["key"] in captions:
                number += 1
                yield split, number, row, scene, captions[row["key"]]


def tokenised(text, tokenizer):
    """A caption as in the authors' files: ids with [CLS] and [SEP], and the whole-word column (1 continues a word, -1 special)."""
    ids, starts = tokenizer.encode_with_word_starts(text)
    return [tokenizer.cls_id, *ids, tokenizer.sep_id], [-1] + [0 if begins else 1 for begins in starts] + [-1]


def _captions(demo_directory):
    """The captions of every described picture by its key."""
    found = {}
    pairs = ShardSet(os.path.join(demo_directory, "pairs", "*.tar"), "pairs")
    for index in range(len(pairs)):
        record = pairs.read(index)
        found[record.key] = list(record.texts)
    retrieval = os.path.join(demo_directory, "retrieval")
    for split in ("val", "test"):
        for image in read_karpathy(os.path.join(retrieval, "dataset_shapes.json"), os.path.join(retrieval, "images"), split):
            found[image.image_id] = image.captions
    return found


def _tags(scene, tokenizer, rng):
    words = [f"{thing.colour} {SHAPES[thing.shape][0]}" for thing in scene.objects if rng.random() >= _MISSED]
    return [tokenizer.cls_id, *tokenizer.encode(" ".join(words)), tokenizer.sep_id]


def _write_karpathy(directory, rows):
    images, sentence = [], 0
    for split, name in SPLITS.items():
        for number, filename, told in rows[split]:
            sentences = [{"raw": text, "tokens": text.lower().rstrip(".").split(), "imgid": number, "sentid": sentence + i}
                         for i, text in enumerate(told)]
            sentence += len(told)
            images.append({"filename": filename, "filepath": "images", "imgid": number, "cocoid": number, "split": name,
                           "sentids": [s["sentid"] for s in sentences], "sentences": sentences})
    with open(os.path.join(directory, "dataset_shapes.json"), "w", encoding="utf-8") as file:
        json.dump({"dataset": "shapes", "images": images}, file)


def _write_records(directory, name, rows, tokenizer, with_captions):
    lines = []
    for number, filename, told in rows:
        start = f"shapes14_{number:06d};images/{filename}"  # nine characters before the number, as in the authors' files
        if not with_captions:
            lines.append(f"{start};0;;;;;0")
            continue
        for place, text in enumerate(told):
            ids, labels = tokenised(text, tokenizer)
            lines.append(f"{start};{place};{_ids(ids)};{_ids([0] * len(ids))};{_positions(ids)};{_ids(labels)};1")
    with gzip.GzipFile(os.path.join(directory, f"{name}.ids.gz"), "wb", mtime=0) as file:  # no time: the same bytes every day
        file.write("".join(line + "\n" for line in lines).encode("utf-8"))
    _write_lines(os.path.join(directory, f"{name}_filelist"), [f"{name}.ids.gz"])


def _write_coco(directory, name, rows):
    images = [{"id": number, "file_name": f"images/{filename}", **({"domain": domain} if domain else {})}
              for number, filename, _, domain in rows]
    annotations = [{"image_id": number, "id": number * 100 + i, "caption": text}
                   for number, _, told, _ in rows for i, text in enumerate(told)]
    with open(os.path.join(directory, f"captions_{name}.json"), "w", encoding="utf-8") as file:
        json.dump({"info": {"description": "generated by unimo2_paddle"}, "images": images, "annotations": annotations}, file)


def _write_lines(path, lines):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def _ids(values):
    return " ".join(map(str, values))


def _positions(ids):
    return _ids(range(2, 2 + len(ids)))
