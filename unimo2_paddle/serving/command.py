"""``unimo2 predict``: one input from the command line, or many from a folder of pictures, a JSON-lines or a CSV file."""
import json
import os
import sys

from unimo2_paddle.errors import DataError, UserInputError


def add_arguments(parser):
    """The command's arguments."""
    parser.add_argument("-m", "--model", required=True, metavar="DIR", help="best/ of a finetuning run, or a pre-trained model for pairs")
    parser.add_argument("--image", metavar="FILE", help="picture; for a model of UNIMO its name in the store of --regions")
    parser.add_argument("--regions", metavar="DIR", help="store of region features (unimo2 features import), for models of UNIMO")
    text = parser.add_mutually_exclusive_group()
    for name, told in (("text", "sentence (of a pair: the first), hypothesis, or object tags"), ("question", "question about the picture")):
        text.add_argument(f"--{name}", metavar="TEXT", help=told)
    parser.add_argument("--text-b", metavar="TEXT", help="second sentence of a pair, or the passage of a dialogue")
    parser.add_argument("--caption", action="store_true", help="say that a caption is wanted: refuses a model that does not caption")
    parser.add_argument("--classes", metavar="A,B,...", help="zero-shot classes for --image, separated by commas, or a text file with one per line")
    parser.add_argument("--templates", metavar="LIST", default="photos", help="sentences for --classes: photos, shapes or a text file; default: photos")
    parser.add_argument("--input", metavar="FILE", help="JSON lines, or a .csv or .tsv file, with the keys image, text (or question, hypothesis, sentence), "
                                                        "text_b; - reads JSON lines from standard input")
    parser.add_argument("--images", metavar="FOLDER", help="every picture of a folder, with the --text or --question given; beside --input: where its "
                                                           "pictures are")
    parser.add_argument("--output", metavar="FILE", help="write the results of --input or --images here, .csv, .tsv or JSON lines, and show progress")
    parser.add_argument("--skip-bad", action="store_true", help="write a wrong input with its error and go on (always so for the pictures of --images)")
    parser.add_argument("--retrieve", metavar="INDEX", help="search an index: pictures by --text, sentences by --image")
    parser.add_argument("--build-index", metavar="INDEX", help="write an index of --source")
    parser.add_argument("--source", metavar="PATH", help="folder of pictures or file of sentences, for --build-index")
    parser.add_argument("--top", type=int, default=5, help="classes, answers or items to tell; default: 5")
    parser.add_argument("--rerank", type=int, default=32, help="items of an index the whole model judges; 0: contrastive scores alone; default: 32")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs per forward; default: 32")


def predict(args):
    """Run the command with its parsed arguments; prints one JSON object per result.

    Raises:
        UserInputError: arguments that do not go together, or that the model cannot use.
    """
    _check(args)
    from unimo2_paddle.serving.predictor import Predictor

    predictor = Predictor(args.model, args.top, args.regions)
    if args.caption and predictor.task != "captioning":
        raise UserInputError(f"--caption: {args.model} is a model for {predictor.task}; give the best/ directory of a captioning run")
    if args.build_index:
        _build_index(predictor, args)
    elif args.retrieve:
        _retrieve(predictor, args)
    elif args.input or args.images:
        _many(predictor, args)
    elif args.classes:
        _tell(predictor.classify([args.image], _class_names(args.classes), args.templates)[0].to_json())
    else:
        _tell(predictor(image=args.image, **_texts(args)).to_json())


def _check(args):
    single = [name for name in ("image", "text", "question", "text_b") if getattr(args, name) is not None]
    if args.top < 1 or args.batch_size < 1 or args.rerank < 0:
        raise UserInputError("--top and --batch-size must be at least 1, --rerank at least 0")
    if bool(args.build_index) != bool(args.source):
        raise UserInputError("--build-index and --source go together")
    if sum(map(bool, (args.build_index, args.retrieve, args.input))) > 1:
        raise UserInputError("give one of --input, --retrieve, --build-index")
    if args.images and (args.retrieve or args.build_index or args.classes or args.image):
        raise UserInputError("--images goes with --input, or with --text and --text-b")
    if (args.output or args.skip_bad) and not (args.input or args.images):
        raise UserInputError("--output and --skip-bad go with --input or --images")
    if (args.build_index or args.input) and single:
        raise UserInputError(f"--{single[0].replace('_', '-')} does not go with --{'build-index' if args.build_index else 'input'}")
    if args.classes is not None and single != ["image"]:
        raise UserInputError("--classes goes with --image alone")
    if not single and not (args.build_index or args.input or args.images):
        raise UserInputError("nothing to predict from: give --image, --text or --question, --images FOLDER, or --input FILE")


def _class_names(given):
    """The names of a comma-separated list, or the lines of a file."""
    if not os.path.isfile(given):
        return [name.strip() for name in given.split(",")]
    try:
        with open(given, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--classes {given}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _tell(values):
    print(json.dumps(values, ensure_ascii=False), flush=True)


def _texts(args):
    """The texts of the command line, those that are given."""
    given = {"text": args.text if args.text is not None else args.question, "text_b": args.text_b}
    return {name: value for name, value in given.items() if value is not None}


def _many(predictor, args):
    """Results of a folder or a file, in its order, each with the inputs it belongs to."""
    from tqdm import tqdm

    from unimo2_paddle.serving.many import Output, answer_all, file_requests, folder_requests

    requests = file_requests(args.input, args.images) if args.input else folder_requests(predictor, args.images, _texts(args))
    total = None if args.input else len(requests)
    with Output(args.output) as output, tqdm(total=total, desc=predictor.task, unit="input", leave=False, disable=None if args.output else True) as bar:
        done, wrong = answer_all(predictor, requests, output, args.batch_size, args.skip_bad or not args.input, bar)
    if args.output:
        print(f"{done} results in {args.output}")
    if wrong:
        print(f"{wrong} of {done} inputs could not be used; their results have an error", file=sys.stderr)


def _build_index(predictor, args):
    from unimo2_paddle.serving.index import RetrievalIndex
    from unimo2_paddle.serving.indexing import collect_items

    kind, items = collect_items(args.source)
    index = RetrievalIndex.build(predictor, kind, items, args.batch_size)
    index.save(args.build_index)
    _tell({"index": args.build_index, "kind": kind, "items": len(index)})


def _retrieve(predictor, args):
    from unimo2_paddle.serving.index import RetrievalIndex

    index = RetrievalIndex.load(args.retrieve)
    wanted, other = ("text", "image") if index.kind == "images" else ("image", "text")
    query = getattr(args, wanted)
    if query is None or getattr(args, other) is not None:
        raise UserInputError(f"{args.retrieve} holds {index.kind}: search it with --{wanted} alone")
    for found in index.search(predictor, query, args.top, args.rerank):
        _tell(found.to_json())
