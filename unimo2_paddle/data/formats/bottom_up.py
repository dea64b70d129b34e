"""The TSV of bottom-up attention (peteanderson80/bottom-up-attention): regions of a Faster R-CNN trained on Visual Genome.

Two layouts are in use, both without a header line: the six columns of the published features, and ten columns with the most probable
object and attribute of every region, as later extraction scripts write them. The longer one states the height first. Object ids
count the lines of ``objects_vocab.txt`` from 0, attribute ids those of ``attributes_vocab.txt``.
"""
from unimo2_paddle.data.formats.regions import RegionFormat, plain_id
from unimo2_paddle.errors import DataError

COLUMNS = ("image_id", "width", "height", "number_box", "boxes", "features")
COLUMNS_WITH_OBJECTS = ("image_id", "height", "width", "object_ids", "object_confidence", "attribute_ids", "attribute_confidence",
                        "number_box", "boxes", "features")
BOTTOM_UP = RegionFormat((COLUMNS, COLUMNS_WITH_OBJECTS), "\t", plain_id)


def read_names(path):
    """The names in a vocabulary of the detector: one per line; of synonyms separated by commas the first.

    Raises:
        DataError: the file cannot be read, is empty or has an empty line between names.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.split(",")[0].strip() for line in file.read().rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the names: {getattr(error, 'strerror', None) or error}") from None
    if "" in names:
        raise DataError(f"{path}:{names.index('') + 1}: no name in this line; the ids count the lines")
    return names
