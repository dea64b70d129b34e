"""Region features of the generated pictures, in the public TSV and in UNIMO's record formats of three tasks.

::

    DIR/objects_vocab.txt, DIR/attributes_vocab.txt                  the detector's names
    DIR/bottom_up/{train,dev,test}.tsv                               every picture of the corpora under its key, ten columns
    DIR/captioning/{train,valid,test}_filelist, *.gz                 a record per training caption, one per picture to caption
    DIR/captioning/shapes_object_0.35_tot.ids                        tags of the objects the detector is surer of than 0.35
    DIR/entailment/{train,dev,test}_filelist, *.gz                   a record per hypothesis; labels count as in data/formats/snli_ve.py
    DIR/retrieval/textids/{train,val.all,test.all}.ids               captions
    DIR/retrieval/features/{train,dev,test}/part-00000               pictures

Texts, numbers and splits are those of the pixel tasks (DATA/captioning, DATA/entailment, DATA/retrieval).
"""
import gzip
import json
import os
from dataclasses import replace

import cv2
import numpy as np

from unimo2_paddle.data.collate import FIRST_POSITION
from unimo2_paddle.data.demo_regions import ATTRIBUTE_NAMES, OBJECT_NAMES, detect
from unimo2_paddle.data.demo_tasks.captioning import described_pictures, tokenised
from unimo2_paddle.data.demo_tasks.entailment import judged_pictures
from unimo2_paddle.data.demo_tasks.pictures import read_pictures
from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.formats.bottom_up import BOTTOM_UP
from unimo2_paddle.data.formats.regions import RegionText, format_regions
from unimo2_paddle.data.formats.snli_ve import LABELS
from unimo2_paddle.data.formats.unimo_records import CAPTIONING, ENTAILMENT, RETRIEVAL
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.tokenizer import Tokenizer

SPLITS = ("train", "dev", "test")
_TAG_CONFIDENCE = 0.35
_CAPTIONING_NAMES = {"train": "train", "dev": "valid", "test": "test"}
_TEXTIDS = {"train": "train", "dev": "val.all", "test": "test.all"}
_KARPATHY = {"train": "train", "dev": "val", "test": "test"}
_AT_ONCE = 500  # pictures decoded at a time


def write(directory, demo_directory, seed):
    """Write the data sets; the same arguments give the same files.

    Args:
        directory: folder to write; demo_directory: what ``unimo2 demo-data`` wrote; seed: of the detector's faults.

    Returns:
        a summary line.
    """
    os.makedirs(os.path.join(directory, "bottom_up"), exist_ok=True)
    for name, words in (("objects_vocab.txt", OBJECT_NAMES), ("attributes_vocab.txt", ATTRIBUTE_NAMES)):
        _write(os.path.join(directory, name), (word for word in words))
    tokenizer = Tokenizer.from_directory(os.path.join(demo_directory, "vocab"))
    records, counts = {}, {}
    for place, split in enumerate(SPLITS):
        found = _detect_split(demo_directory, split, seed, place)
        _write(os.path.join(directory, "bottom_up", f"{split}.tsv"), (format_regions(_without_probabilities(r), BOTTOM_UP) for r in found))
        records.update((record.image_id, record) for record in found)
        counts[split] = len(found)
    _write_captioning(os.path.join(directory, "captioning"), demo_directory, records, tokenizer)
    _write_entailment(os.path.join(directory, "entailment"), demo_directory, seed, records, tokenizer)
    _write_retrieval(os.path.join(directory, "retrieval"), demo_directory, records, tokenizer)
    return "regions: " + ", ".join(f"{count} pictures in {split}" for split, count in counts.items()) + f" ({directory})"


def _detect_split(demo_directory, split, seed, place):
    scenes = {row["key"]: (number, row, scene) for number, (row, scene) in enumerate(read_scenes(demo_directory, split))}
    records, waiting = [], []
    for row, jpeg in read_pictures(demo_directory, [row for _, row, _ in scenes.values()]):
        waiting.append((row["key"], jpeg))
        if len(waiting) == _AT_ONCE or len(records) + len(waiting) == len(scenes):
            pictures = [(key, scenes[key][2], cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]) for key, data in waiting]
            records += detect(pictures, [generator(seed, place, scenes[key][0]) for key, _ in waiting])
            waiting = []
    return records


