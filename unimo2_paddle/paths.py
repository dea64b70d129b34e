"""The type of everything that names a file or directory."""
import os
from typing import Union

PathLike = Union[str, "os.PathLike[str]"]
