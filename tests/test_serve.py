"""`jaxsft.serve` in this process: the answers are `predict`'s; whatever strangers send has a status and a reason."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import re
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from jaxsft import cli, interface
from jaxsft.bench import serve_client
from jaxsft.ship import server
from jaxsft.ship.predictor import Predictor
from tests import small
from tests.serving import CARD, LIMITS, NAMES, PICTURES, RAW, SIZE, picture, predictor_of, untrained


@pytest.fixture(scope="module")
def run() -> interface.Run:
    return untrained()


@pytest.fixture(scope="module")
def predictor(run: interface.Run) -> Iterator[Predictor]:
    made = predictor_of(run)
    made.open()
    yield made
    made.close(30)


@pytest.fixture
def client_of(predictor: Predictor, monkeypatch) -> Callable[..., TestClient]:
    """A client of the service with other limits."""

    def client(**limits: Any) -> TestClient:
        monkeypatch.setattr(predictor, "limits", dataclasses.replace(LIMITS, **limits))
        return TestClient(server.app(predictor), raise_server_exceptions=False)

    return client


@pytest.fixture
def client(client_of) -> TestClient:
    return client_of()


def test_the_answers_are_those_of_predict(client: TestClient, run: interface.Run) -> None:
    """To the rounding of batches of another size."""
    wanted = run.predict([PIL.Image.open(io.BytesIO(content)) for content in PICTURES.values()], topk=3)
    for content, want in zip(PICTURES.values(), wanted, strict=True):
        raw = client.post("/predict", content=content, headers=RAW)
        form = client.post("/predict", files={"file": ("../../etc/passwd", content, "text/html")}, data={"a": "b"})
        typed = client.post("/predict", content=content, headers={"Content-Type": "image/anything; a=b"})
        for response in (raw, form, typed):
            assert response.status_code == 200, response.text
            found = response.json()["classes"]
            assert [one["class"] for one in found] == [one["class"] for one in want["classes"]]
            probabilities = [[one["probability"] for one in entries] for entries in (found, want["classes"])]
            np.testing.assert_allclose(*probabilities, atol=1e-5)
            assert response.json()["seconds"] > 0


class Means(nn.Module):
    """The mean of each channel, and less than nothing: a network without a map of the image."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        means = images.mean((1, 2))
        return jnp.concatenate([means, -means[:, :1]], 1)


@pytest.mark.parametrize("multi_label", [False, True])
def test_probabilities_are_of_the_temperature_and_the_labels_of_several(multi_label: bool) -> None:
    card = dataclasses.replace(CARD, temperature=3.0, multi_label=multi_label)
    predictor = Predictor(Means(), {}, card, LIMITS)
    predictor.open()
    image = np.zeros((SIZE, SIZE, 3), np.uint8) + np.array([200, 30, 90], np.uint8)
    row = predictor.probabilities(image, float("inf")).result(60)
    means = (np.array([200, 30, 90]) / 255 - card.preprocessing.mean) / card.preprocessing.std
    logits = np.append(means, -means[0]) / 3
    wanted = 1 / (1 + np.exp(-logits)) if multi_label else np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(row, wanted, rtol=1e-5)  # float32
    found = predictor.named(row, 2)
    assert found["classes"][0] == {"class": NAMES[0], "probability": pytest.approx(wanted[0], rel=1e-5)}
    assert found.get("labels") == ([NAMES[0]] if multi_label else None)
    response = TestClient(server.app(predictor)).post("/predict?explain=1", content=PICTURES["jpeg"], headers=RAW)
    assert (response.status_code, "there is no Grad-CAM for one_block" in response.text) == (422, True)
    predictor.close(30)


def test_as_many_classes_as_are_asked_for(client: TestClient) -> None:
    for topk, count in ((1, 1), (3, 3), (99, len(NAMES))):
        response = client.post(f"/predict?topk={topk}", content=PICTURES["jpeg"], headers=RAW)
        assert len(response.json()["classes"]) == count


def test_where_the_network_looked(client: TestClient) -> None:
    response = client.post("/predict?explain=1", content=PICTURES["large"], headers=RAW).json()
    explanation = response["explanation"]
    assert explanation["class"] == response["classes"][0]["class"]
    kind, _, data = explanation["image"].partition(",")
    assert kind == "data:image/png;base64"
    image = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "PNG" and image.width == image.height >= 224
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100


