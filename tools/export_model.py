"""`python tools/export_model.py --model DIR --to DIR` is `unimo2 export`, without the need to install the package."""
import sys
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
