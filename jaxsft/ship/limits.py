"""What a service takes on, at most: of one request, and of all of them together."""

from __future__ import annotations

import dataclasses

from jaxsft.cli import UserError

HELD = 16  # bodies of the largest size that are in memory at a time
CONNECTIONS = 512  # clients, with or without a request; most systems let a process open 1024 files
LINGER = 2.0  # seconds that a refused body is still taken in, and thrown away, so that its sender reads the answer


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a service; none of them can be left out."""

    max_batch: int = 32  # images that the network computes together
    max_wait: float = 0.005  # seconds that the first of them waits for others
    queue: int = 128  # requests in work at a time, from the last byte of the body to the answer
    max_bytes: float = 20e6  # of a body
    max_pixels: int = 50_000_000  # of a picture, before it is decoded
    timeout: float = 10.0  # seconds that a body may take to come, and then the answer
    topk: int = 5  # classes an answer, unless the request says how many

    def __post_init__(self) -> None:
        """Raise a UserError where a bound is out of range."""
        whole = {"--max-batch": self.max_batch, "--queue": self.queue, "--max-pixels": self.max_pixels}
        for name, value in {**whole, "--topk": self.topk}.items():
            if value < 1:
                raise UserError(f"{name} is {value}", "it must be 1 or more")
        if not 1 <= self.max_bytes < 1e12:
            raise UserError(f"--max-mb is {self.max_bytes / 1e6:g}", "it must be above 0 and below a million")
        if not 0 <= self.max_wait < 60:
            raise UserError(f"--max-wait-ms is {1000 * self.max_wait:g}", "it must be from 0 to under 60000")
        if not 0 < self.timeout < 1e6:
            raise UserError(f"--timeout-s is {self.timeout:g}", "it must be above 0, and less than a million")

    @property
    def held_bytes(self) -> float:
        """Bytes of bodies that are in memory at a time, of all requests together."""
        return HELD * self.max_bytes

    @property
    def graceful(self) -> float:
        """Seconds after which the end of the service waits no longer: the longest that a request may take."""
        return 2 * self.timeout + LINGER + 1
