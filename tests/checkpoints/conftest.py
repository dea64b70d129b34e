"""A file server on 127.0.0.1 that misbehaves on request."""
import contextlib
import http.server
import threading
import time

import pytest


class Served:
    """One file and how it is served; ``requests`` are the headers of every request for it.

    behaviours: ``ranges`` (answer Range with 206), ``tag`` (ETag), ``cut_after`` (bytes after which each of the first ``cuts`` answers ends),
    ``statuses`` (sent instead of the file, one per request), ``redirect`` (Location), ``length`` (False: none is sent; a number: that one),
    ``pause`` (seconds between pieces), ``range_start`` (a wrong one).
    """

    def __init__(self, content, **behaviours):
        self.content, self.requests = content, []
        self.settings = {"ranges": True, "tag": '"1"', "cut_after": None, "cuts": 10 ** 6, "statuses": [], "redirect": None, "length": True,
                         "pause": 0.0, "range_start": None, **behaviours}

    def __getattr__(self, name):
        return self.settings[name]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        served = self.server.files.get(self.path)
        if served is None:
            return self.send_error(404)
        served.requests.append(dict(self.headers))
        if served.statuses:
            self.send_response(served.statuses.pop(0))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if served.redirect:
            self.send_response(302)
            self.send_header("Location", served.redirect)
            return self.end_headers()
        start, wanted = 0, self.headers.get("Range")
        if wanted and served.ranges and self.headers.get("If-Range") in (None, served.tag):
            start = int(wanted[len("bytes="):-1])
            if start >= len(served.content):
                return self.send_error(416)
            self.send_response(206)
            first = start if served.range_start is None else served.range_start
            self.send_header("Content-Range", f"bytes {first}-{len(served.content) - 1}/{len(served.content)}")
        else:
            self.send_response(200)
        if served.tag:
            self.send_header("ETag", served.tag)
        if served.length is not False:
            self.send_header("Content-Length", str(len(served.content) - start if served.length is True else served.length))
        self.end_headers()
        body = served.content[start:]
        if served.cut_after is not None and served.cuts > 0:
            served.settings["cuts"] -= 1
            body = body[:served.cut_after]
        step = 1 << 16 if not served.pause else max(1, len(body) // 4)
        with contextlib.suppress(ConnectionError):  # the client may have had enough
            for begin in range(0, len(body), step):
                time.sleep(served.pause)
                self.wfile.write(body[begin:begin + step])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """``server.files[path] = Served(...)``; ``server.url`` is its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.daemon_threads = True
        running.files, running.url = {}, f"http://127.0.0.1:{running.server_address[1]}"
        running.serve = lambda path, content, **behaviours: running.files.setdefault(path, Served(content, **behaviours))
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
