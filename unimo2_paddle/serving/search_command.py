"""``unimo2 index`` and ``unimo2 search``: a folder of pictures searched by sentences, or sentences by a picture."""
import html
import json
import os

from unimo2_paddle.errors import UserInputError

MODEL, INDEX = "output/demo/pretrain/best", "output/index"
_STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
          "ol{list-style:none;padding:0;display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1rem}"
          "li{background:#fafafa;padding:.5rem}img{width:100%;object-fit:contain}small{color:#666;overflow-wrap:anywhere}")


def add_model_argument(parser):
    """``-m``, with the demo's model as default."""
    parser.add_argument("-m", "--model", default=MODEL, metavar="DIR", help=f"checkpoint directory of a UNIMO-2 model, or zoo:NAME; default: {MODEL}")


def add_index_arguments(parser):
    """The arguments of ``unimo2 index``."""
    parser.add_argument("source", metavar="SOURCE", help="folder of pictures, or text file of one sentence a line")
    add_model_argument(parser)
    parser.add_argument("--out", default=INDEX, metavar="DIR", help=f"the index; one that is there is brought up to date; default: {INDEX}")
    parser.add_argument("--codes", action="store_true", help="also store the codes of the grounded dictionary, for unimo2 explain --corpus")
    parser.add_argument("--thumbnails", type=int, nargs="?", const=160, default=0, metavar="PIXELS", help="store thumbnails; default edge: 160")
    parser.add_argument("--batch-size", type=int, default=32, help="items per forward; default: 32")
    parser.add_argument("--rebuild", action="store_true", help="encode everything again (another source or model)")


def add_search_arguments(parser):
    """The arguments of ``unimo2 search``."""
    parser.add_argument("query", nargs="?", metavar="TEXT", help="sentence to search pictures by")
    parser.add_argument("--image", metavar="FILE", help="picture to search an index of sentences by")
    parser.add_argument("--index", default=INDEX, metavar="DIR", help=f"what unimo2 index wrote; default: {INDEX}")
    parser.add_argument("-m", "--model", metavar="DIR", help="default: the model that the index was made with")
    parser.add_argument("--top", type=int, default=10, help="results; default: 10")
    parser.add_argument("--rerank", type=int, default=20, help="results that the whole model judges; 0: contrastive scores alone; default: 20")
    parser.add_argument("--html", metavar="FILE", help="also write a page of thumbnails")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


def run_index(args):
    """Run ``unimo2 index``; prints what changed."""
    from unimo2_paddle.serving.indexing import IndexOptions, update_index
    from unimo2_paddle.serving.predictor import Predictor

    options = IndexOptions(args.codes, args.thumbnails, args.batch_size)
    _, changes = update_index(Predictor(args.model), args.source, args.out, options, args.rebuild, show_progress=True)
    print(json.dumps({"index": args.out, **changes.to_json()}))
    for entry in changes.skipped[:10]:
        print(f"skipped: {entry['reason']}")
    if len(changes.skipped) > 10:
        print(f"skipped: {len(changes.skipped) - 10} more, see {os.path.join(args.out, 'index.json')}")


def run_search(args):
    """Run ``unimo2 search``; prints the results."""
    from unimo2_paddle.serving.index import RetrievalIndex
    from unimo2_paddle.serving.predictor import Predictor

    if bool(args.query) == bool(args.image):
        raise UserInputError("give a sentence, or a picture by --image")
    index = RetrievalIndex.load(args.index)
    if (index.kind == "images") != bool(args.query):
        raise UserInputError(f"{args.index} holds {index.kind}: search it with {'a sentence' if index.kind == 'images' else '--image'} alone")
    model = args.model or index.about.get("model_directory")
    if not model:
        raise UserInputError(f"{args.index} does not tell its model; give it by -m")
    found = index.search(Predictor(model), args.query or args.image, args.top, args.rerank)
    if args.html:
        write_page(args.html, index, args.query or args.image, found)
    if args.json:
        for row in found:
            print(json.dumps(row.to_json(), ensure_ascii=False))
        return
    print(f"{'rank':>4} {'score':>9} {'contrastive':>11}  item")
    for rank, row in enumerate(found, 1):
        print(f"{rank:>4} {row.score:>9.3f} {row.contrastive:>11.3f}  {row.item}")


def write_page(path, index, query, found):
    """Write a page of the results; it needs no other file.

    Raises:
        UserInputError: the file cannot be written.
    """
    import base64

    from unimo2_paddle.errors import ImageError
    from unimo2_paddle.tasks.reporting import write_text

    cards = []
    for rank, row in enumerate(found, 1):
        try:
            shown = "" if index.kind == "texts" else (f"<img alt='{html.escape(os.path.basename(row.item), quote=True)}' src='data:image/jpeg;base64,"
                                                      f"{base64.b64encode(index.thumbnail(row.place, 240)).decode()}'>")
        except ImageError as error:
            shown = f"<em>{html.escape(str(error))}</em>"
        name = row.item if index.kind == "texts" else os.path.relpath(row.item, index.root)
        cards.append(f"<li>{shown}<br>{rank}. score {row.score:.3f}<br><small>{html.escape(name)}, contrastive {row.contrastive:.3f}</small></li>")
    title = f"Search: {query}"
    page = (f"<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{html.escape(title)}</title>"
            f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{len(found)} of {len(index)} {index.kind}</p><ol>{''.join(cards)}</ol>\n")
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise UserInputError(f"--html {path}: cannot be written: {error.strerror}") from None
