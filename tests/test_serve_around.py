"""What is around the answers of `jaxsft.serve`: metrics, pages, headers, clients on sockets, and its command line."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from jaxsft.bench import serve_client
from jaxsft.data.decode import FORMATS
from jaxsft.ship import listener, server
from jaxsft.ship.predictor import Predictor
from tests.commands import run_command
from tests.serving import LIMITS, PICTURES, RAW, on_socket, picture, predictor_of, untrained


@pytest.fixture(scope="module")
def predictor() -> Iterator[Predictor]:
    made = predictor_of(untrained())
    made.open()
    yield made
    made.close(30)


@pytest.fixture
def client(predictor: Predictor) -> TestClient:
    return TestClient(server.app(predictor), raise_server_exceptions=False)


def test_metrics_count(client: TestClient, predictor: Predictor) -> None:
    for _ in range(3):
        client.post("/predict", content=PICTURES["jpeg"], headers=RAW)
    client.post("/predict", content=b"x", headers=RAW)
    client.get("/a/b/c")
    response = client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    for line in (
        'jaxsft_requests_total{path="/predict",status="200"} 3.0',
        'jaxsft_requests_total{path="/predict",status="400"} 1.0',
        'jaxsft_requests_total{path="other",status="404"} 1.0',
        "jaxsft_predict_seconds_count 3.0",
        "jaxsft_images_total 3.0",
        'jaxsft_batch_images_bucket{le="1.0"} 3.0',
        "jaxsft_queue_length 0.0",
        'jaxsft_model_info{arch="one_block",step="7"} 1.0',
    ):
        assert line in response.text.splitlines(), line


def test_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        response = client.get(path)
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src ") and "unsafe" not in policy
        text = response.text.replace("http://testserver/", "")
        assert not re.search(r"https?:|//\w|\bsrc=|@import|\son\w+=| style=", text), path
        assert response.headers["Content-Type"].startswith("text/html")
    assert "<code>POST /predict</code>" in text and "Retry-After" in text


def test_every_answer_has_the_headers_of_safety(client: TestClient) -> None:
    answers = [client.get(path) for path in ("/", "/docs", "/health", "/metrics", "/openapi.json", "/none")]
    answers.append(client.post("/predict", content=b"", headers=RAW))
    for response in answers:
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
        assert not any(name.startswith("access-control") for name in response.headers)


def test_openapi_says_all(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    predict = schema["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "application/octet-stream", "image/*"}
    assert set(predict["responses"]) == {"200", "400", "408", "413", "415", "422", "503", "504"}
    assert [parameter["name"] for parameter in predict["parameters"]] == ["topk", "explain"]
    assert set(schema["paths"]) == {"/predict", "/health", "/health/live", "/metrics"}
    kinds = predict["requestBody"]["description"].upper()
    assert all(kind in kinds for kind in FORMATS if kind != "DIB")


@pytest.fixture
def impatient(predictor: Predictor, monkeypatch) -> Predictor:
    """It waits half a second for slow clients."""
    monkeypatch.setattr(predictor, "limits", dataclasses.replace(LIMITS, timeout=0.5))
    return predictor


def test_clients_of_all_kinds_on_sockets(predictor: Predictor, impatient: Predictor) -> None:
    contents = [PICTURES["jpeg"], PICTURES["large"]]
    requests = serve_client.bad(picture(400, 300), LIMITS.max_bytes, 0.5)
    requests += 3 * (serve_client.good(contents, True) + serve_client.good(contents, False))
    with on_socket(impatient) as (address, application):
        predictor.limits = LIMITS  # of the answers, on a busy machine; the application has its own of the bodies
        outcomes = asyncio.run(serve_client.load(*address, requests, 8))
    assert len(outcomes) == len(requests)
    assert [outcome for outcome in outcomes if not outcome.right] == []
    assert (application.state.house.cut, application.state.house.in_work, application.state.house.held.bytes) == (
        0,
    ) * 3


def heard(client: socket.socket) -> bytes:
    """All that a server sends until it closes the connection."""
    client.settimeout(30)
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_who_says_nothing_is_left_and_too_many_are_turned_away(impatient: Predictor, monkeypatch) -> None:
    monkeypatch.setattr(listener, "CONNECTIONS", 2)
    with on_socket(impatient) as (address, _):
        silent = [socket.create_connection(address) for _ in range(2)]
        silent[1].sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += silent[1].recv(1 << 16)
        silent[1].sendall(b"GET /he")  # and no more
        time.sleep(0.2)
        third = heard(socket.create_connection(address))
        assert third.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in third
        first, second = map(heard, silent)
        assert first.startswith(b"HTTP/1.1 408 ") and b"the head of the request took too long; send" in first
        assert second.startswith(b"HTTP/1.1 408 ")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such limit")
def test_who_takes_no_answer_is_left(impatient: Predictor) -> None:
    with on_socket(impatient) as (address, _), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(address)
        with pytest.raises(ConnectionError):  # no timeout of ours
            client.sendall(b"GET /docs HTTP/1.1\r\nHost: a\r\n\r\n" * 1_000_000)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = run_command(f"serve --workdir @ --port {port}", tmp_path)
        assert said == (2, f"error: 127.0.0.1 port {port} can't be listened on: Address already in use; "
                           "name another --port or --host\n")  # fmt: skip
    for arguments, reason in {
        "": "the following arguments are required: --workdir",
        "--workdir @ --port 0": "holds no run; give the --workdir",
        "--workdir @ --port 99999": "--port is 99999; it must be from 0 to 65535",
        "--workdir @ --host no.such.host.": "--host no.such.host. is no address",
        "--workdir @ --max-batch 0": "--max-batch is 0; it must be 1 or more",
        "--workdir @ --queue -1": "--queue is -1",
        "--workdir @ --max-mb 0": "--max-mb is 0; it must be above 0",
        "--workdir @ --max-mb nan": "--max-mb",
        "--workdir @ --max-pixels 0": "--max-pixels is 0",
        "--workdir @ --timeout-s inf": "--timeout-s is inf",
        "--workdir @ --max-wait-ms -1": "--max-wait-ms is -1",
        "--workdir @ --topk 0": "--topk is 0",
    }.items():
        status, text = run_command(f"serve {arguments}", tmp_path)
        assert (status, text.count("\n")) == (2, 1), text
        assert reason in text


def test_addresses_that_others_reach_are_told(tmp_path: Path) -> None:
    status, text = run_command("serve --workdir @ --port 0 --host 0.0.0.0", tmp_path)
    assert status == 2
    assert text.splitlines()[0].startswith("warning: whoever reaches this machine can use it: there is no password")
