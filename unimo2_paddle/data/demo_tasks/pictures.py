"""The demo's pictures as plain files, as tasks on picture folders want them."""
import os
import tarfile
from collections import defaultdict


def copy_pictures(demo_directory, wanted):
    """Write pictures of the demo corpora under other names.

    Args:
        demo_directory: what ``unimo2 demo-data`` wrote.
        wanted: list of (scene row, path to write); the picture's bytes are taken from the shard or file the row names.
    """
    shards = defaultdict(dict)
    for row, target in wanted:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        source = os.path.join(demo_directory, row["file"])
        if source.endswith(".tar"):
            shards[source][row["key"] + ".jpg"] = target
        else:
            with open(source, "rb") as file:
                _write(target, file.read())
    for shard, members in shards.items():
        with tarfile.open(shard) as tar:
            for member in tar:
                target = members.pop(member.name, None)
                if target:
                    _write(target, tar.extractfile(member).read())
        if members:
            raise ValueError(f"{shard} lacks {', '.join(sorted(members)[:3])}")


def _write(path, data):
    with open(path, "wb") as file:
        file.write(data)
