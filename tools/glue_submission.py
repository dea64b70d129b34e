"""Check files for the GLUE server, and pack them: `python tools/glue_submission.py FOLDER [--zip glue.zip]`.

FOLDER holds SST-2.tsv, CoLA.tsv, STS-B.tsv, MNLI-m.tsv, MNLI-mm.tsv or AX.tsv, as `unimo2 eval ... -o eval.split=test` writes them into
<run.output>/predictions/submission. Checked: the header, every prediction, and that each index of the official test set occurs once.
The server also wants the files of GLUE's other tasks (MRPC, QQP, QNLI, RTE, WNLI), which UNIMO does not report; others' are packed unchecked.
"""
import argparse
import os
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.data.formats.glue import GLUE, check_submission  # noqa: E402
from unimo2_paddle.errors import DataError  # noqa: E402

SERVER_FILES = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("folder", type=Path, help="folder of TSV files")
    parser.add_argument("--any-size", action="store_true", help="do not compare with the official test sets' sizes (for other data)")
    parser.add_argument("--zip", type=Path, metavar="FILE", help="pack the folder's files for the server")
    args = parser.parse_args(argv)
    known = {name: (dataset, part) for dataset, spec in GLUE.items() for part, (name, _) in spec.submissions.items()}
    found, problems = sorted(args.folder.glob("*.tsv")), []
    if not found:
        problems.append(f"{args.folder}: no .tsv file here")
    for path in found:
        if path.name not in known:
            print(f"{path.name}: not checked (not a task of ours)" if path.stem in SERVER_FILES else f"{path.name}: no file the server knows")
            continue
        try:
            count = check_submission(str(path), *known[path.name], size=0 if args.any_size else None)
            print(f"{path.name}: {count} predictions, in order")
        except DataError as error:
            problems.append(str(error))
    missing = [f"{name}.tsv" for name in SERVER_FILES if not (args.folder / f"{name}.tsv").is_file()]
    if missing:
        print(f"the server also asks for {', '.join(missing)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.zip and not problems:
        temporary = args.zip.with_name(args.zip.name + ".tmp")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in found:
                archive.write(path, path.name)
        os.replace(temporary, args.zip)
        print(f"packed: {args.zip}")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
