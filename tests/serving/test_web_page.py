"""The web page in a real browser: what it sends and shows, its states, its keyboard and its layout; before a stand-in with fixed answers and the service."""
import base64
import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from unimo2_paddle import Predictor
from unimo2_paddle.serving.indexing import update_index
from unimo2_paddle.serving.web.page import HEADERS, STATIC

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-test.txt)")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
PATIENCE = 60000  # milliseconds: the machine may be shared
CARDS = ("caption", "answer", "entail", "explain", "search")
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}


def token(number, origin, peak):
    patches = [[0.0, 0.1], [0.2, 0.1]]
    patches[peak // 2][peak % 2] = 0.9
    return {"id": number, "rank": 1, "origin": origin, "image_share": 0.25, "text_share": 0.5, "patches": patches, "words": [0.1, 0.7, -0.2]}


ANSWERS = {
    "caption": {"caption": "a <b>red</b> ring", "score": -1.0, "others": ["a ring"]},
    "answer": {"answer": "red", "probability": 0.75, "candidates": {"red": 0.75, "blue": 0.1}},
    "entail": {"label": "entailment", "probability": 0.9, "probabilities": {"entailment": 0.9, "neutral": 0.1}},
    "explain": {"summary": ["2 grounded tokens of 32 codes."], "words": ["a", "ring", "(end)"], "tokens": [token(7, "both", 3), token(30, "image", 1)]},
    "search": {"items": 2, "results": [{"item": "folder/one.jpg", "score": 2.5, "contrastive": 1.0, "place": 1},
                                       {"item": "folder/two.jpg", "score": 1.5, "contrastive": 1.0, "place": 0}]},
}


class StandIn:
    """What the stand-in server answers, changed by tests, and what it was asked."""

    def __init__(self, picture):
        self.picture, self.asked, self.failures, self.gate = picture, [], {}, threading.Event()
        self.gate.set()
        self.about = {"title": "stand-in", "limits": {"image_bytes": 1 << 20}, "tasks": {name: {"available": True, "path": f"api/{name}"} for name in CARDS}}

    def answer(self, method, path, body):
        """(status, content type, bytes, headers)."""
        name = path.rsplit("/", 1)[-1]
        if path.startswith(("/api/thumbnails/", "/api/pictures/")):
            return 200, "image/jpeg", self.picture, {}
        if path == "/api/about":
            return 200, "application/json", json.dumps(self.about).encode(), {}
        if method == "POST" and path.startswith("/api/"):
            self.asked.append((name, body))
            self.gate.wait(60)
            status, told, headers = self.failures.get(name, (200, ANSWERS[name], {}))
            return status, "application/json", json.dumps(told).encode(), headers
        file = Path(STATIC) / ("index.html" if path == "/" else path.replace("/static/", "", 1).lstrip("/"))
        return (200, TYPES[file.suffix], file.read_bytes(), HEADERS) if file.is_file() else (404, "text/plain", b"", {})


@pytest.fixture
def server():
    picture = cv2.imencode(".jpg", np.full([40, 60, 3], 90, "uint8"))[1].tobytes()
    stand_in = StandIn(picture)

    class Handler(BaseHTTPRequestHandler):
        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, kind, content, headers = stand_in.answer(self.command, self.path, json.loads(body) if body else None)
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = respond

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    stand_in.url, stand_in.http = f"http://127.0.0.1:{http.server_address[1]}/", http
    yield stand_in
    stand_in.gate.set()
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"], timeout=3 * PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, open; a request that leaves the server, or an error in the page, fails the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong, requests = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url)
    sync_api.expect(page.locator("#server")).to_have_text("stand-in")
    yield page
    context.close()
    assert not wrong and not [url for url in requests if not url.startswith((server.url, "data:", "blob:"))]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "mine.png"
    cv2.imwrite(str(path), np.dstack([np.full([30, 50], 200), np.zeros([30, 50]), np.zeros([30, 50])]).astype("uint8"))
    return path


def choose(page, path):
    page.set_input_files("#picture-input", str(path))
    sync_api.expect(page.locator("#picture-name")).to_have_text(path.name)


def result(page, card):
    return page.locator(f"#{card} .result")


def test_every_card_sends_the_picture_and_shows_the_answer(page, server, picture):
    sync_api.expect(page.locator("#caption button")).to_be_disabled()
    choose(page, picture)
    page.click("#caption button")
    sync_api.expect(result(page, "caption")).to_contain_text("a <b>red</b> ring")
    page.fill("#answer input", "What color is it?")
    page.press("#answer input", "Enter")
    sync_api.expect(result(page, "answer")).to_contain_text("75.0 %")
    page.fill("#entail input", "There is a ring.")
    page.click("#entail button")
    sync_api.expect(result(page, "entail")).to_contain_text("entailment")
    assert [name for name, _ in server.asked] == ["caption", "answer", "entail"]
    assert all(base64.b64decode(body["image"]) == picture.read_bytes() for _, body in server.asked)
    assert server.asked[1][1]["text"] == "What color is it?" and "text" not in server.asked[0][1]


def test_heat_maps_are_chosen_with_the_arrow_keys(page, picture):
    choose(page, picture)
    page.fill("#explain input", "a ring")
    page.click("#explain button")
    heat = page.locator("#heat")
    sync_api.expect(heat).to_be_visible()
    assert "token 7 over 2 by 2 patches; most similar: row 2, column 2" in heat.get_attribute("aria-label")
    sync_api.expect(page.locator(".near canvas")).to_be_hidden()
    over, under = heat.bounding_box(), page.locator("#preview").bounding_box()
    assert over == pytest.approx(under, abs=1)
    pixels = heat.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 2, 2).data]")
    brightness = [sum(pixels[4 * n: 4 * n + 3]) for n in range(4)]
    assert brightness.index(max(brightness)) == 3 and brightness.index(min(brightness)) == 0
    page.focus("#explain input[type=radio]")
    page.keyboard.press("ArrowRight")
    assert "token 30" in heat.get_attribute("aria-label") and "row 1, column 2" in heat.get_attribute("aria-label")
    page.keyboard.press("ArrowRight")
    sync_api.expect(heat).to_be_hidden()


