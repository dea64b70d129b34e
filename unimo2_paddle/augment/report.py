"""A page of augmented records to look at: captions with their paraphrases and hard negatives, related texts and pictures with scores."""
import html

import numpy as np

from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.shards import ShardSet, expand_shards
from unimo2_paddle.errors import DataError
from unimo2_paddle.tasks.reporting import thumbnail, write_text

_STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
          "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .7rem;text-align:left}"
          "section{margin:1.2rem 0;padding:.6rem 1rem;background:#fafafa;border-left:.4rem solid #8aa}"
          "section img{max-width:10rem}figure{display:inline-block;margin:.3rem .8rem .3rem 0;font-size:80%}"
          "ins{text-decoration:none;background:#ffd9d2}del{color:#888}.positive{color:#1a7a3c}.level{color:#888;font-size:80%;margin-right:.5rem}")


def write_report(directory, path, pictures=(), samples=20, seed=1):
    """Write the page, all or nothing.

    Args:
        directory: of an ``Augmentations``; path: the HTML file; pictures: tar shards of the records and of related pictures, for thumbnails.
        samples: records to show, drawn evenly over the input shards; seed: of the choice.

    Returns:
        how many records are shown.

    Raises:
        DataError: there are no augmentations, or a shard cannot be read.
    """
    store, finder = Augmentations(directory), _Pictures(pictures)
    chosen = _choose(store, samples, seed)
    parts = ["<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Augmentations</title>"
             f"<style>{_STYLE}</style><h1>Augmentations: {len(chosen)} samples</h1>", _counts(store)]
    parts += [_section(store.get(key, shard), shard, finder) for shard, key in chosen]
    write_text(path, "\n".join(parts) + "\n")
    return len(chosen)


def _choose(store, samples, seed):
    """(shard, key) of the samples, in the order of the corpus."""
    shards = store.shards()
    counts = np.bincount(generator(seed, 0).integers(len(shards), size=samples), minlength=len(shards)) if shards else []
    chosen = []
    for number, shard in enumerate(shards):
        if counts[number]:
            keys = store.keys(shard)
            places = sorted(generator(seed, 1, number).permutation(len(keys))[:counts[number]])
            chosen += [(shard, keys[place]) for place in places]
    return chosen


def _counts(store):
    rows = "".join(f"<tr><td>{kind}</td><td>{html.escape(name.replace('_', ' '))}</td><td>{value}</td></tr>"
                   for kind, manifest in store.manifests.items() for name, value in sorted(manifest["counts"].items()))
    return f"<table><tr><th>part</th><th>what</th><th>number</th></tr>{rows}</table>"


def _section(record, shard, finder):
    lines = [f"<section><h2>{html.escape(record.key)} <span class='level'>{html.escape(shard)}</span></h2>", finder.show(shard, record.key)]
    for caption in record.captions:
        lines.append(f"<h3>{html.escape(caption.text)}</h3>")
        lines += [f"<div class='positive'><span class='level'>paraphrase</span>{html.escape(text)}</div>" for text in caption.positives]
        for level, negatives in caption.negatives.items():
            lines += [f"<div><span class='level'>{html.escape(level)}</span>{_negative(caption.text, entry)}</div>" for entry in negatives]
    if record.texts:
        lines.append("<h3>related texts</h3>")
        lines += [f"<div><span class='level'>{entry['score']:.3f}</span>{html.escape(entry['text'])} "
                  f"<span class='level'>{html.escape(entry['key'])}</span></div>" for entry in record.texts]
    if record.images:
        lines.append("<h3>related pictures</h3>")
        lines += [f"<figure>{finder.show(entry['shard'], entry['key'])}<figcaption>{entry['score']:.3f} {html.escape(entry['key'])}</figcaption></figure>"
                  for entry in record.images]
    return "\n".join(lines) + "</section>"


def _negative(caption, entry):
    if "from" not in entry:
        return f"{html.escape(entry['text'])} <span class='level'>{entry['score']:.3f}</span>"
    text, start, end = entry["text"], 0, 0
    while start < min(len(text), len(caption)) and text[start] == caption[start]:
        start += 1
    while end < min(len(text), len(caption)) - start and text[-1 - end] == caption[-1 - end]:
        end += 1
    changed = html.escape(text[start:len(text) - end])
    return (f"{html.escape(text[:start])}<ins>{changed}</ins>{html.escape(text[len(text) - end:])} "
            f"<span class='level'>{html.escape(entry['category'])}: <del>{html.escape(entry['from'])}</del></span>")


class _Pictures:
    """Pictures of tar shards by (shard name, key)."""

    def __init__(self, patterns):
        self._paths, self._tables = {}, {}
        for path in expand_shards(list(patterns)) if patterns else ():
            name = path.replace("\\", "/").rsplit("/", 1)[-1]
            self._paths[name[:-4] if name.endswith(".tar") else name] = path

    def show(self, shard, key):
        """The picture as an element, or nothing where its shard was not given."""
        if shard not in self._paths:
            return ""
        if shard not in self._tables:
            reader = ShardSet([self._paths[shard]], "images")
            self._tables[shard] = (reader, {reader.read(index).key: index for index in range(len(reader))})
        reader, places = self._tables[shard]
        try:
            return thumbnail(reader.read(places[key]).image) if key in places else ""
        except DataError as error:
            return f"<em>{html.escape(str(error))}</em>"
