"""What the page asks the server for: grounded tokens, search, pictures; nothing outside of the index and of the page's own files."""
import base64

import pytest

from unimo2_paddle import Predictor, explain
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.serving.indexing import update_index
from unimo2_paddle.serving.web.page import STATIC, Page, add_page, decode_upload, static_file

fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed")
testclient = pytest.importorskip("fastapi.testclient", reason="the test client of fastapi needs httpx")


@pytest.fixture
def predictor(grounded):
    return Predictor(grounded.directory)


@pytest.fixture
def client(predictor, folder, tmp_path):
    index, _ = update_index(predictor, folder, tmp_path / "index")
    return served(Page({"caption": "v1/caption"}, predictor, index, image_bytes=20000))


def served(page):
    app = fastapi.FastAPI()
    add_page(app, page)
    return testclient.TestClient(app)


def test_the_page_and_its_files_are_served_with_a_policy_that_allows_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and "<title>UNIMO-2" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"] and "http" not in page.headers["content-security-policy"]
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css")):
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind) and name in page.text
    for name in ("../page.py", "..%2Fpage.py", "nothing.js"):
        assert client.get(f"/static/{name}").status_code == 404
    assert static_file("../page.py") is None and static_file(STATIC) is None


def test_what_is_available_is_told_with_the_remedy_for_the_rest(client):
    told = client.get("/api/about").json()
    assert [name for name, task in told["tasks"].items() if task["available"]] == ["caption", "explain", "search"]
    assert told["tasks"]["caption"]["path"] == "v1/caption" and "model for vqa" in told["tasks"]["answer"]["reason"]
    assert told["limits"]["image_bytes"] == 20000 and "6 pictures" in told["title"]
    alone = served(Page()).get("/api/about").json()
    assert not any(task["available"] for task in alone["tasks"].values())


def test_grounded_tokens_are_those_of_explain(client, predictor, folder):
    data = (folder / "1.jpg").read_bytes()
    told = client.post("/api/explain", json={"image": base64.b64encode(data).decode(), "text": "a ring"}).json()
    wanted = explain(predictor, data, "a ring").to_json()
    assert told["tokens"] == wanted["tokens"] and told["words"] == wanted["words"] and told["summary"]
    assert client.post("/api/explain", json={"image": base64.b64encode(data).decode()}).json()["words"] == []


def test_search_finds_pictures_that_can_be_fetched(client, predictor, folder):
    told = client.post("/api/search", json={"text": "a red ring"}).json()
    scores = [row["score"] for row in told["results"]]
    assert told["items"] == 6 and scores == sorted(scores, reverse=True)
    best = told["results"][0]
    assert best["score"] == pytest.approx(predictor(image=folder / best["item"], text="a red ring").score, abs=1e-4)
    whole = client.get(f"/api/pictures/{best['place']}")
    assert whole.content == (folder / best["item"]).read_bytes() and whole.headers["content-type"] == "image/jpeg"
    assert client.get(f"/api/thumbnails/{best['place']}").content[:2] == b"\xff\xd8"


def test_wrong_requests_get_a_message_and_status_400(client, folder):
    for path, body, told in (("explain", {"image": "no base64!"}, "not base64"), ("explain", {"image": "A" * 40000}, "at most 20000 bytes"),
                             ("explain", {"image": base64.b64encode(b"junk").decode()}, "not a picture"), ("explain", {}, "nothing to explain"),
                             ("search", {"text": "  "}, "give a sentence")):
        answer = client.post(f"/api/{path}", json=body)
        assert answer.status_code == 400 and told in answer.json()["error"]["message"]
    for path in ("thumbnails/6", "pictures/-1", "pictures/99"):
        assert client.get(f"/api/{path}").status_code == 400
    (folder / "0.jpg").unlink()
    assert client.get("/api/pictures/0").status_code == 400 and client.get("/api/thumbnails/0").status_code == 400
    empty = served(Page())
    assert "no search here" in empty.post("/api/search", json={"text": "a"}).json()["error"]["message"]
    assert "no grounded tokens here" in empty.post("/api/explain", json={"text": "a"}).json()["error"]["message"]


def test_an_index_of_another_model_or_of_sentences_is_refused(predictor, pair_model, folder, tmp_path):
    index, _ = update_index(predictor, folder, tmp_path / "index")
    with pytest.raises(UserInputError, match="was not built with the weights"):
        Page(pairs=Predictor(pair_model("another", seed=8).directory), index=index)
    (tmp_path / "lines.txt").write_text("a ring\n")
    texts, _ = update_index(predictor, tmp_path / "lines.txt", tmp_path / "texts")
    with pytest.raises(UserInputError, match="an index of pictures"):
        Page(pairs=predictor, index=texts)
    with pytest.raises(UserInputError):
        decode_upload(3, 10)
