"""The generated scenes of a demo directory, read back."""
import json
import os

from unimo2_paddle.data.shapes import Scene, SceneObject
from unimo2_paddle.errors import DataError


def read_scenes(demo_directory, split):
    """The scenes of a split with their rows.

    Args:
        demo_directory: what ``unimo2 demo-data`` wrote; split: "train", "dev" or "test".

    Returns:
        list of (row, Scene); a row has ``key`` and ``file`` of the picture. Radius, angle and stretch of an object are not in the file
        and come back as half its box, 0 and 1: enough for sentences, not for drawing.

    Raises:
        DataError: no demo data there.
    """
    path = os.path.join(demo_directory, "scenes", f"{split}.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the scenes ({getattr(error, 'strerror', None) or error}); make them with unimo2 demo-data") from None
    return [(row, _scene(row)) for row in rows]


def _scene(row):
    things = []
    for thing in row["objects"]:
        left, _, right, _ = thing["box"]
        things.append(SceneObject(thing["colour"], thing["shape"], thing["size"], *thing["centre"], (right - left) / 2, 0.0, 1.0))
    return Scene(tuple(things), tuple((i, name, j) for i, name, j in row["relations"]), row["background"])
