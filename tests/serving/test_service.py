"""The HTTP service over loopback: answers equal the predictor's, every limit has its status, everything is told as JSON, and it stops in order."""
import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from unimo2_paddle import Predictor
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.serving.indexing import update_index
from unimo2_paddle.serving.results import Answered

for needed in ("fastapi", "fastapi_offline", "prometheus_client", "uvicorn", "httpx"):
    pytest.importorskip(needed, reason=f"{needed} is not installed (pip install 'unimo2_paddle[serve]')")
from fastapi.testclient import TestClient  # noqa: E402

from unimo2_paddle.serving.service import Models, ServiceSettings, create_app  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 120


class StubKind:
    needs, optional, reads_regions = ("image", "text"), (), False
    programs = SimpleNamespace(engine="stub")

    def fingerprint(self):
        return "stub"


class Stub:
    """A predictor for questions that answers with the text, or waits or fails as the text says."""

    task, about, kind, directory = "vqa", {}, StubKind(), "stub"

    def __init__(self):
        self.open, self.entered = threading.Event(), threading.Event()

    def check(self, request, name="request"):
        if request["text"] == "refused":
            raise UserInputError(f"{name}: refused")
        return request

    def run(self, requests):
        if any(request["text"] == "wait" for request in requests):
            self.entered.set()
            assert self.open.wait(PATIENCE)
        if any(request["text"] == "fail" for request in requests):
            raise RuntimeError("secret detail")
        return [Answered(request["text"], float(request["image"].shape[0]), {}) for request in requests]


@pytest.fixture(scope="module")
def encoded(demo_data):
    return base64.b64encode(sorted((demo_data / "retrieval" / "images").glob("*.jpg"))[0].read_bytes()).decode()