def wait_for_thumbnails(page, count):
    """Ask again and again: Playwright's wait_for_function needs the eval that the page's own policy forbids."""
    loaded = "[...document.querySelectorAll('.found img')].filter(image => (image.loading = 'eager', image.naturalWidth > 0)).length"
    until = time.monotonic() + PATIENCE / 1000
    while page.evaluate(loaded) != count:
        assert time.monotonic() < until, "the thumbnails were not loaded"
        page.wait_for_timeout(50)


def test_a_found_picture_becomes_the_picture(page, server):
    page.fill("#search input", "a ring")
    page.press("#search input", "Enter")
    sync_api.expect(page.locator(".found li")).to_have_count(2)
    wait_for_thumbnails(page, 2)
    page.click(".found li:nth-child(2) button")
    sync_api.expect(page.locator("#picture-name")).to_have_text("two.jpg")
    page.click("#caption button")
    sync_api.expect(result(page, "caption")).to_contain_text("ring")
    assert base64.b64decode(server.asked[-1][1]["image"]) == server.picture


def test_everything_can_be_reached_and_used_by_keyboard(page, picture):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "picture-input"
    choose(page, picture)
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("[document.activeElement.closest('form')?.id, document.activeElement.tagName].join(' ')"))
    assert reached == ["caption BUTTON", "answer INPUT", "answer BUTTON", "entail INPUT", "entail BUTTON", "explain INPUT", "explain BUTTON",
                       "search INPUT", "search BUTTON"]
    page.focus("#caption button")
    page.keyboard.press("Enter")
    sync_api.expect(result(page, "caption")).to_contain_text("ring")


def test_a_dropped_picture_is_read(page, picture):
    data = base64.b64encode(picture.read_bytes()).decode()
    transfer = page.evaluate_handle("""data => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "dropped.png", {type: "image/png"}));
        return transfer;
    }""", data)
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    sync_api.expect(page.locator("#picture-name")).to_have_text("dropped.png")


def test_what_the_server_cannot_do_is_said_and_switched_off(browser, server):
    server.about["tasks"].update(answer={"available": False, "reason": "start the server with a VQA model"}, search={"available": False})
    page = browser.new_page()
    page.goto(server.url, timeout=PATIENCE)
    sync_api.expect(result(page, "answer")).to_have_text("Not available: start the server with a VQA model.")
    sync_api.expect(result(page, "search")).to_contain_text("has no model for it")
    sync_api.expect(page.locator("#answer input")).to_be_disabled()
    sync_api.expect(page.locator("#search button")).to_be_disabled()
    page.close()


def test_errors_of_the_server_are_shown_and_the_card_works_again(page, server, picture):
    choose(page, picture)
    for failure, told in (((400, {"error": {"message": "the picture is damaged"}}, {}), "the picture is damaged (400)"),
                          ((400, {"detail": "no such thing"}, {}), "no such thing (400)"),
                          ((503, {"detail": "full"}, {"Retry-After": "3"}), "The server is busy; try again in 3 s.")):
        server.failures["caption"] = failure
        page.click("#caption button")
        sync_api.expect(page.locator("#caption .error")).to_have_text(told)
        sync_api.expect(page.locator("#caption button")).to_be_enabled()
    server.http.shutdown()
    server.http.server_close()
    page.click("#entail button")
    assert not page.locator("#entail .error").count()  # the browser itself asks for the empty field
    page.fill("#entail input", "a ring")
    page.click("#entail button")
    sync_api.expect(page.locator("#entail .error")).to_contain_text("cannot be reached")


