"""Check a result file before it goes to an evaluation server: ``python tools/validate_submission.py TASK RESULT REFERENCE``."""
import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.errors import UserInputError  # noqa: E402

# task -> (function(result path, what must be answered), what the reference is, function that reads what must be answered from it)
VALIDATORS = {
    "vqa": ("unimo2_paddle.metrics.vqa:validate_submission", "the split's question file", "unimo2_paddle.data.formats.vqa:read_question_ids"),
}


def _load(place):
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def main(arguments=None):
    """Returns the exit status: 0 = the server would take the file, 2 = it would not."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("task", choices=sorted(VALIDATORS), help="whose format it is")
    parser.add_argument("result", help="the file to check")
    parser.add_argument("reference", help="; ".join(f"{task}: {what}" for task, (_, what, _) in sorted(VALIDATORS.items())))
    args = parser.parse_args(arguments)
    validate, _, read = VALIDATORS[args.task]
    try:
        print(_load(validate)(args.result, _load(read)(args.reference)))
    except UserInputError as error:
        print(f"validate_submission: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
