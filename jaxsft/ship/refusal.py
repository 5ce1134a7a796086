"""Answers that are not what the client wanted: a status, what is wrong and what to do, as JSON."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse

GONE = 499  # the client went before its answer; nginx's number, which only the metrics see
BUSY = 1  # seconds after which to try again


class Refused(Exception):
    """A request ends here: `what` is wrong, `what_to_do` mends it."""

    def __init__(self, status: int, what: str, what_to_do: str, headers: Mapping[str, str] | None = None):
        super().__init__(what)
        self.status, self.headers = status, dict(headers or {})
        self.said = f"{what}; {what_to_do}"

    def response(self) -> JSONResponse:
        """{"error": "what; what to do"}."""
        return error(self.status, self.said, self.headers)


def error(status: int, said: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """What is wrong and what to do, as an answer."""
    return JSONResponse({"error": said}, status, dict(headers or {}))


def unavailable(what: str, seconds: int = BUSY) -> Refused:
    """503, with the time after which it may be otherwise."""
    return Refused(503, what, f"try again in {seconds} s", {"Retry-After": str(seconds)})