def test_a_file_that_is_no_picture_is_refused(page, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    page.set_input_files("#picture-input", str(tmp_path / "text.png"))
    sync_api.expect(page.locator("#picture-status")).to_contain_text("text.png is not a picture")
    sync_api.expect(page.locator("#caption button")).to_be_disabled()


def test_a_picture_above_the_servers_limit_is_reduced_before_it_is_sent(page, server, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, [1000, 2000, 3], dtype="uint8")
    path = tmp_path / "large.png"
    cv2.imwrite(str(path), noise)
    choose(page, path)
    page.click("#caption button")
    sync_api.expect(result(page, "caption")).to_contain_text("ring")
    sent = cv2.imdecode(np.frombuffer(base64.b64decode(server.asked[-1][1]["image"]), np.uint8), cv2.IMREAD_COLOR)
    assert path.stat().st_size > server.about["limits"]["image_bytes"] and sent.shape == (800, 1600, 3)


def test_waiting_is_shown_and_an_answer_for_an_earlier_picture_is_dropped(page, server, picture, tmp_path):
    choose(page, picture)
    server.gate.clear()
    page.click("#caption button")
    sync_api.expect(page.locator("#caption .busy")).to_have_text("Working …")
    sync_api.expect(page.locator("#caption")).to_have_attribute("aria-busy", "true")
    sync_api.expect(page.locator("#caption button")).to_be_disabled()
    second = shutil.copy(picture, tmp_path / "second.png")
    choose(page, Path(second))
    server.gate.set()
    sync_api.expect(page.locator("#caption")).to_have_attribute("aria-busy", "false")
    sync_api.expect(result(page, "caption")).to_be_empty()
    sync_api.expect(page.locator("#caption button")).to_be_enabled()


def test_a_phone_needs_no_sideways_scrolling_and_has_targets_for_fingers(browser, server, picture):
    page = browser.new_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page.set_default_timeout(PATIENCE)
    page.goto(server.url)
    choose(page, picture)
    for card in ("caption", "explain"):
        page.tap(f"#{card} button")
    page.fill("#search input", "a ring")
    page.tap("#search button")
    sync_api.expect(page.locator("#heat")).to_be_visible()
    sync_api.expect(page.locator(".found li")).to_have_count(2)
    sync_api.expect(page.locator(".near canvas")).to_be_visible()  # beside the tokens: the picture itself is out of sight there
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    sizes = page.evaluate("[...document.querySelectorAll('button, .row input')].map(one => one.getBoundingClientRect().height)")
    assert min(sizes) >= 43
    page.close()


def test_the_page_names_no_other_host():
    for path in Path(STATIC).iterdir():
        assert "http:" not in path.read_text() and "https:" not in path.read_text() and "//cdn" not in path.read_text(), path


@pytest.fixture
def service(grounded, folder, tmp_path):
    """The address of the real service with the tiny model for pairs and an index."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
    module = pytest.importorskip("unimo2_paddle.serving.service", reason="the packages of the extra serve are not installed", exc_type=ImportError)
    predictor = Predictor(grounded.directory)
    index, _ = update_index(predictor, folder, tmp_path / "index")
    server = uvicorn.Server(uvicorn.Config(module.create_app({"score": predictor}, index=index), port=0, log_config=None))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(60)


def test_the_page_of_the_real_service_searches_and_shows_grounded_tokens(browser, service):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(service)
    sync_api.expect(page.locator("#server")).to_have_text("2 of 5 skills available; 6 pictures to search")
    sync_api.expect(result(page, "caption")).to_contain_text("start the server with a model for captioning")
    page.fill("#search input", "a ring")
    page.click("#search button")
    sync_api.expect(page.locator(".found li")).to_have_count(6)
    wait_for_thumbnails(page, 6)
    page.click(".found li:first-child button")
    sync_api.expect(page.locator("#picture-name")).to_contain_text(".jpg")
    page.fill("#explain input", "a red ring")
    page.click("#explain button")
    sync_api.expect(page.locator("#heat")).to_be_visible()
    sync_api.expect(page.locator("#explain input[type=radio]")).to_have_count(5)  # the K = 4 tokens, and none
    page.close()
