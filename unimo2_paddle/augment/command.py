"""``unimo2 augment index|rewrite|retrieve|report``: the offline steps behind contrastive learning with rewritten and retrieved data."""
import os

from unimo2_paddle.errors import UserInputError


def add_arguments(parser):
    """The command's arguments."""
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)

    def step(name, function, text):
        sub = steps.add_parser(name, help=text, description=text)
        sub.set_defaults(step_function=function)
        return sub

    sub = step("index", _index, "Index captions (TF-IDF, BM25, vocabulary), or pictures or texts by their embeddings.")
    _add_source(sub)
    sub.add_argument("--kind", choices=("images", "texts"), default="texts", help="what to index; default: texts")
    sub.add_argument("--synonyms", metavar="FILE", help="lines of terms that mean the same and must not replace each other (for rewriting)")
    sub.add_argument("--model", metavar="DIR", help="index embeddings of this retrieval or pre-trained model instead of words")
    sub.add_argument("--features", metavar="NPY", help="index these features (float [N, H]) instead of a source")
    sub.add_argument("--keys", metavar="FILE", help="a line per row of --features: KEY, or SHARD, KEY and perhaps TEXT separated by tabs")
    _add_output(sub)
    sub = step("rewrite", _rewrite, "Write paraphrases and hard negatives of every caption.")
    _add_source(sub)
    sub.add_argument("--index", required=True, metavar="DIR", help="index of captions the negatives come from")
    sub.add_argument("--paraphrases", action="append", default=[], metavar="FILE",
                     help="paraphrases or back-translations, tab-separated or .jsonl (repeatable)")
    sub.add_argument("--levels", default="sentence,phrase,word", metavar="LIST", help="of sentence, phrase, word; default: all")
    sub.add_argument("--negatives", type=int, default=3, help="hard negatives per caption and level; default: 3")
    sub.add_argument("--positives", type=int, default=5, help="paraphrases per caption, at most; default: 5")
    sub.add_argument("--seed", type=int, default=1, help="seed of the draws; default: 1")
    _add_output(sub)
    sub = step("retrieve", _retrieve, "Write the related texts or pictures of every record.")
    _add_source(sub, required=False)
    sub.add_argument("--index", required=True, metavar="DIR", help="what to search: an index of captions, or of embeddings")
    sub.add_argument("--queries", metavar="DIR", help="index of the asking records' embeddings, to search an index of embeddings")
    sub.add_argument("--top", type=int, default=10, help="neighbours per record; default: 10")
    sub.add_argument("--own-captions", action="store_true", help="let other captions of a record's own picture be related texts")
    sub.add_argument("--backend", choices=("auto", "faiss", "numpy"), default="auto", help="search of embeddings; default: faiss where installed")
    _add_output(sub)
    sub = step("report", _report, "Write a page of samples to look at.")
    sub.add_argument("--augmentations", required=True, metavar="DIR", help="--out of rewrite and retrieve")
    sub.add_argument("--pictures", nargs="+", default=[], metavar="PATH", help="tar shards of the records and of the related pictures, for thumbnails")
    sub.add_argument("--samples", type=int, default=20, help="records to show; default: 20")
    sub.add_argument("--seed", type=int, default=1, help="seed of the choice; default: 1")
    sub.add_argument("--out", metavar="HTML", help="page to write; default: report.html in the augmentations")


def _add_source(parser, required=True):
    parser.add_argument("--source", nargs="+", default=[], metavar="PATH", help="tar shards (patterns are expanded) or a caption file")
    parser.add_argument("--format", choices=("shards", "karpathy", "coco", "lines"), default="shards", help="of --source; default: shards")
    parser.add_argument("--images", default="", metavar="DIR", help="picture folder of a karpathy or coco file")
    parser.add_argument("--split", default="train", help="split of a karpathy file; default: train")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep the indices of tar shards here between runs")


def _add_output(parser):
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write; an unfinished one is continued")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th input shard from number I on (N processes share the work); default: 0/1")
    parser.add_argument("--max-bad-ratio", type=float, default=0.01, help="stop when more of an input shard's records are bad; default: 0.01")


def augment(args):
    """Run one step with its parsed arguments; prints what was made.

    Raises:
        UserInputError: arguments that do not go together, or input that cannot be used.
    """
    args.step_function(args)


def _source(args, kind):
    from unimo2_paddle.augment.sources import Source

    if not args.source:
        raise UserInputError("--source: name the tar shards or the caption file")
    return Source(args.source, args.format, kind, args.images, args.split, args.cache_dir)


