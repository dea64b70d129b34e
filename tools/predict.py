"""`python tools/predict.py --model DIR --image a.jpg --question ...` is `unimo2 predict`, without the need to install the package."""
import sys
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
