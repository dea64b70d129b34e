"""``unimo2 features import|show``: region files into a store, and what a store holds."""
from unimo2_paddle.data.formats.coco_captions import filelist_paths
from unimo2_paddle.errors import UserInputError

FORMATS = ("bottom_up", "captioning", "entailment", "retrieval")  # named here too: the command line starts without the readers
DTYPES = ("float16", "float32")
_SHOWN = 20  # regions in the table of a picture


def add_arguments(parser):
    """The two subcommands with their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "Write a memory-mapped store of region features; an interrupted import goes on with the next file."
    sub = actions.add_parser("import", help=text, description=text)
    sub.add_argument("inputs", nargs="*", metavar="IN", help="region files, plain or .gz")
    sub.add_argument("--format", required=True, choices=FORMATS, help="bottom_up: the public TSV; the others: UNIMO's records of that task")
    sub.add_argument("--filelist", action="append", default=[], metavar="FILE", help="text file that names further region files (repeatable)")
    sub.add_argument("--out", required=True, metavar="DIR", help="the store to write (must not exist)")
    sub.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored features; default: float16")
    sub.add_argument("--no-objects", action="store_true", help="leave out what the detector calls the regions")
    sub.add_argument("--probabilities", action="store_true", help="also store the probabilities of all the detector's classes, as float16")
    sub.add_argument("--object-names", metavar="FILE", help="the detector's objects_vocab.txt, one name per line")
    sub.add_argument("--attribute-names", metavar="FILE", help="the detector's attributes_vocab.txt")
    sub.add_argument("--max-bad-ratio", type=float, default=0.01, metavar="R", help="share of unusable records that is skipped; default: 0.01")
    text = "Print what a store of region features holds, or the regions of one picture."
    sub = actions.add_parser("show", help=text, description=text)
    sub.add_argument("store", metavar="DIR", help="what features import wrote")
    sub.add_argument("--key", metavar="NAME", help="show this picture's regions")


def run(args):
    """Runs the command with its parsed arguments; returns the text for the screen.

    Raises:
        UserInputError: wrong arguments or unusable input.
    """
    if args.action == "show":
        return describe_picture(args.store, args.key) if args.key is not None else describe_store(args.store)
    from unimo2_paddle.data.region_import import import_regions

    inputs = args.inputs + [path for filelist in args.filelist for path in filelist_paths(filelist)]
    if not inputs:
        raise UserInputError("no region file is named; give files or --filelist")
    import_regions(inputs, args.out, args.format, args.dtype, not args.no_objects, args.probabilities, args.object_names,
                   args.attribute_names, args.max_bad_ratio)
    return describe_store(args.out)


def describe_store(directory):
    """A summary of a store."""
    from unimo2_paddle.data.region_store import RegionStore

    manifest = RegionStore(directory).manifest
    counts, size = manifest["regions_per_picture"], sum(manifest["files"].values())
    columns = [name for name in manifest["arrays"] if name.startswith(("object_", "attribute_"))]
    swapped = sum(part["swapped"] for part in manifest["parts"])
    repeated = sum(part["repeated"] for part in manifest["parts"])
    lines = [
        f"region features in {directory} ({size / 1e6:.1f} MB, from {len(manifest['parts'])} file(s) of format {manifest['format']})",
        f"  pictures:  {manifest['pictures']}, with {counts['least']} to {counts['most']} regions (mean {counts['mean']:g}), {manifest['regions']} in all",
        f"  features:  {manifest['feature_size']} wide, {manifest['dtype']}",
        f"  detector:  {', '.join(columns) or 'no object columns'}",
        f"  texts:     {manifest['texts']}" + (f" ({repeated} records repeat a picture)" if repeated else ""),
    ]
    if swapped:
        lines.append(f"  sizes:     width and height exchanged for {swapped} pictures: their boxes, or those of most of their file, fit only so")
    if manifest["bad_records"]:
        lines.append(f"  skipped:   {manifest['bad_records']} bad records, listed in bad_records.jsonl")
    return "\n".join(lines)


def describe_picture(directory, key):
    """A table of a picture's regions."""
    from unimo2_paddle.data.region_store import RegionStore

    store = RegionStore(directory)
    regions = store[key]
    lines = [f"picture {key}: {regions.width} x {regions.height} pixels, {len(regions.boxes)} regions, features {store.feature_size} wide",
             f"  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}  {'mean':>8} {'norm':>8}  detector"]
    for number in range(min(_SHOWN, len(regions.boxes))):
        features, told = regions.features[number], ""
        for ids, confidence, names in ((regions.attribute_ids, regions.attribute_confidence, store.attribute_names),
                                       (regions.object_ids, regions.object_confidence, store.object_names)):
            if ids is not None:
                told += f"  {names[ids[number]] if names else ids[number]}" + (f" {confidence[number]:.2f}" if confidence is not None else "")
        box = " ".join(f"{value:7.1f}" for value in regions.boxes[number])
        lines.append(f"  {box}  {features.mean():8.4f} {(features ** 2).sum() ** 0.5:8.3f}{told}")
    if len(regions.boxes) > _SHOWN:
        lines.append(f"  ... and {len(regions.boxes) - _SHOWN} more")
    return "\n".join(lines)
