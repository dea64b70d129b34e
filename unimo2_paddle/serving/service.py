"""The HTTP service of ``unimo2 serve``: predictions of several models as JSON over HTTP, with an API page, health and metrics.

Pictures travel as base64 inside JSON; a string is never taken as a path. Every error is ``{"error": {"code", "message", "request_id"}}``.
"""
import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Dict, List, Optional

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

from unimo2_paddle import __version__
from unimo2_paddle.data.images import decode_image
from unimo2_paddle.errors import Unimo2Error, UserInputError
from unimo2_paddle.serving import results
from unimo2_paddle.serving.batching import Batcher, Stopped
from unimo2_paddle.serving.limits import Limits, error_body
from unimo2_paddle.serving.predictor import ALIASES
from unimo2_paddle.serving.web.page import Page, add_page, decode_upload

PATHS = {"captioning": "caption", "vqa": "vqa", "entailment": "entailment", "retrieval": "score", "imagenet": "classify", "seq2seq": "generate"}
CARDS = {"captioning": "caption", "vqa": "answer", "entailment": "entail"}  # task -> card of the web page
OWN_NAMES = ("search", "zeroshot", "models")
TEXTS = {"vqa": "the question", "entailment": "the hypothesis", "captioning": "object tags, as words"}
RESULTS = {"captioning": results.Captioned, "vqa": results.Answered, "entailment": results.Classified, "imagenet": results.Classified,
           "retrieval": results.Matched, "seq2seq": results.Written}
LONGEST_TEXT, MOST_CLASSES, MOST_TEMPLATES, MOST_RESULTS = 20000, 200, 20, 100
STATUS = {400: "invalid_input", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 503: "stopping"}