def _without_probabilities(record):
    """The public TSV has the most probable object and attribute only."""
    return replace(record, object_probs=None, attribute_probs=None)


def _write_captioning(directory, demo_directory, records, tokenizer):
    os.makedirs(directory)
    lines, tags = {split: [] for split in SPLITS}, []
    for split, number, row, _, told in described_pictures(demo_directory):
        record, image_id = records[row["key"]], f"shapes14_{number:06d}"  # nine characters before the number, as in the authors' files
        tags.append(_tag_line(number, record, tokenizer))
        line = format_regions(record, CAPTIONING, image_id=image_id)
        texts = [_text(text, str(place), "1", tokenizer, with_word_starts=True) for place, text in enumerate(told)] if split == "train" \
            else [RegionText("0", "0")]
        lines[split] += _with_texts(line, texts, CAPTIONING)
    for split, name in _CAPTIONING_NAMES.items():
        _write_part(directory, name, lines[split])
    _write(os.path.join(directory, f"shapes_object_{_TAG_CONFIDENCE}_tot.ids"), tags)


def _write_entailment(directory, demo_directory, seed, records, tokenizer):
    os.makedirs(directory)
    for split in SPLITS:
        lines = []
        for image_id, row, told in judged_pictures(demo_directory, split, seed):
            texts = [_text(text, f"{image_id}{place}", str(LABELS.index(label)), tokenizer) for place, (label, text) in enumerate(told)]
            lines += _with_texts(format_regions(records[row["key"]], ENTAILMENT, image_id=image_id), texts, ENTAILMENT)
        _write_part(directory, split, lines)


def _write_retrieval(directory, demo_directory, records, tokenizer):
    os.makedirs(os.path.join(directory, "textids"))
    with open(os.path.join(demo_directory, "retrieval", "dataset_shapes.json"), encoding="utf-8") as file:
        images = json.load(file)["images"]
    for split in SPLITS:
        os.makedirs(os.path.join(directory, "features", split))
        captions, features = [], []
        for image in images:
            if image["split"] != _KARPATHY[split]:
                continue
            record = records[os.path.splitext(image["filename"])[0]]
            features.append(format_regions(record, RETRIEVAL, image_id=str(image["imgid"])))
            for sentence in image["sentences"]:
                captions.append(f"{_columns(_text(sentence['raw'], '', '', tokenizer))};{image['imgid']};{sentence['sentid']}")
        _write(os.path.join(directory, "textids", f"{_TEXTIDS[split]}.ids"), captions)
        _write(os.path.join(directory, "features", split, "part-00000"), features)
    _write(os.path.join(directory, "dataset_shapes_name_id.txt"), (f"{image['filename']}\t{image['imgid']}" for image in images))


def _text(text, text_id, label, tokenizer, with_word_starts=False):
    ids, word_starts = tokenised(text, tokenizer)
    return RegionText(text_id, label, tuple(ids), (0,) * len(ids), tuple(range(FIRST_POSITION, FIRST_POSITION + len(ids))),
                      tuple(word_starts) if with_word_starts else ())


def _with_texts(line, texts, layout):
    """The line of a picture once per text: only the text's columns change, and encoding the numbers again would be slow."""
    fields = line.split(layout.separator)
    for text in texts:
        row = layout.write_text(text)
        yield layout.separator.join(str(row.get(name, field)) for name, field in zip(layout.layouts[0], fields))


def _tag_line(number, record, tokenizer):
    names = [f"{ATTRIBUTE_NAMES[a]} {OBJECT_NAMES[o]}" for o, a, sure in zip(record.object_ids, record.attribute_ids, record.object_confidence)
             if sure > _TAG_CONFIDENCE]
    return f"{number};{_columns(_text(' '.join(names), '', '', tokenizer))}"


def _columns(text):
    return ";".join(" ".join(map(str, ids)) for ids in (text.token_ids, text.sentence_ids, text.position_ids))


def _write_part(directory, name, lines):
    """A gzipped part and the filelist that names it; a picture's lines stand together, so it costs once."""
    # no time and no name in the header: the same bytes every day
    with open(os.path.join(directory, f"{name}-00000.gz"), "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as file:
        file.write("".join(line + "\n" for line in lines).encode("utf-8"))
    _write(os.path.join(directory, f"{name}_filelist"), [f"{name}-00000.gz"])


def _write(path, lines):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
