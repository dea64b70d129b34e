"""Paraphrases and synonyms of the generated world, as an annotator or a translator would give them.

::

    DIR/paraphrases.jsonl    {"key": pair, "paraphrases": [...]}: other sentences that are true of the pair's picture
    DIR/synonyms.txt         words of the world that mean the same (for `unimo2 augment index --synonyms`)
"""
import json
import os

from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.shapes import SHAPES, SIZES, caption

PARAPHRASES = 3


def write(directory, demo_directory, seed):
    """Write the files; the same arguments give the same files.

    Args:
        directory: folder to write; demo_directory: what ``unimo2 demo-data`` wrote; seed: of the sentences.

    Returns:
        a summary line.
    """
    os.makedirs(directory)
    count = 0
    with open(os.path.join(directory, "paraphrases.jsonl"), "w", encoding="utf-8", newline="\n") as file:
        for number, (row, scene) in enumerate(read_scenes(demo_directory, "train")):
            if row["file"].startswith("pairs/"):
                file.write(json.dumps({"key": row["key"], "paraphrases": caption(scene, generator(seed, 7, number), PARAPHRASES)}) + "\n")
                count += 1
    with open(os.path.join(directory, "synonyms.txt"), "w", encoding="utf-8", newline="\n") as file:
        file.writelines(", ".join(names) + "\n" for names in SHAPES.values())
        file.writelines("size: " + ", ".join(names) + "\n" for names in SIZES.values())
    return f"rewrites: {directory}, {PARAPHRASES} paraphrases of each of {count} pairs"
