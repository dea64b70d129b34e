"""A checkpoint of ours into a zoo directory, where its name can be used as a released one's (``unimo2 zoo publish``)."""
import os

import yaml

from unimo2_paddle.checkpoints.archives import pack
from unimo2_paddle.checkpoints.convert import locate, read_checkpoint, read_json
from unimo2_paddle.checkpoints.download import sha256_of
from unimo2_paddle.checkpoints.zoo import NAME_PATTERN, entries
from unimo2_paddle.errors import CheckpointError, ZooError

_TRAINING_STATE = "optimizer.safetensors"


def publish(directory, name, zoo, about="", licence="unknown"):
    """Write ``NAME.tar.gz`` and ``NAME.yaml`` (its registry entry) into a zoo directory; the archive first, so that an entry has one.

    The same directory always gives the same archive.

    Args:
        directory: checkpoint directory, for example best/ of a run; everything in it is packed. name: what to call it. zoo: directory, made
            when missing. about: one sentence for ``unimo2 zoo list``; licence: of the weights.

    Returns:
        str: what was done, for the screen.

    Raises:
        ZooError: the name is unusable or taken; CheckpointError: no loadable checkpoint; ArchiveError: it holds links.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ZooError(f"--name {name!r}: lower-case letters, digits, '.', '_' and '-', at most 64")
    if os.path.exists(os.path.join(directory, _TRAINING_STATE)):
        raise CheckpointError(f"{directory} is a training state with its optimizer; publish the best/ directory of the run")
    locate(directory)
    arrays, config, kind = read_checkpoint(directory)
    try:
        os.makedirs(zoo, exist_ok=True)
        taken = entries((zoo,))
        archive, entry = os.path.join(zoo, f"{name}.tar.gz"), os.path.join(zoo, f"{name}.yaml")
        if name in taken or os.path.exists(archive) or os.path.exists(entry):
            where = taken[name].registry if name in taken else archive
            raise ZooError(f"{name} is taken ({where}); nothing is overwritten. Choose another name, or remove it there")
        _whole(archive, lambda temporary: pack(directory, temporary, name))
        values = {name: {
            "kind": "model", "system": _system(config), "about": about or _sentence(directory), "urls": [f"{name}.tar.gz"],
            "size": os.path.getsize(archive), "sha256": sha256_of(archive), "licence": licence, "root": name,
            "files": f"{kind}, {len(arrays)} variables, {sum(array.size for array in arrays.values())} values"}}
        _whole(entry, lambda temporary: _write_yaml(temporary, values))
    except OSError as error:
        raise ZooError(f"{error.filename or zoo}: {error.strerror or error}; choose another --to") from None
    return (f"published {directory} as {name}: {archive}, {values[name]['size']} bytes, sha256 {values[name]['sha256']}\n"
            f"use it: export UNIMO2_ZOO={os.path.abspath(zoo)}, then from_pretrained({name!r}) or -o model.init=zoo:{name}")


def _system(config):
    from unimo2_paddle.models.configuration import Unimo2Config, config_class

    return "unknown" if config is None else "UNIMO-2" if config_class(config) is Unimo2Config else "UNIMO"


def _sentence(directory):
    """What task.json tells about the model, if there is one."""
    file = os.path.join(directory, "task.json")
    task = read_json(file).get("task") if os.path.isfile(file) else None
    return f"a model for {task}" if task else "a pre-trained model"


def _write_yaml(path, values):
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True, width=120)


def _whole(path, write):
    """Have ``write`` fill a temporary file that becomes ``path`` when it is complete."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
