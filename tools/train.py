"""`python tools/train.py -c CONFIG -o key=value ...` is `unimo2 train`, without the need to install the package."""
import os
import sys
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.cli import main  # noqa: E402


def note(status):
    """Tell tools/launch.sh how this worker ended: Paddle's launcher keeps it to itself."""
    if os.environ.get("UNIMO2_STATUS_DIR"):
        Path(os.environ["UNIMO2_STATUS_DIR"], os.environ.get("PADDLE_TRAINER_ID", "0")).write_text(f"{status}\n", encoding="ascii")


if __name__ == "__main__":
    status = 1
    note("running")
    try:
        status = main(["train", *sys.argv[1:]])
    except SystemExit as end:  # argparse
        status = end.code
    finally:
        note(status)
    sys.exit(status)
