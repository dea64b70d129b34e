"""What the web page asks for besides predictions: what this server can do, grounded tokens, search, pictures of the index.

``Page`` knows no web framework; :func:`add_page` puts it and the static files into a FastAPI application.
"""
import base64
import binascii
import mimetypes
import os
import threading

from unimo2_paddle.errors import ImageError, Unimo2Error, UserInputError
from unimo2_paddle.serving.codes import grounded_model
from unimo2_paddle.serving.explain import explain
from unimo2_paddle.serving.explain_report import summary
from unimo2_paddle.serving.index import require_retrieval

STATIC = os.path.join(os.path.dirname(os.path.abspath(__file__)), "static")
CARDS = {"caption": "captioning", "answer": "vqa", "entail": "entailment", "explain": None, "search": None}  # card of the page -> task of its model
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
}
EXPLAINED, RESULTS, RERANK, THUMBNAIL = 8, 12, 20, 240


class Page:
    """The page's own part of a server.

    Args:
        paths: for every card that other parts of the server answer (``caption``, ``answer``, ``entail``) the path it posts to, without leading slash.
        pairs: ``Predictor`` of a checkpoint for pairs (not an exported one), for grounded tokens and search; index: ``RetrievalIndex`` of pictures
            made with its weights.
        image_bytes: largest picture file that the server takes; lock: held while the model computes.

    Raises:
        UserInputError: the index is not of pictures, or of another model.
    """

    def __init__(self, paths=None, pairs=None, index=None, image_bytes=10 << 20, lock=None):
        self.paths, self.pairs, self.index, self.image_bytes, self._lock = dict(paths or {}), pairs, index, image_bytes, lock or threading.Lock()
        if index is not None:
            if pairs is None or index.kind != "images":
                raise UserInputError(f"{index.directory}: searching needs a model for pairs, and an index of pictures")
            index.check_model(pairs)
        elif pairs is not None:
            require_retrieval(pairs)

    def about(self):
        """What the page needs to know at its start."""
        tasks = {card: {"available": True, "path": self.paths[card]} if card in self.paths else
                 {"available": False, "reason": f"start the server with a model for {task}"} for card, task in CARDS.items() if task}
        tasks["explain"] = self._explains()
        tasks["search"] = {"available": self.index is not None, "path": "api/search", "reason": "start the server with --index and the model it was made with"}
        able = [card for card, told in tasks.items() if told["available"]]
        shown = f"; {len(self.index):,} pictures to search" if self.index is not None else ""
        return {"title": f"{len(able)} of {len(tasks)} skills available{shown}", "tasks": tasks, "limits": {"image_bytes": self.image_bytes}}

    def _explains(self):
        told = {"available": False, "path": "api/explain", "reason": "start the server with the checkpoint of a model for pairs"}
        try:
            return {**told, "available": self.pairs is not None and bool(grounded_model(self.pairs))}
        except UserInputError:
            what = "is an exported one, which lacks it; name its checkpoint" if self.pairs.exported else "has no grounded dictionary"
            return {**told, "reason": f"this server's model for pairs {what}"}

    def explain(self, image, text):
        """Grounded tokens of a picture (bytes of a file) and a sentence, or of one of them, as plain Python."""
        with self._lock:
            found = explain(self.pairs, image, text or None, tokens=EXPLAINED)
        return {**found.to_json(), "summary": summary(found)}

    def search(self, text, top=RESULTS, rerank=RERANK):
        """The best pictures for a sentence."""
        if not text or not text.strip():
            raise UserInputError("search: give a sentence")
        with self._lock:
            found = self.index.search(self.pairs, text, top, rerank)
        return {"items": len(self.index), "results": [{**row.to_json(), "item": os.path.relpath(row.item, self.index.root)} for row in found]}

    def picture(self, place):
        """(bytes, content type) of a picture of the index; a file that browsers do not show becomes a JPEG.

        Raises:
            UserInputError: there is no such picture; ImageError: its file is gone, or larger than the server takes.
        """
        self._require_index()
        if not 0 <= place < len(self.index):
            raise UserInputError(f"no picture number {place}")
        path = self.index.path(place)
        kind = mimetypes.guess_type(path)[0]
        if kind not in ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"):
            return self.index.thumbnail(place, 1600), "image/jpeg"
        try:
            with open(path, "rb") as file:
                data = file.read(self.image_bytes + 1)
        except OSError as error:
            raise ImageError(f"{self.index.items[place]}: cannot be read: {error.strerror}") from None
        return (data, kind) if len(data) <= self.image_bytes else (self.index.thumbnail(place, 1600), "image/jpeg")

    def thumbnail(self, place):
        """JPEG bytes of a small picture of the index."""
        self._require_index()
        return self.index.thumbnail(place, THUMBNAIL)

    def _require_index(self):
        if self.index is None:
            raise UserInputError("this server has no index")


def decode_upload(text, limit):
    """The bytes of a base64 text.

    Raises:
        UserInputError: it is none, or longer than ``limit`` bytes.
    """
    if not isinstance(text, str) or len(text) > limit * 4 // 3 + 4:
        raise UserInputError(f"image: base64 of at most {limit} bytes is wanted")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserInputError("image: not base64") from None


def static_file(name):
    """(bytes, content type) of a file of the page, or ``None``."""
    if name not in os.listdir(STATIC):
        return None
    with open(os.path.join(STATIC, name), "rb") as file:
        kind = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}[os.path.splitext(name)[1]]
        return file.read(), kind


def add_page(app, page):
    """Let a FastAPI application serve the page at ``/`` and what it asks for under ``/api/`` and ``/static/``."""
    from fastapi import Body
    from fastapi.responses import JSONResponse, Response

    def answer(make):
        try:
            told = make()
        except UserInputError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        except Unimo2Error as error:
            return JSONResponse({"error": {"message": str(error)}}, 500)
        return told if isinstance(told, Response) else JSONResponse(told)

    def file(name):
        found = static_file(name)
        return Response(found[0], media_type=found[1], headers={**HEADERS, "Cache-Control": "no-cache"}) if found else Response(status_code=404)

    def index_picture(make, place):
        def respond():
            data, kind = make(place)
            return Response(data, media_type=kind, headers={"X-Content-Type-Options": "nosniff", "Cache-Control": "max-age=60"})

        return answer(respond)

    @app.get("/", include_in_schema=False)
    def root():
        return file("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str):
        return file(name)

    @app.get("/api/about", tags=["page"])
    def about():
        return answer(page.about)

    @app.post("/api/explain", tags=["page"])
    def explain_route(image: str = Body(None), text: str = Body(None)):
        return answer(lambda: _explained(page, image, text))

    @app.post("/api/search", tags=["page"])
    def search_route(text: str = Body(..., embed=True)):
        return answer(lambda: _searched(page, text))

    @app.get("/api/thumbnails/{place}", tags=["page"])
    def thumbnail(place: int):
        return index_picture(lambda n: (page.thumbnail(n), "image/jpeg"), place)

    @app.get("/api/pictures/{place}", tags=["page"])
    def picture(place: int):
        return index_picture(page.picture, place)


def _explained(page, image, text):
    told = page.about()["tasks"]["explain"]
    if not told["available"]:
        raise UserInputError(f"no grounded tokens here: {told['reason']}")
    return page.explain(None if image is None else decode_upload(image, page.image_bytes), text)


def _searched(page, text):
    if page.index is None:
        raise UserInputError(f"no search here: {page.about()['tasks']['search']['reason']}")
    return page.search(text)
