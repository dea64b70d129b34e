"""The console command ``unimo2``: one thin function per command, exit status 0 (done), 1 (failed), 2 (wrong input)."""
import argparse
import sys

import unimo2_paddle
from unimo2_paddle.augment.command import add_arguments as add_augment_arguments
from unimo2_paddle.checkpoints.zoo_command import add_download_arguments, add_zoo_arguments
from unimo2_paddle.data.region_command import add_arguments as add_feature_arguments
from unimo2_paddle.errors import Unimo2Error, UserInputError
from unimo2_paddle.reports.command import add_compare_arguments, add_report_arguments
from unimo2_paddle.runtime import import_paddle, prepare_process
from unimo2_paddle.serving.command import add_arguments as add_predict_arguments
from unimo2_paddle.serving.explain_command import add_arguments as add_explain_arguments
from unimo2_paddle.serving.export_command import add_arguments as add_export_arguments
from unimo2_paddle.serving.search_command import add_index_arguments, add_search_arguments
from unimo2_paddle.serving.serve_command import add_arguments as add_serve_arguments


def _train(args):
    from unimo2_paddle.training.loop import train_from_config

    train_from_config(args.config, args.override, resume=args.resume)


def _eval(args):
    from unimo2_paddle.training.loop import evaluate_from_config

    evaluate_from_config(args.config, args.override)


def _predict(args):
    from unimo2_paddle.serving.command import predict

    predict(args)


def _explain(args):
    from unimo2_paddle.serving.explain_command import run

    run(args)


def _index(args):
    from unimo2_paddle.serving.search_command import run_index

    run_index(args)


def _search(args):
    from unimo2_paddle.serving.search_command import run_search

    run_search(args)


def _export(args):
    from unimo2_paddle.serving.export_command import run

    print(run(args))


def _serve(args):
    from unimo2_paddle.serving.serve_command import serve

    serve(args)


def _validate(args):
    from unimo2_paddle.config import describe_config

    print(describe_config(args.config, args.override))


def _convert(args):
    from unimo2_paddle.checkpoints.convert import convert

    print(convert(args.source, args.target, args.format, args.config))


def _inspect(args):
    from unimo2_paddle.checkpoints.convert import describe

    print(describe(args.path))


def _init(args):
    from unimo2_paddle.checkpoints.initialise import initialise

    print(initialise(args.target, config=args.config, roberta=args.roberta, vit=args.vit, seed=args.seed,
                     roberta_vocab=args.roberta_vocab, vocab_file=args.vocab, encoder_json=args.encoder_json))


def _status(args):
    from unimo2_paddle.training.status import show_status

    show_status(args.run, args.watch)


def _report(args):
    from unimo2_paddle.reports.command import report

    print(report(args))


def _compare(args):
    from unimo2_paddle.reports.command import compare

    print(compare(args))


def _zoo(args):
    from unimo2_paddle.checkpoints.zoo_command import zoo

    print(zoo(args))


def _download(args):
    from unimo2_paddle.checkpoints.zoo_command import download

    print(download(args))


def _features(args):
    from unimo2_paddle.data.region_command import run

    print(run(args))


def _augment(args):
    from unimo2_paddle.augment.command import augment

    augment(args)


def _reproduce(args):
    from unimo2_paddle.reproduction import describe, render_page

    print(render_page() if args.page else describe(args.paper, args.table), end="" if args.page else "\n")


def _completion(args):
    from unimo2_paddle.completion import completion_script

    print(completion_script(build_parser(), args.shell), end="")


def _plan(args):
    from unimo2_paddle.planning import Assumptions, describe

    print(describe(args.config, args.override, args.devices, Assumptions(args.tflops, args.utilisation, args.bandwidth, args.words)))


