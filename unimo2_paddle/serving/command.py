"""``unimo2 predict``: one input from the command line, or many from a JSON-lines file; JSON lines out."""
import json
import os
import sys

from unimo2_paddle.errors import DataError, UserInputError


def add_arguments(parser):
    """The command's arguments."""
    parser.add_argument("--model", required=True, metavar="DIR", help="best/ of a finetuning run, or a pre-trained model for pairs")
    parser.add_argument("--image", metavar="FILE", help="picture; for a model of UNIMO its name in the store of --regions")
    parser.add_argument("--regions", metavar="DIR", help="store of region features (unimo2 features import), for models of UNIMO")
    text = parser.add_mutually_exclusive_group()
    for name, told in (("text", "sentence (of a pair: the first), hypothesis, or object tags"), ("question", "question about the picture")):
        text.add_argument(f"--{name}", metavar="TEXT", help=told)
    parser.add_argument("--text-b", metavar="TEXT", help="second sentence of a pair, or the passage of a dialogue")
    parser.add_argument("--caption", action="store_true", help="say that a caption is wanted: refuses a model that does not caption")
    parser.add_argument("--classes", metavar="A,B,...", help="zero-shot classes for --image, separated by commas, or a text file with one per line")
    parser.add_argument("--templates", metavar="LIST", default="photos", help="sentences for --classes: photos, shapes or a text file; default: photos")
    parser.add_argument("--input", metavar="FILE", help="JSON lines with the keys image, text (or question, hypothesis, sentence), text_b; - reads them "
                                                        "from standard input")
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
    elif args.input:
        _many(predictor, args)
    elif args.classes:
        _tell(predictor.classify([args.image], _class_names(args.classes), args.templates)[0].to_json())
    else:
        given = {"image": args.image, "text": args.text if args.text is not None else args.question, "text_b": args.text_b}
        _tell(predictor(**given).to_json())


def _check(args):
    single = [name for name in ("image", "text", "question", "text_b") if getattr(args, name) is not None]
    if args.top < 1 or args.batch_size < 1 or args.rerank < 0:
        raise UserInputError("--top and --batch-size must be at least 1, --rerank at least 0")
    if bool(args.build_index) != bool(args.source):
        raise UserInputError("--build-index and --source go together")
    if sum(map(bool, (args.build_index, args.retrieve, args.input))) > 1:
        raise UserInputError("give one of --input, --retrieve, --build-index")
    if (args.build_index or args.input) and single:
        raise UserInputError(f"--{single[0].replace('_', '-')} does not go with --{'build-index' if args.build_index else 'input'}")
    if args.classes is not None and single != ["image"]:
        raise UserInputError("--classes goes with --image alone")
    if not single and not (args.build_index or args.input):
        raise UserInputError("nothing to predict from: give --image, --text or --question, or --input FILE")


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


def _many(predictor, args):
    """Results of a JSON-lines file, in its order, each with the inputs it belongs to."""
    pending = []
    for number, request in _requests(args.input):
        pending.append((number, request))
        if len(pending) == args.batch_size:
            _answer(predictor, pending, args)
            pending = []
    if pending:
        _answer(predictor, pending, args)


def _answer(predictor, numbered, args):
    names = [f"{args.input}:{number}" for number, _ in numbered]
    results = predictor.predict_batch([request for _, request in numbered], args.batch_size, names)
    for (_, request), result in zip(numbered, results):
        _tell({**request, **result.to_json()})


def _requests(path):
    """Yields (line number, mapping) of a JSON-lines file."""
    try:
        with (sys.stdin if path == "-" else open(path, encoding="utf-8")) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    request = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error})") from None
                if not isinstance(request, dict):
                    raise DataError(f"{path}:{number}: expected an object with image and texts")
                yield number, request
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


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
