"""Picture folders: what every annotation format needs to turn a file name into a checked path."""
import os

from unimo2_paddle.errors import DataError


def picture_path(directory, name, where):
    """Joins a file name from an annotation file to the picture folder.

    Args:
        directory: the picture folder.
        name: file name, relative to the folder.
        where: place of the name in the annotation file, for the message.

    Raises:
        DataError: the name is empty, absolute or leaves the folder.
    """
    if not isinstance(name, str) or not name or os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
        raise DataError(f"{where}: {name!r} is not a file name inside the picture folder")
    return os.path.join(os.fspath(directory), name)


def require_pictures(directory, paths, source):
    """Raises DataError with the count and the first names unless every picture exists.

    Args:
        directory: the picture folder.
        paths: picture paths from ``picture_path``.
        source: the annotation file that names them.
    """
    if not os.path.isdir(directory):
        raise DataError(f"{directory}: no such picture folder (wanted by {source})")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        names = ", ".join(os.path.relpath(path, directory) for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{source}: {len(missing)} of {len(paths)} pictures are missing in {directory}: {names}; "
                        "unpack the pictures there or name the right folder")
