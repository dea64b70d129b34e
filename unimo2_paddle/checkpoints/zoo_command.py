"""``unimo2 zoo list|show|publish`` and ``unimo2 download``."""
import os

from unimo2_paddle.errors import UserInputError


def add_zoo_arguments(parser):
    """The subcommands of ``unimo2 zoo`` with their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "List the weights and data of the zoo, and which of them are on this disk."
    sub = actions.add_parser("list", help=text, description=text)
    sub.add_argument("--kind", choices=("model", "data", "scripts"), help="only these; default: all")
    _add_zoo_directory(sub)
    text = "Show everything the registry knows of a name."
    sub = actions.add_parser("show", help=text, description=text)
    sub.add_argument("name", metavar="NAME")
    _add_zoo_directory(sub)
    text = "Pack a checkpoint directory into a zoo directory, so that its name works like a released model's."
    sub = actions.add_parser("publish", help=text, description=text)
    sub.add_argument("directory", metavar="DIR", help="checkpoint directory, for example output/demo/pretrain/best")
    sub.add_argument("--name", required=True, help="what to call it: lower-case letters, digits, '.', '_', '-'")
    sub.add_argument("--to", required=True, metavar="ZOO_DIRECTORY", help="zoo directory; made when missing")
    sub.add_argument("--about", default="", metavar="SENTENCE", help="what it is; default: the task it was trained for")
    sub.add_argument("--licence", default="unknown", help="of the weights; default: unknown")


def add_download_arguments(parser):
    """The arguments of ``unimo2 download``."""
    parser.add_argument("name", metavar="NAME", help="a name of unimo2 zoo list")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--mirror", default="", metavar="URL", help="server that holds the archive under the same path, or the archive's own address")
    source.add_argument("--from-file", default="", metavar="ARCHIVE", help="take this archive, fetched by other means, instead of the network")
    parser.add_argument("--to", default="", metavar="DIR", help="directory to make, for example model_files/UNIMO-2; default: in the cache (UNIMO2_HOME)")
    parser.add_argument("--retries", type=int, default=5, metavar="N", help="tries without progress before giving up; default: 5")
    _add_zoo_directory(parser)


def _add_zoo_directory(parser):
    parser.add_argument("--zoo", action="append", default=[], metavar="DIR", help="further zoo directory (repeatable; or UNIMO2_ZOO)")


def zoo(args):
    """Runs ``unimo2 zoo``; returns the text for the screen.

    Raises:
        UserInputError: see :mod:`unimo2_paddle.checkpoints.zoo`.
    """
    if args.action == "publish":
        from unimo2_paddle.checkpoints.publish import publish

        return publish(args.directory, args.name, args.to, args.about, args.licence)
    return _table(args.kind, args.zoo) if args.action == "list" else _details(args.name, args.zoo)


def download(args):
    """Runs ``unimo2 download``; returns the text for the screen.

    Raises:
        UserInputError, DownloadError: see :func:`unimo2_paddle.checkpoints.zoo.fetch`.
    """
    from unimo2_paddle.checkpoints.download import Patience
    from unimo2_paddle.checkpoints.zoo import fetch, find, recorded

    if args.retries < 0:
        raise UserInputError("--retries must be at least 0")
    entry = find(args.name, args.zoo)
    path = fetch(args.name, args.mirror, args.from_file, args.to, args.zoo, Patience(retries=args.retries))
    lines = [f"{entry.name}: {path}", f"sha256 of the archive: {recorded(entry.name).get('sha256', 'not recorded')}"]
    if entry.kind == "model":
        lines.append(f"use it: from_pretrained({path if args.to else entry.name!r}), or -o model.init={path if args.to else 'zoo:' + entry.name}")
    elif entry.use_at and not args.to:
        lines.append(f"the run configs look for it at {entry.use_at}: ln -s {path} {entry.use_at}")
    return "\n".join(lines)


def _table(kind, zoos):
    from unimo2_paddle.checkpoints.zoo import cached_path, entries

    chosen = [entry for entry in entries(zoos).values() if kind in (None, entry.kind)]
    rows = [("name", "kind", "system", "size", "here", "what")]
    rows += [(one.name, one.kind, one.system, str(one.size), "yes" if os.path.isdir(cached_path(one.name)) else "-", one.about) for one in chosen]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) + f"  {row[5]}" for row in rows)


def _details(name, zoos):
    from unimo2_paddle.checkpoints.zoo import by_hand, cached_path, find, recorded

    entry = find(name, zoos)
    known, here = recorded(entry.name), os.path.isdir(cached_path(entry.name))
    facts = [("name", entry.name), ("what", entry.about), ("kind", f"{entry.kind}, {entry.system}"), *(("url", url) for url in entry.urls),
             ("size", entry.size), ("sha256", entry.sha256), ("licence", entry.licence), ("root", entry.root), ("use at", entry.use_at),
             ("model config", entry.config), ("files", entry.files), *(("table", row) for row in entry.table),
             *(("run config", path) for path in entry.used_by), ("registry", entry.registry),
             ("in the cache", cached_path(entry.name) if here else f"no ({cached_path(entry.name)})")]
    if known:
        facts.append(("first download", f"{known.get('url')}, {known.get('size')} bytes, sha256 {known.get('sha256')}"))
    return "\n".join(f"{title + ':':<16}{value}" for title, value in facts if value) + f"\n{by_hand(entry)}"
