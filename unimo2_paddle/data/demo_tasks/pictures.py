"""The demo's pictures: read back from the corpora, or as plain files, as tasks on picture folders want them."""
import os
import tarfile
from collections import defaultdict


def read_pictures(demo_directory, rows):
    """Yields (scene row, encoded picture) of every row, shard by shard.

    Args:
        demo_directory: what ``unimo2 demo-data`` wrote; rows: scene rows; a row names the shard or file that holds its picture.
    """
    shards = defaultdict(dict)
    for row in rows:
        source = os.path.join(demo_directory, row["file"])
        if source.endswith(".tar"):
            shards[source][row["key"] + ".jpg"] = row
        else:
            with open(source, "rb") as file:
                yield row, file.read()
    for shard, members in shards.items():
        with tarfile.open(shard) as tar:
            for member in tar:
                row = members.pop(member.name, None)
                if row:
                    yield row, tar.extractfile(member).read()
        if members:
            raise ValueError(f"{shard} lacks {', '.join(sorted(members)[:3])}")


def copy_pictures(demo_directory, wanted):
    """Write pictures of the demo corpora under other names.

    Args:
        demo_directory: what ``unimo2 demo-data`` wrote.
        wanted: list of (scene row, path to write), every row once.
    """
    targets = {row["key"]: target for row, target in wanted}
    for row, data in read_pictures(demo_directory, [row for row, _ in wanted]):
        os.makedirs(os.path.dirname(targets[row["key"]]), exist_ok=True)
        with open(targets[row["key"]], "wb") as file:
            file.write(data)
