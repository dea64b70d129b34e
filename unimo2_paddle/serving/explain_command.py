"""``unimo2 explain``: the grounded tokens of a picture and a sentence, as a table, a picture and a page."""
import json

from unimo2_paddle.serving.search_command import add_model_argument


def add_arguments(parser):
    """The command's arguments."""
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("caption", nargs="?", default="", metavar="CAPTION", help="sentence; without it the picture's own tokens are explained")
    add_model_argument(parser)
    parser.add_argument("--out", default="output/explain", metavar="DIR", help="where explain.html, explain.png and explain.json go; default: output/explain")
    parser.add_argument("--corpus", action="append", default=[], metavar="INDEX",
                        help="index of pictures or of sentences made with unimo2 index --codes, for a token's nearest pictures and words (repeatable)")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="tokens to explain in full; default: 8")
    parser.add_argument("--nearest", type=int, default=6, metavar="N", help="nearest pictures and words of a token; default: 6")
    parser.add_argument("--json", action="store_true", help="print the whole explanation as JSON instead of a table")


def run(args):
    """Run the command with its parsed arguments."""
    from unimo2_paddle.serving.explain import explain
    from unimo2_paddle.serving.explain_report import summary, write_explanation

    found = explain(args.model, args.image, args.caption, args.corpus, args.tokens, args.nearest)
    paths = write_explanation(found, args.out)
    if args.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    print("\n".join(summary(found)))
    print(f"{'token':>6} {'rank':>5} {'origin':>10} {'patches':>8} {'words':>8}  most similar words")
    for token in found.tokens:
        best = sorted(range(len(token.words)), key=lambda n: -token.words[n])[:4]
        print(f"{token.id:>6} {token.rank:>5} {token.origin:>10} {_number(token.image_share)} {_number(token.text_share)}  "
              f"{', '.join(found.words[n] for n in best)}")
    print(f"page: {paths['html']}  picture: {paths['png']}  data: {paths['json']}")


def _number(value):
    return f"{'-':>8}" if value is None else f"{value:>8.3f}"