def _index(args):
    from unimo2_paddle.augment.parts import ProcessShare

    share = ProcessShare(args.shard, args.max_bad_ratio)
    if bool(args.features) != bool(args.keys):
        raise UserInputError("--features and --keys go together")
    if args.features:
        if args.model or args.source:
            raise UserInputError("--features: goes without --source and --model")
        from unimo2_paddle.augment.retrieval import import_features

        _tell(args.out, import_features(args.out, args.features, args.keys, args.kind))
    elif args.model:
        from unimo2_paddle.augment.encoding import encoder
        from unimo2_paddle.augment.retrieval import build_embedding_index

        source = _source(args, args.kind)
        encode, fingerprint = encoder(args.model, args.kind)
        _tell(args.out, build_embedding_index(args.out, source, args.kind, encode, fingerprint, share))
    elif args.kind == "images":
        raise UserInputError("--kind images: pictures have no words; give --model DIR, or --features NPY and --keys FILE")
    else:
        from unimo2_paddle.augment.text_index import build_text_index

        _tell(args.out, build_text_index(args.out, _source(args, "texts"), share, args.synonyms))


def _rewrite(args):
    from unimo2_paddle.augment.paraphrases import ParaphraseFile
    from unimo2_paddle.augment.parsing import SceneParser
    from unimo2_paddle.augment.parts import Parts, ProcessShare
    from unimo2_paddle.augment.rewriting import RewriteOptions, Rewriter, rewrite_part, rewrite_settings
    from unimo2_paddle.augment.text_index import TextIndex

    levels = tuple(level.strip() for level in args.levels.split(",") if level.strip())
    options, share = RewriteOptions(levels, args.negatives, args.positives, args.seed), ProcessShare(args.shard, args.max_bad_ratio)
    shards, index = _source(args, "texts").shards(), TextIndex(args.index)
    paraphrases = [ParaphraseFile(path) for path in args.paraphrases]
    rewriter = Rewriter(SceneParser(index.lexicon()), index, paraphrases, options)
    parts = Parts(os.path.join(args.out, "rewrites"), rewrite_settings(options, index, paraphrases))
    parts.run(shards, share, lambda records, target: rewrite_part(rewriter, records, target))
    _tell(parts.directory, parts.finish(shards, {"sources": args.source}))


def _retrieve(args):
    from unimo2_paddle.augment.parts import Parts, ProcessShare, read_manifest
    from unimo2_paddle.augment.retrieval import WHAT, EmbeddingIndex, EmbeddingSearch, RetrieveOptions, TextSearch, retrieve_part
    from unimo2_paddle.augment.text_index import TextIndex

    options, share = RetrieveOptions(args.top, args.own_captions), ProcessShare(args.shard, args.max_bad_ratio)
    settings = {"what": "neighbours", "top": options.top, "own_captions": options.own_captions}
    if read_manifest(args.index, "index")["what"] == WHAT:
        if not args.queries or args.source:
            raise UserInputError(f"{args.index} is an {WHAT}: ask with --queries, an index of the same model, instead of --source")
        index, queries = EmbeddingIndex(args.index, args.backend), EmbeddingIndex(args.queries, "numpy")
        if index.model != queries.model and not (index.model.startswith("imported") and queries.model.startswith("imported")):
            raise UserInputError(f"{args.queries} was made with another model than {args.index}: their features cannot be compared")
        index.check_width(queries.features)
        search, shards, sources = EmbeddingSearch(index), queries.query_shards(), queries.sources
        settings.update(index=index.fingerprint(), queries=queries.fingerprint())
    else:
        if args.queries:
            raise UserInputError(f"{args.index} is an index of captions: ask with --source instead of --queries")
        index, source = TextIndex(args.index), _source(args, "texts")
        search, shards, sources = TextSearch(index), source.shards(), args.source
        settings.update(index=index.fingerprint())
    parts = Parts(os.path.join(args.out, search.kind), settings)
    parts.run(shards, share, lambda records, target: retrieve_part(search, options, records, target))
    _tell(parts.directory, parts.finish(shards, {"sources": list(sources), "index_sources": list(index.sources)}))


def _report(args):
    from unimo2_paddle.augment.report import write_report

    if args.samples < 1 or args.seed < 0:
        raise UserInputError("--samples must be at least 1, --seed at least 0")
    path = args.out or os.path.join(args.augmentations, "report.html")
    shown = write_report(args.augmentations, path, args.pictures, args.samples, args.seed)
    print(f"{path}: {shown} records")


def _tell(directory, manifest):
    if manifest is None:
        print(f"{directory}: this process' parts are done; other processes still have some to make")
    else:
        print(f"{directory}: " + ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in sorted(manifest["counts"].items())))