@pytest.fixture
def served():
    """A function: predictors, settings and index -> a client of the running application."""
    clients = []

    def start(predictors, index=None, **settings):
        client = TestClient(create_app(predictors, ServiceSettings(**settings), index), raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield start
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def stub():
    made = Stub()
    yield made
    made.open.set()


def error(answer, status, code):
    """The message of an error in the one form all errors have."""
    told = answer.json()["error"]
    assert answer.status_code == status and told["code"] == code and told["request_id"] == answer.headers["x-request-id"], answer.text
    return told["message"]


def test_answers_equal_the_predictors(served, grounded, folder, tmp_path, encoded):
    predictor = Predictor(grounded.directory)
    index, _ = update_index(predictor, folder, tmp_path / "index")
    client = served({"score": predictor}, index)
    picture = base64.b64decode(encoded)
    told = client.post("/v1/score", json={"image": encoded, "text": "a red ring"}).json()
    assert told == pytest.approx(predictor(image=picture, text="a red ring").to_json(), abs=1e-4)
    found = client.post("/v1/search", json={"text": "a red ring", "top": 2}).json()
    wanted = index.search(predictor, "a red ring", 2)
    assert found["items"] == 6 and [row["item"] for row in found["results"]] == [index.items[one.place] for one in wanted]
    told = client.post("/v1/zeroshot", json={"image": encoded, "classes": ["ring", "box"], "templates": ["a {}"]}).json()
    assert told["label"] == predictor.classify([picture], ["ring", "box"], ["a {}"])[0].label
    assert "no picture" not in client.get("/").text and "<title>UNIMO-2" in client.get("/").text
    about = client.get("/api/about").json()["tasks"]
    assert about["search"]["available"] and about["explain"]["available"] and not about["caption"]["available"]


def test_many_clients_at_once_get_their_own_answers(served, stub, encoded):
    client = served({"vqa": stub}, max_pending=40, max_batch=8)
    answers = {}

    def ask(number):
        answers[number] = client.post("/v1/vqa", json={"image": encoded, "question": f"q{number}"}).json()["answer"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == {number: f"q{number}" for number in range(30)}
    told = client.get("/metrics").text
    assert 'unimo2_requests_total{path="/v1/vqa",status="200"} 30.0' in told and 'unimo2_batch_requests_sum{model="vqa"} 30.0' in told


def test_wrong_requests_get_400_with_what_is_wrong(served, stub, encoded):
    client = served({"vqa": stub}, max_bytes=100000, max_pixels=100)
    small = base64.b64encode(b"P6 2 2 255 " + bytes(12)).decode()
    assert client.post("/v1/vqa", json={"image": small, "text": "a"}).json()["answer"] == "a"
    for body, told in (({"image": small}, "text: Field required"), ({"image": small, "text": "a", "colour": 1}, "colour: Extra inputs"),
                       ({"image": "?", "text": "a"}, "image: not base64"), ({"image": small, "text": 3}, "text: Input should be a valid string"),
                       ({"image": base64.b64encode(b"junk").decode(), "text": "a"}, "image: not a picture"),
                       ({"image": "/etc/passwd", "text": "a"}, "image: not base64"), ({"image": small, "text": "refused"}, "vqa: refused"),
                       ({"image": small, "text": "a" * 20001}, "at most 20000"), ({"image": encoded, "text": "a"}, "pixels")):
        assert told in error(client.post("/v1/vqa", json=body), 400, "invalid_input")
    assert error(client.post("/v1/vqa", content=b"{"), 400, "invalid_input")
    assert "no index" in error(client.post("/v1/search", json={"text": "a"}), 400, "invalid_input")
    assert "there are /v1/vqa" in error(client.post("/v1/caption", json={}), 404, "not_found")
    assert error(client.get("/v1/vqa"), 405, "method_not_allowed")


def test_what_is_too_large_is_refused_with_and_without_its_length(served, stub):
    client = served({"vqa": stub}, max_bytes=2000)
    assert "more than 2000 bytes" in error(client.post("/v1/vqa", content=b"x" * 2001), 413, "too_large")
    assert "more than 2000 bytes" in error(client.post("/v1/vqa", content=(b"x" * 500 for _ in range(5))), 413, "too_large")


def test_a_full_queue_answers_503_and_health_still_answers(served, stub, encoded):
    client = served({"vqa": stub}, max_pending=2, max_batch=1)
    body, answers = {"image": encoded, "text": "wait"}, []
    threads = [threading.Thread(target=lambda: answers.append(client.post("/v1/vqa", json=body).status_code)) for _ in range(2)]
    [thread.start() for thread in threads]
    assert stub.entered.wait(PATIENCE)
    until = time.monotonic() + PATIENCE
    while "unimo2_pending_requests 2.0" not in client.get("/metrics").text and time.monotonic() < until:
        time.sleep(0.01)
    refused = client.post("/v1/vqa", json=body)
    assert "2 requests are waiting" in error(refused, 503, "busy") and refused.headers["retry-after"] == "1"
    assert client.get("/health").json() == {"status": "ok", "models": ["vqa"]}
    stub.open.set()
    [thread.join() for thread in threads]
    assert answers == [200, 200]


def test_what_takes_too_long_is_answered_504(served, stub, encoded):
    client = served({"vqa": stub}, timeout=0.2)
    assert "not answered within 0.2 s" in error(client.post("/v1/vqa", json={"image": encoded, "text": "wait"}), 504, "timeout")
    stub.open.set()


def test_an_error_of_the_service_tells_no_details(served, stub, encoded):
    client = served({"vqa": stub})
    assert "secret" not in error(client.post("/v1/vqa", json={"image": encoded, "text": "fail"}), 500, "internal")
    assert client.post("/v1/vqa", json={"image": encoded, "text": "a"}, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_the_api_page_needs_nothing_from_elsewhere(served, stub):
    client = served({"vqa": stub})
    page = client.get("/docs").text
    for place in re.findall(r'(?:src|href|url)\s*[=:]\s*["\']([^"\']+)', page):
        assert place.startswith("/") and not place.startswith("//"), place
        assert client.get(place).status_code == 200, place
    schema = client.get("/openapi.json").json()
    assert {"/v1/vqa", "/v1/search", "/v1/models", "/health", "/metrics"} <= set(schema["paths"])
    assert set(schema["components"]["schemas"]["VqaRequest"]["required"]) == {"image", "text"}


def test_models_that_cannot_be_served_are_refused(stub, grounded, pair_model, folder, tmp_path):
    for predictors, told in (({}, "at least one model"), ({"search": stub}, "model name 'search'"), ({"a b": stub}, "model name 'a b'")):
        with pytest.raises(UserInputError, match=told):
            Models(predictors, ServiceSettings())
    index, _ = update_index(Predictor(grounded.directory), folder, tmp_path / "index")
    with pytest.raises(UserInputError, match="needs a UNIMO-2 model for pairs"):
        Models({"vqa": stub}, ServiceSettings(), index)
    with pytest.raises(UserInputError, match="was not built with the weights"):
        Models({"score": Predictor(pair_model("other", seed=9).directory)}, ServiceSettings(), index)
    with pytest.raises(UserInputError, match="--max-batch must be at least 1"):
        ServiceSettings(max_batch=0)


def test_the_command_serves_logs_json_and_stops_in_order_on_sigterm(grounded, encoded):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "unimo2_paddle.cli", "serve", "-m", f"pairs={grounded.directory}", "--port", "0", "--max-wait", "300"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert [line["event"] for line in lines] == ["loaded", "serving"] and lines[1]["models"] == ["pairs"]
        request = urllib.request.Request(f"{lines[1]['url']}v1/pairs", json.dumps({"image": encoded, "text": "a ring"}).encode(),
                                         {"Content-Type": "application/json"})
        answers = []
        thread = threading.Thread(target=lambda: answers.append(json.load(urllib.request.urlopen(request, timeout=PATIENCE))))
        thread.start()  # waits 300 ms for others: the stop arrives while it is open
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            told = urllib.request.urlopen(f"{lines[1]['url']}metrics", timeout=PATIENCE).read().decode()
            if "unimo2_pending_requests 1.0" in told or answers:
                break
        process.send_signal(signal.SIGTERM)
        thread.join(PATIENCE)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert answers and "score" in answers[0]
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["event"] == "stopped" and "stopping" in [event["event"] for event in events]
    [noted] = [event for event in events if event.get("path") == "/v1/pairs"]
    assert noted["status"] == 200 and noted["batch"] == 1 and noted["model"] == "pairs"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(lines[1]["url"], timeout=5)


def test_answers_do_not_wait_for_acknowledgements():
    import socket

    from unimo2_paddle.serving.serve_command import _listen

    with _listen(SimpleNamespace(host="127.0.0.1", port=0, backlog=1)) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # what asyncio looks at before it sets TCP_NODELAY


def test_arguments_that_cannot_be_used_are_refused(unimo2, grounded, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr("unimo2_paddle.serving.serve_command.log_as_json", lambda: None)  # it would outlive the test
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, told in ((("-m", tmp_path), "has no config.json"), (("-m", grounded.directory, "-m", grounded.directory), "two models are called score"),
                                (("-m", grounded.directory, "--port", "70000"), "--port must be"), (("-m", grounded.directory, "--timeout", "0"), "--timeout"),
                                (("-m", grounded.directory, "--port", taken.getsockname()[1]), "cannot listen there")):
            outcome = unimo2("serve", *arguments)
            assert outcome.status == 2 and told in outcome.err, outcome.err
