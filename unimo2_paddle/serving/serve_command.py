"""``unimo2 serve``: load the models, answer over HTTP until SIGTERM or Ctrl-C, finish what was asked."""
import contextlib
import json
import logging
import os
import signal
import sys
import time

from unimo2_paddle.errors import UserInputError


def add_arguments(parser):
    """The command's arguments."""
    parser.add_argument("-m", "--model", action="append", required=True, metavar="[NAME=]DIR",
                        help="exported model or checkpoint directory, served at /v1/NAME (repeatable); default name: its task")
    parser.add_argument("--index", metavar="DIR", help="index of unimo2 index, for search with the model for pairs it was made with")
    parser.add_argument("--regions", metavar="DIR", help="store of region features, for models of UNIMO")
    parser.add_argument("--engine", choices=("paddle", "onnx"), default="paddle", help="what runs exported models; default: paddle")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one; default: 8000")
    parser.add_argument("--max-batch", type=int, default=16, help="requests per forward; default: 16")
    parser.add_argument("--max-wait", type=float, default=5.0, metavar="MS", help="milliseconds that a request waits for others; default: 5")
    parser.add_argument("--max-pending", type=int, default=64, help="requests at once, more get status 503; default: 64")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds of one request; default: 30")
    parser.add_argument("--max-bytes", type=int, default=12 << 20, help="largest request body; default: 12582912")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds for open requests when the service is stopped; default: 30")


def serve(args):
    """Run the command with its parsed arguments until it is stopped.

    Raises:
        UserInputError: a package is missing, or arguments are wrong.
    """
    try:
        import uvicorn

        from unimo2_paddle.serving.service import ServiceSettings, create_app
    except ImportError as error:
        raise UserInputError(f"{error.name} is not installed; pip install 'unimo2_paddle[serve]'") from None
    settings = ServiceSettings(args.max_batch, args.max_wait / 1000.0, args.max_pending, args.timeout, args.max_bytes)
    if not 0 <= args.port < 65536:
        raise UserInputError(f"--port must be 0 to 65535, is {args.port}")
    index = None
    if args.index:
        from unimo2_paddle.serving.index import RetrievalIndex

        index = RetrievalIndex.load(args.index)
    log_as_json()
    predictors = load_models(args.model, args.regions, args.engine)
    app = create_app(predictors, settings, index)
    config = uvicorn.Config(app, host=args.host, port=args.port, log_config=None, access_log=False, timeout_graceful_shutdown=args.grace,
                            limit_concurrency=None, server_header=False)
    listening = _listen(config)
    host, port = listening.getsockname()[:2]
    _note("serving", url=f"http://{host}:{port}/", api=f"http://{host}:{port}/docs", models=list(predictors), pid=os.getpid())
    _server(uvicorn)(config).run(sockets=[listening])
    _note("stopped")


def load_models(given, regions=None, engine="paddle"):
    """name -> ``Predictor`` of ``[NAME=]DIR`` texts, each warmed up.

    Raises:
        UserInputError: two models of one name, or a directory that is no model.
    """
    from unimo2_paddle.serving.predictor import Predictor
    from unimo2_paddle.serving.service import model_name

    predictors = {}
    for text in given:
        name, _, directory = text.rpartition("=") if not os.path.exists(text) else ("", "", text)
        predictor = Predictor(directory, engine=engine)
        if predictor.kind.reads_regions:
            predictor = Predictor(directory, regions=regions, engine=engine)
            if regions is None:
                raise UserInputError(f"{directory}: a model of UNIMO reads region features; give their store with --regions")
        name = name or model_name(predictor)
        if name in predictors:
            raise UserInputError(f"two models are called {name} ({predictors[name].directory} and {directory}); name one of them: --model NAME={directory}")
        began = time.monotonic()
        warm_up(predictor)
        _note("loaded", model=name, task=predictor.task, directory=directory, engine=predictor.kind.programs.engine,
              warm_up_s=round(time.monotonic() - began, 2))
        predictors[name] = predictor
    return predictors


def warm_up(predictor):
    """Predict once, so that the first request does not pay for what happens only once."""
    import numpy as np

    kind = predictor.kind
    picture = next(iter(kind.regions.store)) if kind.reads_regions else np.zeros([8, 8, 3], "uint8")
    predictor(**{field: picture if field == "image" else "a" for field in kind.needs})


def log_as_json():
    """One JSON object per line on standard output, from everything that logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING
    logging.getLogger("unimo2_paddle.serving").setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    def format(self, record):
        told = {"time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z", "level": record.levelname.lower(),
                "event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def _note(event, **fields):
    logging.getLogger("unimo2_paddle.serving").info(event, extra={"fields": fields})


def _listen(config):
    """The bound socket; ``uvicorn`` would end the process where the address is taken."""
    import socket

    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # with the protocol named asyncio turns Nagle's algorithm off for every connection; else an answer's second part waits 40 ms for an ACK
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
        listening.listen(config.backlog)  # from here on clients wait instead of being refused
    except OSError as error:
        listening.close()
        raise UserInputError(f"--host {config.host} --port {config.port}: cannot listen there ({error.strerror}); choose another port") from None
    return listening


def _server(uvicorn):
    class Server(uvicorn.Server):
        """Stops on SIGTERM and Ctrl-C like its parent, but as a success: the parent raises the signal again when all is done."""

        @contextlib.contextmanager
        def capture_signals(self):
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig, frame):
            _note("stopping", signal=signal.Signals(sig).name)
            super().handle_exit(sig, frame)

    return Server
