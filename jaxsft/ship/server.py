"""The HTTP interface of a model: a FastAPI application around a `Predictor`, its page, its health and its metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.resources
import time
from collections.abc import Coroutine, Iterator
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxsft.cli import printable
from jaxsft.data.decode import Unreadable
from jaxsft.ship import answers, metrics, pages, upload
from jaxsft.ship.batcher import Ended, Full, Late
from jaxsft.ship.guard import Guard
from jaxsft.ship.limits import Limits
from jaxsft.ship.picture import TooLarge
from jaxsft.ship.predictor import NoNumbers, Predictor
from jaxsft.ship.refusal import GONE, Refused, error, unavailable

STARTING = 5  # seconds after which a client may ask again while the network is compiled
Result = TypeVar("Result")


class House:
    """Who is in: the requests in work and the bytes that are held, under limits; and whether the service ends."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.held = upload.Held(limits.held_bytes)
        self.in_work = 0
        self.ending = False
        self.cut = 0  # requests that were cancelled, for the service would wait no longer

    def end(self) -> None:
        """Take no more pictures."""
        self.ending = True

    def note_cut(self) -> None:
        """Count a request that gets no answer."""
        self.cut += 1

    def check(self, predictor: Predictor) -> None:
        """Raise Refused where a request need not come in at all."""
        if self.ending:
            raise unavailable("the service is ending")
        if not predictor.ready:
            raise unavailable("the service is starting", STARTING)
        if self.in_work >= self.limits.queue:
            raise unavailable(f"{self.in_work} requests are in work, as many as may be")

    @contextlib.contextmanager
    def place(self, predictor: Predictor) -> Iterator[None]:
        """Of one request in work. Raises Refused."""
        self.check(predictor)
        self.in_work += 1
        try:
            yield
        finally:
            self.in_work -= 1


def app(predictor: Predictor) -> FastAPI:
    """The application. Whoever runs it opens and closes the predictor.

    `app.state.house` is its House, whose `end` refuses new pictures.
    """
    limits, card = predictor.limits, predictor.card
    house, counted = House(limits), metrics.Metrics(card, predictor.step, predictor.batch_sizes)
    predictor.observers.append(counted.observe_batch)
    counted.watch("queue_length", "Images that wait for the network.", lambda: predictor.waiting)
    counted.watch("requests_in_work", "Requests from the last byte of the body to the answer.", lambda: house.in_work)
    counted.watch("body_bytes", "Bytes of bodies in memory.", lambda: house.held.bytes)
    application = FastAPI(
        title="jaxsft", summary=f"{card.arch}, {len(card.names)} classes", docs_url=None, redoc_url=None
    )
    application.state.house = house
    page, page_policy = pages.with_policy(importlib.resources.files("jaxsft.ship").joinpath("page.html").read_text())

    @application.post("/predict", responses=answers.PREDICT, openapi_extra={"requestBody": answers.REQUEST})
    async def predict(
        request: Request,
        topk: Annotated[int, Query(ge=1, description="classes in the answer, the most probable first")] = limits.topk,
        explain: Annotated[bool, Query(description="also a Grad-CAM picture of the most probable class")] = False,
    ) -> Response:
        """The most probable classes of a picture."""
        began = time.perf_counter()
        house.check(predictor)
        if explain and not predictor.explains:
            raise Refused(422, f"there is no Grad-CAM for {card.arch}", "ask without explain")
        with house.held.share() as add:
            content = await upload.receive(request, limits, add)
            with house.place(predictor):
                answer = await unless_gone(request, work(predictor, content, topk, explain), limits.timeout)
        seconds = time.perf_counter() - began
        counted.seconds.observe(seconds)
        return JSONResponse({**answer, "seconds": round(seconds, 6)})

    @application.get("/health", responses=answers.HEALTH)
    async def health() -> Response:
        """Whether pictures are answered (200), or not yet or no more (503); and what answers."""
        ready = predictor.ready and not house.ending
        return JSONResponse(
            {
                "live": True,
                "ready": ready,
                "arch": card.arch,
                "step": predictor.step,
                "classes": len(card.names),
                "several_labels": card.multi_label,
                "explains": predictor.explains,
                "max_bytes": limits.max_bytes,
                "max_pixels": limits.max_pixels,
            },
            200 if ready else 503,
            {} if ready else {"Retry-After": str(STARTING)},
        )

    @application.get("/health/live")
    async def live() -> Response:
        """Whether the process is there at all: 200."""
        return JSONResponse({"live": True})

    @application.get("/metrics", response_class=Response, responses=answers.METRICS)
    async def read_metrics() -> Response:
        """What is counted, in Prometheus' form."""
        return Response(counted.text(), media_type=metrics.CONTENT_TYPE)

    @application.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def read_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": page_policy})

    @application.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def read_docs(request: Request) -> Response:
        text, policy = pages.with_policy(pages.reference(application.openapi(), str(request.base_url)))
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @application.exception_handler(Refused)
    async def refused(request: Request, refusal: Refused) -> Response:
        return refusal.response()

    @application.exception_handler(RequestValidationError)
    async def invalid(request: Request, found: RequestValidationError) -> Response:
        first = found.errors()[0]
        name, said = str(first["loc"][-1]), first["msg"].lower()
        return error(422, f"{name} is {printable(first.get('input'))[:100]!r}: {said}; mend it, see /docs")

    @application.exception_handler(HTTPException)
    async def no_such(request: Request, found: HTTPException) -> Response:
        if found.status_code == 404:
            return error(404, f"there is no {printable(request.url.path)[:100]}; see /docs")
        if found.status_code == 405:
            return error(405, f"{request.url.path} takes no {printable(request.method)[:20]}; see /docs", found.headers)
        return error(found.status_code, f"{found.detail}; see /docs", found.headers)

    paths = [route.path for route in application.routes]
    application.add_middleware(Guard, metrics=counted, paths=paths, on_cut=house.note_cut)
    return application