BAD = {
    "text": (400, RAW, b"hello", "can't be read: not an image, or none of JPEG"),
    "nothing": (400, RAW, b"", "the body is empty; send a picture"),
    "cut": (400, RAW, PICTURES["jpeg"][:900], "can't be read"),
    "bomb": (413, RAW, serve_client.png_of(60_000, 60_000), "more than 178,956,970 pixels"),
    "many pixels": (413, RAW, serve_client.png_of(4_001, 1_000), "4,001 x 1,000 pixels, more than 4,000,000; make"),
    "too long": (413, RAW, bytes(1_000_001), "over 1 MB; send a smaller"),
    "no type": (415, {}, b"abc", "no Content-Type; send"),
    "json": (415, {"Content-Type": "application/json"}, b"{}", "'application/json' is not taken"),
    "other form": (415, {"Content-Type": "application/x-www-form-urlencoded"}, b"a=b", "not taken"),
    "compressed": (415, {**RAW, "Content-Encoding": "gzip"}, b"abc", "compressed; send it as it is"),
    "no boundary": (400, {"Content-Type": "multipart/form-data"}, b"--a--", "names no boundary"),
    "long boundary": (400, {"Content-Type": f"multipart/form-data; boundary={'a' * 999}"}, b"--a--", "too long"),
    "no form": (400, {"Content-Type": "multipart/form-data; boundary=a"}, b"hello", "the form is"),
    "empty form": (400, {"Content-Type": "multipart/form-data; boundary=a"}, b"", "cut off"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_has_a_status_and_a_reason(name: str, client: TestClient) -> None:
    status, headers, content, reason = BAD[name]
    response = client.post("/predict", content=content, headers=headers)
    assert (response.status_code, set(response.json())) == (status, {"error"})
    assert re.search(reason, response.json()["error"]), response.text
    assert re.fullmatch(r"[^\n]+; [^\n]+", response.json()["error"])


HOSTILE = {
    "zeros": bytes(5000),
    "cut webp": picture(kind="WEBP")[:40],
    "cut gif": picture(kind="GIF")[:60],
    "cut tiff": picture(kind="TIFF")[:100],
    "a header of jpeg": b"\xff\xd8\xff\xe0" + bytes(200),
    "png without pixels": serve_client.png_of(40, 40),
    "png of no size": serve_client.png_of(0, 0),
    "pickle": b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n%%EndComments\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused(name: str, client: TestClient) -> None:
    response = client.post("/predict", content=HOSTILE[name], headers=RAW)
    assert response.status_code == 400, response.text
    assert response.json()["error"].startswith("the picture can't be read: ")


def form(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    body = b"".join(b"--B\r\n%b\r\n\r\n%b\r\n" % (head.encode(), content) for head, content in parts)
    return body + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


FILE = 'Content-Disposition: form-data; name="file"; filename="a"'
FORMS = {
    "another field": (422, form((FILE.replace("file", "picture"), b"abc")), 'no field "file"; send one'),
    "no disposition": (422, form(("A: b", b"abc")), 'no field "file"'),
    "two": (422, form((FILE, PICTURES["jpeg"]), (FILE, PICTURES["jpeg"])), '2 fields "file"'),
    "an empty one": (400, form((FILE, b"")), 'the field "file" is empty'),
    "many": (400, form(*[(FILE.replace("file", f"f{i}"), b"") for i in range(400)]), "more than 16 fields"),
    "a long header": (400, form((f"A: {'a' * 20_000}", b"")), "the form is broken"),
    "many headers": (400, form(("\r\n".join(["A: b"] * 400), b"")), "the form is broken"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_none(name: str, client: TestClient) -> None:
    status, (body, headers), reason = FORMS[name]
    response = client.post("/predict", content=body, headers=headers)
    assert (response.status_code, bool(re.search(reason, response.text.replace("\\", "")))) == (status, True), (
        response.text
    )


def test_nothing_of_an_upload_touches_the_disk(client: TestClient, monkeypatch) -> None:
    for name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, lambda *_, **__: pytest.fail("a file is made"))
    body, headers = form((FILE, PICTURES["jpeg"]), ('Content-Disposition: form-data; name="x"', bytes(900_000)))
    assert client.post("/predict", content=body, headers=headers).status_code == 200


def test_parameters_are_checked(client: TestClient) -> None:
    for query, reason in (("topk=0", "topk is '0'"), ("topk=a", "topk is 'a'"), ("explain=%1b", r"explain is '.*x1b'")):
        response = client.post(f"/predict?{query}", content=PICTURES["jpeg"], headers=RAW)
        assert response.status_code == 422
        assert re.search(reason, response.json()["error"])
    assert client.get("/no%1bsuch").json()["error"] == "there is no /no\\x1bsuch; see /docs"
    response = client.get("/predict")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")


def exchange(
    app: Any,
    receive: Callable[[], Awaitable[dict[str, Any]]],
    headers: dict[str, str],
    sent: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """What an application sends, appended to `sent`, to a client that behaves as `receive` does."""
    sent = [] if sent is None else sent

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    lines = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
             "headers": lines, "root_path": "", "scheme": "http", "server": ("a", 1)}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_long_body_is_refused_before_it_is_read(client: TestClient) -> None:
    """By its length, and in chunks at the first byte too many; the connection is closed, but not at once."""
    sent: list[dict[str, Any]] = []
    asked: list[bool] = []  # whether the answer had gone out

    async def receive() -> dict[str, Any]:
        asked.append(len(sent) == 2)
        return {"type": "http.request", "body": bytes(300_000), "more_body": len(asked) < 10}

    exchange(client.app, receive, {**RAW, "Content-Length": "3000000"}, sent)
    assert sent[0]["status"] == 413 and (b"connection", b"close") in sent[0]["headers"]
    assert [message.get("more_body") for message in sent[1:]] == [True, False]
    assert asked == [True] * 10  # taken in and thrown away, after the answer
    sent.clear()
    asked.clear()
    exchange(client.app, receive, {**RAW, "Transfer-Encoding": "chunked"}, sent)
    assert (sent[0]["status"], asked) == (413, [False] * 4 + [True] * 6)
    assert client.app.state.house.held.bytes == 0


def test_who_sends_for_ever_is_left(client: TestClient, monkeypatch) -> None:
    monkeypatch.setattr("jaxsft.ship.guard.LINGER", 0.05)
    began = time.monotonic()

    async def receive() -> dict[str, Any]:
        assert time.monotonic() - began < 30
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": bytes(500_000), "more_body": True}

    assert exchange(client.app, receive, {**RAW, "Transfer-Encoding": "chunked"})[0]["status"] == 413


def test_a_slow_client_is_left(client_of, monkeypatch) -> None:
    monkeypatch.setattr("jaxsft.ship.guard.LINGER", 0.05)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"a", "more_body": True}

    sent = exchange(client_of(timeout=0.2).app, receive, {**RAW, "Content-Length": "100000"})
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"].startswith("the body took more than 0.2 s to come; ")


def waiting(monkeypatch, predictor: Predictor) -> Future[np.ndarray]:
    """The result of the network, which never comes."""
    result: Future[np.ndarray] = Future()
    monkeypatch.setattr(predictor, "probabilities", lambda image, deadline: result)
    return result


def test_who_goes_is_not_computed_for(client: TestClient, predictor: Predictor, monkeypatch) -> None:
    result = waiting(monkeypatch, predictor)
    for first in ([], [{"type": "http.request", "body": PICTURES["jpeg"], "more_body": False}]):
        messages = iter([*first, {"type": "http.disconnect"}])

        async def receive(messages: Iterator[dict[str, Any]] = messages) -> dict[str, Any]:
            await asyncio.sleep(0.05)
            return next(messages)

        assert exchange(client.app, receive, {**RAW, "Content-Length": "1000"})[0]["status"] == 499
    assert result.cancelled()
    assert 'jaxsft_requests_total{path="/predict",status="499"} 2.0' in client.get("/metrics").text


def test_an_answer_that_takes_too_long_is_dropped(client_of, predictor: Predictor, monkeypatch) -> None:
    result = waiting(monkeypatch, predictor)
    response = client_of(timeout=0.2).post("/predict", content=PICTURES["jpeg"], headers=RAW)
    assert (response.status_code, result.cancelled()) == (504, True)
    assert "more than 0.2 s; send fewer" in response.json()["error"]


def test_what_is_too_much_is_refused_with_a_time(client: TestClient, predictor: Predictor, monkeypatch) -> None:
    house = client.app.state.house

    def refused(reason: str) -> None:
        response = client.post("/predict", content=PICTURES["jpeg"], headers=RAW)
        assert (response.status_code, int(response.headers["Retry-After"]) > 0) == (503, True)
        assert re.search(reason, response.json()["error"]), response.text

    with monkeypatch.context() as patch:
        patch.setattr(house, "in_work", LIMITS.queue)
        refused("128 requests are in work")
    with monkeypatch.context() as patch:
        patch.setattr(house.held, "bytes", LIMITS.held_bytes)
        refused("too many pictures are being sent")
    with monkeypatch.context() as patch:
        patch.setattr(predictor._classes, "_queue", 0)
        refused("as many pictures wait as may")
    with monkeypatch.context() as patch:
        patch.setattr(predictor, "_opened", threading.Event())
        refused("the service is starting")
        assert (client.get("/health").status_code, client.get("/health/live").status_code) == (503, 200)
        assert client.get("/health").json()["ready"] is False
    assert client.get("/health").json() == {
        "live": True, "ready": True, "arch": small.ARCH, "step": 7, "classes": 4, "several_labels": False,
        "explains": True, "max_bytes": 1_000_000, "max_pixels": 4_000_000,
    }  # fmt: skip
    house.end()
    refused("the service is ending")
    assert client.get("/health").status_code == 503
    assert (house.in_work, house.held.bytes) == (0, 0)


def test_networks_of_no_numbers(client: TestClient, run: interface.Run, predictor: Predictor, monkeypatch) -> None:
    result = waiting(monkeypatch, predictor)
    result.set_result(np.full(4, np.nan, np.float32))
    response = client.post("/predict", content=PICTURES["jpeg"], headers=RAW)
    assert (response.status_code, "computes no numbers" in response.text) == (500, True)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, run.variables)
    with pytest.raises(cli.UserError, match="of step 7 computes no numbers; take another --checkpoint"):
        predictor_of(dataclasses.replace(run, variables=broken)).open()


def test_our_own_bugs_are_a_500_without_their_details(client: TestClient, predictor: Predictor, monkeypatch) -> None:
    waiting(monkeypatch, predictor).set_exception(ZeroDivisionError("secret"))
    response = client.post("/predict", content=PICTURES["jpeg"], headers=RAW)
    assert (response.status_code, response.json()) == (500, {"error": "the service failed; its log says why"})
    assert 'path="/predict",status="500"} 1.0' in client.get("/metrics").text
