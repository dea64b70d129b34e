"""What every request of the service passes first, as ASGI middleware: its number, its limits, its line in the log, its place in the metrics."""
import asyncio
import json
import logging
import time
import uuid

from starlette.exceptions import HTTPException

logger = logging.getLogger("unimo2_paddle.serving")


def error_body(code, message, request_id=""):
    """The body of every error."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


class Limits:
    """Admits a request or answers it: too many at once 503, too large 413, too slow 504.

    Args:
        app: the ASGI application; settings: ``ServiceSettings``; metrics: ``Metrics``.
    """

    def __init__(self, app, settings, metrics):
        self.app, self.settings, self.metrics, self.pending = app, settings, metrics, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = _Request(scope, send, self.settings.max_bytes)
        counted = scope["method"] == "POST"  # what only tells about the service is always answered
        if request.declared > self.settings.max_bytes:
            await request.refuse(413, "too_large", request.too_large())
        elif counted and self.pending >= self.settings.max_pending:
            await request.refuse(503, "busy", f"{self.pending} requests are waiting already; try again", {"retry-after": "1"})
        else:
            self.pending += counted
            self.metrics.pending.set(self.pending)
            try:
                await self._handle(request, scope, receive)
            finally:
                self.pending -= counted
                self.metrics.pending.set(self.pending)
        self._note(scope, request)

    async def _handle(self, request, scope, receive):
        try:
            await asyncio.wait_for(self.app(scope, request.limited(receive), request.send), self.settings.timeout)
        except asyncio.TimeoutError:
            await request.refuse(504, "timeout", f"not answered within {self.settings.timeout:g} s")
        except Exception:
            logger.exception("request failed", extra={"fields": {"id": request.id}})
            await request.refuse(500, "internal", "an error of the service; its log has the details under this request's id")

    def _note(self, scope, request):
        seconds = time.monotonic() - request.began
        path = scope["route"].path if "route" in scope else "other"  # not what the client wrote: each would be a new series
        self.metrics.requests.labels(path, str(request.status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        logger.info("request", extra={"fields": {"id": request.id, "method": scope["method"], "path": scope["path"][:200], "status": request.status,
                                                 "ms": round(1000 * seconds, 1), **scope.get("state", {}).get("note", {})}})


class _Request:
    """One request: counts what comes in, remembers what goes out."""

    def __init__(self, scope, send, max_bytes):
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if given.isascii() and given.isprintable() and 0 < len(given) <= 64 else uuid.uuid4().hex[:16]
        length = headers.get(b"content-length", b"")
        self.declared = int(length) if length.isdigit() else 0
        self.out, self.max_bytes, self.began, self.status = send, max_bytes, time.monotonic(), 0
        scope.setdefault("state", {})["request_id"] = self.id

    def too_large(self):
        return f"the request has more than {self.max_bytes} bytes"

    def limited(self, receive):
        """``receive`` that ends with an error when the body is too large."""
        size = 0

        async def counting():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                raise HTTPException(413, self.too_large())  # what reads the body lets only these through
            return message

        return counting

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", self.id.encode())]}
        await self.out(message)

    async def refuse(self, status, code, message, headers=None):
        """Answer with an error, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps(error_body(code, message, self.id)).encode()
        pairs = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close", **(headers or {})}
        await self.send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in pairs.items()]})
        await self.send({"type": "http.response.body", "body": body})
