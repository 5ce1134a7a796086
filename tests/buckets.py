"""A server of buckets on this machine, which speaks Google's protocol or Amazon's.

Google's is the package gcp-storage-emulator, to which is added what it lacks and the program relies on: a write on
condition that there is nothing yet. Amazon's is moto. The first can be told to fail, or to be away.
"""

from __future__ import annotations

import http.server
import io
import json
import logging
import os
import random
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Bucket:
    """A running server: its environment for commands, what was asked of it, and how it fails."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = dict(environment)
        self.requests: list[str] = []
        self.failing = 0.0  # the share of requests that are answered by 503
        self.refusing = 0  # how many of the next are
        self.writes_left: int | None = None  # after so many more it is read-only
        self.on_write: Callable[[], None] = lambda: None
        self.away_until = 0.0  # of time.monotonic
        self.read_only = False
        self.lock = threading.Lock()

    def answer(self, method: str, address: str) -> int:
        """The status with which to refuse a request; 0: it is answered."""
        with self.lock:
            self.requests.append(f"{method} {address}")
            if self.refusing:
                self.refusing -= 1
                return 503
        if time.monotonic() < self.away_until or random.random() < self.failing:
            return 503
        if method == "GET":
            return 0
        self.on_write()
        if self.writes_left is not None:
            if not self.writes_left:
                return 403
            self.writes_left -= 1
        return 403 if self.read_only else 0

    def listings(self) -> int:
        """How many requests were for a listing."""
        return sum("/o?" in request and "uploadType" not in request for request in self.requests)


class Handler(emulator.RequestHandler):
    """The emulator's, with faults and preconditions."""

    def __init__(self, bucket: Bucket, *args: Any, **kwargs: Any):
        self.bucket = bucket
        super().__init__(*args, **kwargs)

    def _handle(self, method: str) -> None:
        status = self.bucket.answer(method, self.path)
        query = parse_qs(urlparse(self.path).query)
        if not status and query.get("ifGenerationMatch") == ["0"] and self._is_there(query):
            status = 412
        if status:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = json.dumps({"error": {"code": status, "message": "as the test wants it"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        with self.bucket.lock:  # the emulator's storage is for one at a time
            emulator.Router(self).handle(method)

    def _is_there(self, query: dict[str, list[str]]) -> bool:
        name = unquote(query.get("name", [""])[0])
        if not name:  # a multipart upload names it in its first part, of JSON
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.rfile = io.BytesIO(body)
            name = json.loads(body.split(b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n")[1].splitlines()[0])["name"]
        with self.bucket.lock:
            return self.storage.get_file_obj(BUCKET, name) is not None if exists(self.storage, name) else False

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def do_PATCH(self) -> None:
        self._handle("PATCH")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def exists(storage: Storage, name: str) -> bool:
    """Whether the emulator has an object."""
    try:
        storage.get_file_obj(BUCKET, name)
    except Exception:
        return False
    return True


class Memory(Storage):
    """The emulator's, which lasts as long as the process: its list of all objects is kept on no disk, at no write."""

    def _write_config_to_file(self) -> None:
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """One thread a connection."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


@contextmanager
def google() -> Iterator[Bucket]:
    """gs://bucket, empty."""
    storage = Memory(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    bucket = Bucket({})
    server = Server(("127.0.0.1", 0), partial(Handler, bucket, storage))
    address = f"http://127.0.0.1:{server.server_address[1]}"
    bucket.environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def amazon() -> Iterator[Bucket]:
    """s3://bucket, empty."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        import boto3

        made = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        made.create_bucket(Bucket=BUCKET)
        yield Bucket(environment)
    finally:
        server.stop()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables for a while, and file systems that know them."""
    from jaxsft import patience

    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    patience.file_system.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        patience.file_system.cache_clear()