@dataclass
class ServiceSettings:
    """``max_batch``, ``max_wait`` (seconds): see ``Batcher``. ``max_pending``: requests at once, more get 503. ``timeout``: seconds of one request.
    ``max_bytes``: of a request's body; ``max_pixels``: of a picture; ``decoders``: threads that decode pictures."""

    max_batch: int = 16
    max_wait: float = 0.005
    max_pending: int = 64
    timeout: float = 30.0
    max_bytes: int = 12 << 20
    max_pixels: int = 1 << 25
    decoders: int = 2

    def __post_init__(self):
        lowest = {"max_batch": 1, "max_wait": 0, "max_pending": 1, "timeout": 0.001, "max_bytes": 1024, "max_pixels": 1, "decoders": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise UserInputError(f"--{name.replace('_', '-')} must be at least {low:g}, is {getattr(self, name):g}")


class Metrics:
    """What ``/metrics`` tells, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = Counter("unimo2_requests", "Requests by route and status", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("unimo2_request_seconds", "Seconds from a request to its answer", ["path"], registry=self.registry)
        self.pending = Gauge("unimo2_pending_requests", "Requests that are being answered", registry=self.registry)
        self.batch = Histogram("unimo2_batch_requests", "Requests answered by one forward", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry)
        self.computed = Histogram("unimo2_forward_seconds", "Seconds of one forward", ["model"], registry=self.registry)


class Models:
    """The models of a service, each with its batcher.

    Args:
        predictors: name -> ``Predictor``, the name being the route below ``/v1/``; settings: ``ServiceSettings``.
        index: ``RetrievalIndex`` for search, of the weights of one of the predictors, or ``None``.

    Raises:
        UserInputError: no model, an unusable name, or an index of another model.
    """

    def __init__(self, predictors, settings, index=None):
        if not predictors:
            raise UserInputError("give at least one model")
        for name in predictors:
            if name in OWN_NAMES or not name.replace("-", "_").isidentifier():
                raise UserInputError(f"model name {name!r}: use letters, digits, - and _, and none of {', '.join(OWN_NAMES)}")
        self.predictors, self.index, self.compute, self.metrics = predictors, index, threading.Lock(), Metrics()
        pairs = [one for one in predictors.values() if one.task == "retrieval" and not one.kind.reads_regions]
        self.pairs = pairs[0] if pairs else None
        if index is not None:
            if self.pairs is None:
                raise UserInputError(f"{index.directory}: searching needs a UNIMO-2 model for pairs; add its directory to --model")
            fitting = [one for one in pairs if one.kind.fingerprint() == index.model]
            self.pairs = fitting[0] if fitting else self.pairs
            index.check_model(self.pairs)
        self.batchers = {name: Batcher(self._runner(name), settings.max_batch, settings.max_wait, self.compute, name) for name in predictors}

    def _runner(self, name):
        predictor = self.predictors[name]

        def run(requests):
            with self.metrics.computed.labels(name).time():
                found = predictor.run(requests)
            self.metrics.batch.labels(name).observe(len(requests))
            return found

        return run

    def close(self):
        """Finish what is queued."""
        for batcher in self.batchers.values():
            batcher.close(timeout=30)


def model_name(predictor):
    """The route of a model that was given no name: its task's, of GLUE its data set's."""
    return predictor.about["dataset"] if predictor.task == "glue" else PATHS[predictor.task]


def request_type(name, predictor):
    """What a request to a model holds, as a pydantic type."""
    fields = {}
    for field in (*predictor.kind.needs, *predictor.kind.optional):
        if field == "image":
            told = "name of a picture in the store of region features" if predictor.kind.reads_regions else "base64 of a picture file"
            limits = {"max_length": 256} if predictor.kind.reads_regions else {}
            names = ["image"]
        else:
            told, limits = TEXTS.get(predictor.task, "a text") if field == "text" else "the second text", {"max_length": LONGEST_TEXT}
            names = [field] + [alias for alias, meant in ALIASES.items() if meant == field]
        needed = field in predictor.kind.needs
        fields[field] = (str if needed else Optional[str], Field(... if needed else None, description=told, validation_alias=AliasChoices(*names), **limits))
    return create_model(f"{name.title().replace('-', '').replace('_', '')}Request", __config__=ConfigDict(extra="forbid"), **fields)


class SearchRequest(BaseModel):
    """A sentence for an index of pictures, a picture for an index of sentences."""

    model_config = ConfigDict(extra="forbid")
    text: Optional[str] = Field(None, max_length=LONGEST_TEXT)
    image: Optional[str] = Field(None, description="base64 of a picture file")
    top: int = Field(5, ge=1, le=MOST_RESULTS)
    rerank: int = Field(32, ge=0, le=MOST_RESULTS, description="items that the whole model judges; 0: contrastive scores alone")


class FoundItems(BaseModel):
    items: int = Field(description="size of the index")
    results: List[results.Found]


class ZeroShotRequest(BaseModel):
    """A picture, and the classes it may belong to."""

    model_config = ConfigDict(extra="forbid")
    image: str = Field(description="base64 of a picture file")
    classes: List[str] = Field(min_length=2, max_length=MOST_CLASSES)
    templates: List[str] = Field(["a photo of a {}."], min_length=1, max_length=MOST_TEMPLATES, description="sentences with {} for the class")


class ErrorDetail(BaseModel):
    code: str
    message: str
    request_id: str


class ErrorAnswer(BaseModel):
    error: ErrorDetail


ERRORS: Dict = {status: {"model": ErrorAnswer} for status in (400, 413, 503, 504)}


def create_app(predictors, settings=None, index=None):
    """The FastAPI application.

    Args:
        predictors: name -> ``Predictor``; settings: ``ServiceSettings``; index: ``RetrievalIndex`` or ``None``.

    Raises:
        UserInputError: see :class:`Models`.
    """
    settings = settings or ServiceSettings()
    models = Models(predictors, settings, index)
    decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decode")

    @asynccontextmanager
    async def lifespan(app):
        yield
        await run_in_threadpool(models.close)
        decoders.shutdown()

    app = FastAPIOffline(title="unimo2 serve", version=__version__, lifespan=lifespan, redoc_url=None, responses=ERRORS,
                         description="Predictions of UNIMO-2 and UNIMO. Pictures are base64 inside JSON.")
    app.state.models, app.state.settings = models, settings
    _add_errors(app)
    for name, predictor in predictors.items():
        _add_model(app, name, predictor, models.batchers[name], decoders, settings)
    if models.pairs is not None:
        _add_zero_shot(app, models, settings)
    _add_search(app, models, settings)
    _add_status(app, models)
    # the page sends a picture and at most one text; of several models of a task the first is used
    paths = {CARDS[one.task]: f"v1/{name}" for name, one in reversed(list(predictors.items()))
             if one.task in CARDS and not one.kind.reads_regions and not (one.task == "captioning" and "text" in one.kind.needs)}
    add_page(app, Page(paths, models.pairs, index if index is not None and index.kind == "images" else None, settings.max_bytes * 3 // 4 - 4096,
                       lock=models.compute))
    app.add_middleware(Limits, settings=settings, metrics=models.metrics)
    return app


def _add_model(app, name, predictor, batcher, decoders, settings):
    takes = request_type(name, predictor)

    def prepare(given):
        values = {field: value for field, value in given.model_dump().items() if value is not None}
        if "image" in values and not predictor.kind.reads_regions:
            values["image"] = _picture(values["image"], settings)
        return predictor.check(values, name)

    async def predict(request: Request, given: takes):
        prepared = await asyncio.get_running_loop().run_in_executor(decoders, prepare, given)
        answer = await asyncio.wrap_future(batcher.submit(prepared))
        request.state.note = {"model": name, "batch": answer.batch, "waited_ms": round(1000 * answer.waited, 1), "forward_ms": round(1000 * answer.computed, 1)}
        return JSONResponse(answer.result.to_json())

    kind = results.Classified if predictor.task == "glue" and predictor.about.get("labels") else RESULTS.get(predictor.task, results.Scored)
    app.post(f"/v1/{name}", response_model=kind, tags=["predictions"], summary=f"{predictor.task}: {', '.join(predictor.kind.needs)}")(predict)


def _add_zero_shot(app, models, settings):
    def classify(given):
        picture = _picture(given.image, settings)
        with models.compute:
            return models.pairs.classify([picture], given.classes, given.templates)[0].to_json()

    @app.post("/v1/zeroshot", response_model=results.Classified, tags=["predictions"], summary="classes that no model was trained for")
    async def zeroshot(given: ZeroShotRequest):
        return JSONResponse(await run_in_threadpool(classify, given))


def _add_search(app, models, settings):
    def search(given):
        index = models.index
        if index is None:
            raise UserInputError("this service has no index; start it with --index")
        wanted, other = ("text", "image") if index.kind == "images" else ("image", "text")
        if getattr(given, wanted) is None or getattr(given, other) is not None:
            raise UserInputError(f"the index holds {index.kind}: search it with {wanted} alone")
        query = given.text if wanted == "text" else _picture(given.image, settings)
        with models.compute:
            found = index.search(models.pairs, query, given.top, given.rerank)
        names = [index.items[one.place] for one in found]  # relative to the index's folder: nobody has to know where that is
        return {"items": len(index), "results": [{**one.to_json(), "item": name} for one, name in zip(found, names)]}

    @app.post("/v1/search", response_model=FoundItems, tags=["predictions"], summary="pictures by a sentence, or sentences by a picture")
    async def search_route(given: SearchRequest):
        return JSONResponse(await run_in_threadpool(search, given))


def _add_status(app, models):
    @app.get("/health", tags=["service"], summary="whether the service takes requests")
    async def health():
        stopping = any(batcher.closed for batcher in models.batchers.values())
        alive = all(batcher.thread.is_alive() for batcher in models.batchers.values())
        told = "stopping" if stopping else "ok" if alive else "failed"
        return JSONResponse({"status": told, "models": list(models.predictors)}, 200 if told == "ok" else 503)

    @app.get("/v1/models", tags=["service"], summary="what is served")
    async def listed():
        return {"models": [{"name": name, "path": f"/v1/{name}", "task": one.task, "needs": list(one.kind.needs), "optional": list(one.kind.optional),
                            "engine": one.kind.programs.engine, "fingerprint": one.kind.fingerprint()} for name, one in models.predictors.items()],
                "index": None if models.index is None else {"kind": models.index.kind, "items": len(models.index)}}

    @app.get("/metrics", tags=["service"], summary="metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics():
        return PlainTextResponse(generate_latest(models.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def _picture(text, settings):
    """The decoded picture of a base64 text."""
    return decode_image(decode_upload(text, settings.max_bytes), max_pixels=settings.max_pixels, name="image")


def _add_errors(app: FastAPI):
    """Every error as :func:`error_body`."""

    def answer(request, status, message, headers=None):
        return JSONResponse(error_body(STATUS.get(status, "error"), message, request.state.request_id), status, headers)

    @app.exception_handler(Unimo2Error)
    async def known(request, error):
        if isinstance(error, Stopped):
            return answer(request, 503, str(error), {"retry-after": "1"})
        if isinstance(error, UserInputError):
            return answer(request, 400, str(error))
        raise error

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        told = [f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg']}" for one in error.errors()]
        return answer(request, 400, "; ".join(told))

    @app.exception_handler(HTTPException)
    async def http(request, error):
        message = str(error.detail)
        if error.status_code == 404 and request.url.path.startswith("/v1/"):
            message = f"no {request.url.path}; there are {', '.join(f'/v1/{name}' for name in request.app.state.models.predictors)}"
        return answer(request, error.status_code, message, error.headers)
