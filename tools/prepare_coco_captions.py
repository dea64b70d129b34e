#!/usr/bin/env python3
"""Write the reference captions of Karpathy's COCO split as COCO annotation files, and check result files for the COCO server.

References (for data that come tokenised, run_configs/captioning/coco.yaml)::

    python tools/prepare_coco_captions.py --karpathy data/coco/dataset_coco.json --out data/coco

writes captions_train.json, captions_valid.json and captions_test.json. dataset_coco.json is in Karpathy's caption_datasets.zip, linked
from his page on deep visual-semantic alignments. A result file::

    python tools/prepare_coco_captions.py --check captions_test_results.json --references data/coco/captions_test.json
"""
import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unimo2_paddle.data.formats.coco_captions import read_coco_captions, result_problems  # noqa: E402
from unimo2_paddle.errors import UserInputError  # noqa: E402

NAMES = {"train": "train", "restval": "train", "val": "valid", "test": "test"}  # Karpathy's split -> the authors' file name


def write_references(karpathy, out):
    """Write the three annotation files; returns a line about them."""
    try:
        with open(karpathy, encoding="utf-8") as file:
            entries = json.load(file)["images"]
        files = {name: {"images": [], "annotations": []} for name in NAMES.values()}
        for entry in entries:
            target = files[NAMES[entry["split"]]]
            folder = entry.get("filepath")
            target["images"].append({"id": entry["cocoid"], "file_name": f"{folder}/{entry['filename']}" if folder else entry["filename"]})
            target["annotations"] += [{"image_id": entry["cocoid"], "id": s["sentid"], "caption": s["raw"]} for s in entry["sentences"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserInputError(f"{karpathy}: is not Karpathy's dataset_coco.json ({type(error).__name__}: {error})") from None
    os.makedirs(out, exist_ok=True)
    for name, content in files.items():
        path = os.path.join(out, f"captions_{name}.json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(path + ".tmp", path)
    return ", ".join(f"captions_{name}.json ({len(content['images'])} pictures)" for name, content in files.items())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--karpathy", metavar="JSON", help="Karpathy's dataset_coco.json")
    parser.add_argument("--out", metavar="DIR", help="folder for the annotation files")
    parser.add_argument("--check", metavar="JSON", help="result file to check instead")
    parser.add_argument("--references", metavar="JSON", help="COCO annotations of the split the results are of")
    args = parser.parse_args(argv)
    try:
        if args.check and args.references:
            problems = result_problems(args.check, [image.image_id for image in read_coco_captions(args.references, "")])
            print("\n".join(problems) or "the result file is fine")
            return 1 if problems else 0
        if not (args.karpathy and args.out):
            parser.error("give --karpathy and --out, or --check and --references")
        print(write_references(args.karpathy, args.out))
        return 0
    except UserInputError as error:
        print(f"prepare_coco_captions: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