def _demo_data(args):
    from unimo2_paddle.data.demo import write_demo_data

    print(write_demo_data(args.out, size=args.size, seed=args.seed, world=args.world), flush=True)
    if not args.corpora_only:
        from unimo2_paddle.data.demo_tasks import write_demo_tasks

        print(write_demo_tasks(args.out))


def _demo(args):
    from unimo2_paddle.demo_run import run_demo

    run_demo(args.out, seed=args.seed)


_WITH_PADDLE = (_train, _eval, _plan, _predict, _export, _serve, _explain, _index, _search, _validate, _init, _demo)


def _add_config_arguments(parser):
    parser.add_argument("-c", "--config", required=True, help="run configuration (YAML), see run_configs/")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE",
                        help="override one entry, for example -o train.batch_size=8 (repeatable)")


def build_parser():
    """The argument parser of ``unimo2`` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="unimo2", description="UNIMO-2 on PaddlePaddle: pre-train, finetune, evaluate, convert.")
    parser.add_argument("--version", action="version", version=f"unimo2_paddle {unimo2_paddle.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command("train", _train, "Train what a run configuration describes (pre-training or a task).")
    _add_config_arguments(sub)
    sub.add_argument("--resume", default="none", metavar="auto|PATH|none",
                     help="continue from the newest complete checkpoint of the run (auto) or from PATH; default: none")
    sub = command("eval", _eval, "Evaluate a checkpoint with a task's evaluators and write the report.")
    _add_config_arguments(sub)
    add_predict_arguments(command("predict", _predict, "Predict from a checkpoint directory: pictures, texts or both in, JSON lines out."))
    add_explain_arguments(command("explain", _explain, "Show which grounded tokens a picture and a sentence share, and where they come from."))
    add_index_arguments(command("index", _index, "Index a folder of pictures (or a file of sentences) for search; only what is new is encoded."))
    add_search_arguments(command("search", _search, "Search an index by a sentence (or by a picture); the best are judged by the whole model."))
    add_export_arguments(command("export", _export, "Export a checkpoint to paddle.inference and ONNX, compared with the model."))
    add_serve_arguments(command("serve", _serve, "Serve models over HTTP: JSON API, API page, web page, health and metrics."))
    sub = command("validate", _validate, "Check a run configuration and print it resolved, or every error at once.")
    _add_config_arguments(sub)

    sub = command("plan", _plan, "Reckon operations, memory and communication of a pre-training step on so many devices.")
    _add_config_arguments(sub)
    sub.add_argument("--devices", type=int, default=1, metavar="N", help="devices that share the batches; default: 1")
    sub.add_argument("--words", type=int, default=24, metavar="N", help="tokens that captions are padded to; default: 24")
    sub.add_argument("--tflops", type=float, default=156.0, help="what a device reaches at best, 10^12 operations a second; default: 156 (an A100 in TF32)")
    sub.add_argument("--utilisation", type=float, default=0.35, metavar="SHARE", help="the share of it that a step reaches; default: 0.35")
    sub.add_argument("--bandwidth", type=float, default=100.0, metavar="GB/S", help="of a device in a ring; default: 100")

    sub = command("status", _status, "Show what a run is doing: progress, losses, speed, checkpoint, whether it is alive.")
    sub.add_argument("run", metavar="OUTPUT", help="output directory of the run, for example output/demo/pretrain")
    sub.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="show it again every so many seconds until the run ends; default: once")

    add_report_arguments(command("report", _report, "Write a run's report.html again: curves, expected and measured figures, examples, environment."))
    add_compare_arguments(command("compare", _compare, "Compare runs: keys that differ, figures, speed, and a page with their curves."))

    sub = command("convert", _convert, "Convert a checkpoint between the authors' directories, safetensors and pdparams.")
    sub.add_argument("--from", dest="source", required=True, metavar="PATH", help="checkpoint directory or file to read")
    sub.add_argument("--to", dest="target", required=True, metavar="DIR", help="directory to write (must not exist)")
    sub.add_argument("--format", choices=("released", "safetensors", "pdparams"), default="safetensors",
                     help="what to write; default: safetensors")
    sub.add_argument("--config", metavar="JSON", help="model config to store with the weights; default: the source's, or worked out from the shapes")
    sub = command("inspect", _inspect, "Print names, shapes, sizes and the fitting config of a checkpoint.")
    sub.add_argument("path", help="checkpoint directory or file")
    sub = command("init", _init, "Initialise a UNIMO-2 or UNIMO model from PaddleNLP RoBERTa (and PaddleClas ViT) weights.")
    sub.add_argument("--to", dest="target", required=True, metavar="DIR", help="directory to write (must not exist)")
    sub.add_argument("--config", required=True, help="model config (JSON) of the model to write")
    sub.add_argument("--roberta", metavar="FILE", help="RoBERTa weights of PaddleNLP (.pdparams or its directory)")
    sub.add_argument("--vit", metavar="FILE", help="ViT weights of PaddleClas (.pdparams)")
    sub.add_argument("--seed", type=int, default=1, help="seed of the parameters no source provides; default: 1")
    sub.add_argument("--roberta-vocab", metavar="JSON", help="RoBERTa's vocab.json, to match rows by piece instead of by order")
    sub.add_argument("--vocab", metavar="FILE", help="the authors' vocab.txt (with --roberta-vocab)")
    sub.add_argument("--encoder-json", metavar="FILE", help="the authors' encoder.json (with --roberta-vocab)")

    add_zoo_arguments(command("zoo", _zoo, "List and show released weights and data, or publish a checkpoint of yours."))
    add_download_arguments(command("download", _download, "Fetch weights or data of the zoo: resumed, checked, unpacked safely."))
    add_feature_arguments(command("features", _features, "Import detectors' region features into a memory-mapped store, or show a store."))
    add_augment_arguments(command("augment", _augment, "Rewrite captions and retrieve related pictures and texts for contrastive learning."))

    sub = command("reproduce", _reproduce, "Show the papers' result tables with the commands and the status of every row.")
    sub.add_argument("--table", type=int, metavar="N", help="number of the table; default: list the tables")
    sub.add_argument("--paper", choices=("unimo2", "unimo"), help="whose table; default: unimo2")
    sub.add_argument("--page", action="store_true", help="print docs/reproduction.md")

    sub = command("completion", _completion, "Print the completion script of a shell; bash: eval \"$(unimo2 completion bash)\".")
    sub.add_argument("shell", choices=("bash", "zsh", "fish"))

    sub = command("demo-data", _demo_data, "Write the generated coloured-shape corpora in the real file formats.")
    sub.add_argument("--out", required=True, metavar="DIR", help="directory to write (must not exist or be a demo directory)")
    sub.add_argument("--size", type=int, default=4000, metavar="N", help="number of training pairs; default: 4000")
    sub.add_argument("--seed", type=int, default=1, help="seed of the generator; default: 1")
    sub.add_argument("--world", default="plain", help="plain, or hard: three objects, similar pictures, unmentioned dots, more synonyms; default: plain")
    sub.add_argument("--corpora-only", action="store_true", help="leave out the data of the finetuning tasks")
    sub = command("demo", _demo, "Run the whole demo: data, pre-training, zero-shot retrieval.")
    sub.add_argument("--out", default="output/demo", metavar="DIR", help="output directory; default: output/demo")
    sub.add_argument("--seed", type=int, default=1, help="seed of data and training; default: 1")
    return parser


def main(argv=None):
    """Run one command; returns the process exit status."""
    args = build_parser().parse_args(argv)
    prepare_process()
    try:
        if args.function in _WITH_PADDLE:
            import_paddle()
        args.function(args)
    except UserInputError as error:
        print(f"unimo2 {args.command}: {error}", file=sys.stderr)
        return 2
    except Unimo2Error as error:
        print(f"unimo2 {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"unimo2 {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