async def work(predictor: Predictor, content: bytes, topk: int, explain: bool) -> dict[str, Any]:
    """From the bytes of a picture to the answer. Raises Refused."""
    deadline = time.monotonic() + predictor.limits.timeout
    try:
        image = await asyncio.wrap_future(predictor.decode(content))
        del content
        row = await asyncio.wrap_future(predictor.probabilities(image, deadline))
        answer = predictor.named(row, topk)
        if explain:
            best = int(row.argmax())
            values = await asyncio.wrap_future(predictor.map_of(image, best, deadline))
            png = await asyncio.wrap_future(predictor.draw(image, values))
            url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            answer["explanation"] = {"class": predictor.card.names[best], "image": url}
        return answer
    except Unreadable as found:
        raise Refused(400, f"the picture can't be read: {found}", "send a whole file of one of those kinds") from None
    except TooLarge as found:
        raise Refused(413, str(found), "make it smaller") from None
    except Full:
        raise unavailable("as many pictures wait as may") from None
    except Ended:
        raise unavailable("the service is ending") from None
    except Late:
        raise late(predictor.limits) from None
    except NoNumbers:
        raise Refused(500, "the network computes no numbers", "serve another --checkpoint") from None


def late(limits: Limits) -> Refused:
    """What a request hears whose time is over."""
    return Refused(504, f"the answer took more than {limits.timeout:g} s", "send fewer pictures at a time, or later")


async def unless_gone(request: Request, coming: Coroutine[Any, Any, Result], timeout: float) -> Result:
    """What `coming` returns; it is cancelled where the client goes, or `timeout` seconds are over.

    Raises:
      Refused: for either reason, or what `coming` raises.
    """
    result, gone = asyncio.ensure_future(coming), asyncio.ensure_future(until_gone(request))
    try:
        done, _ = await asyncio.wait({result, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if result in done:
            return result.result()
        if gone in done:
            raise Refused(GONE, "the client has gone", "-")
        raise late(request.app.state.house.limits)
    finally:
        result.cancel()
        gone.cancel()


async def until_gone(request: Request) -> None:
    """Wait until the client of a request that is whole closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
