"""Requests to buckets, through fsspec's gcsfs and s3fs: made again while they fail, their errors those of files.

A request that fails for a while (429, 5xx, a connection that breaks) is made again for PATIENCE seconds. What can't be
had is an OSError whose strerror is a line for the user, as the system's are, so that files and objects fail alike.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import logging
import os
import random
import time
from collections.abc import Iterator
from typing import Any

from jaxsft import cli

# scheme -> (the package that speaks it, which is also the name of the loggers to be kept quiet; the extra that has it)
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
PATIENCE = 600.0  # seconds from the first request that fails, over which it and all others are made again
FIRST_PATIENCE = 90.0  # of a bucket that has not answered yet: its name, or the network, may be wrong
SAID_AFTER = 5.0  # seconds without an answer, after which the user is told
REQUEST_SECONDS = 120.0  # for an answer, before a request counts as failed
LONGEST_PAUSE = 15.0  # seconds between two tries
# Words for exceptions that another try does not mend, by the names of their classes in google.auth and botocore.
NO_CREDENTIALS = ("DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
LATER = (408, 429, 500, 502, 503, 504)  # HTTP's statuses that another try may mend
PACKAGES = ("aiohttp", "requests", "urllib3", "httpx", "botocore", "aiobotocore", "gcsfs")
HINTS = {"gs": "`gcloud auth application-default login`", "s3": "`aws configure`"}

# Else gcsfs asks each bucket over another protocol which kind it is, with a warning where there are no credentials; and
# etils, by which JAX keeps compiled programs in a bucket, would start TensorFlow where that is installed.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
os.environ.setdefault("EPATH_USE_TF", "false")


@dataclasses.dataclass
class Health:
    """How a bucket does, over all requests of this process."""

    has_answered: bool = False
    failing_since: float | None = None  # of time.monotonic; None where the last request was answered
    is_told: bool = False  # the user knows

    def answered(self) -> None:
        """Note an answer, be it that something is not there."""
        self.has_answered, self.failing_since, self.is_told = True, None, False

    def failed(self, began: float, what: str) -> bool:
        """Note that a request, begun then, was not answered; whether to ask again. `what` is told after a while."""
        self.failing_since = began if self.failing_since is None else self.failing_since
        waited = time.monotonic() - self.failing_since
        patience = PATIENCE if self.has_answered else FIRST_PATIENCE
        if waited > SAID_AFTER and not self.is_told:
            cli.warn(f"{what}; asked again for {patience:.0f} s")
            self.is_told = True
        return waited <= patience


HEALTH: collections.defaultdict[str, Health] = collections.defaultdict(Health)


@functools.cache
def file_system(scheme: str) -> Any:
    """fsspec's file system, which asks the bucket every time: another process may have written since."""
    import fsspec

    for name in (SCHEMES[scheme][0], "google", "google.auth", "botocore", "aiobotocore", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log they also raise, and that is ours to tell
    # gcsfs by itself waits for ever; s3fs does not.
    options = {"requests_timeout": REQUEST_SECONDS} if scheme == "gs" else {}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)


def request(url: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """What fsspec's `method` says of the object `url`, asked again while the bucket fails for a while.

    Raises:
      OSError: FileNotFoundError, FileExistsError, PermissionError or another, with a strerror of one line.
    """
    began, pause, health = time.monotonic(), 0.5, HEALTH[bucket_of(url)]
    places = (*args, url) if method == "put_file" else (url, *args)
    while True:
        try:
            answer = getattr(file_system(scheme_of(url)), method)(*places, **kwargs)
            health.answered()
            return answer
        except Exception as error:
            if not is_passing(error):
                health.answered()
                raise as_os_error(error, url) from error
            if not health.failed(began, f"{bucket_of(url)}: {one_line(error)}"):
                raise as_os_error(error, url) from error
        time.sleep(pause * random.uniform(0.5, 1))  # several machines do not come back at the same moment
        pause = min(2 * pause, LONGEST_PAUSE)


def scheme_of(url: str) -> str:
    """'gs' or 's3'."""
    return url.partition("://")[0]


def bucket_of(url: str) -> str:
    """The bucket that an address is in: gs://bucket."""
    return "/".join(url.split("/")[:3])


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed."""
    if any(cause in NO_CREDENTIALS for cause in names(error)):
        return False
    status = status_of(error)
    if status:
        return status in LATER
    module = type(error).__module__
    if module.partition(".")[0] in PACKAGES or module.startswith("google.auth"):
        return True  # what these raise without a status came from the connection: it broke, or could not be made
    passing = (errno.EIO, errno.EBUSY, errno.ETIMEDOUT)
    return isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in passing


def names(error: BaseException | None) -> Iterator[str]:
    """The classes of an exception and of those that it came from."""
    while error is not None:
        yield type(error).__name__
        error = error.__cause__ or error.__context__


def status_of(error: BaseException | None) -> int:
    """HTTP's status in an exception of gcsfs, aiohttp or botocore, or in what it came from; 0 where there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        said = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for found in (said.get("HTTPStatusCode"), getattr(error, "code", None), getattr(error, "status", None)):
            if str(found).isdecimal() and 100 <= int(str(found)) < 600:
                return int(str(found))
        error = error.__cause__
    return 0


def as_os_error(error: Exception, url: str) -> OSError:
    """An exception of fsspec's as the system would raise it, its strerror a line for the user."""
    status = status_of(error)
    if any(cause in NO_CREDENTIALS for cause in names(error)) or status == 401:
        return PermissionError(errno.EACCES, f"there are no credentials for it: {HINTS[url.partition('://')[0]]}", url)
    if isinstance(error, FileExistsError) or status in (409, 412):
        return FileExistsError(errno.EEXIST, "it exists", url)
    if isinstance(error, PermissionError) or status == 403 or str(error).startswith("Forbidden"):
        return PermissionError(errno.EACCES, "the bucket does not permit it", url)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, f"it is not there, or there is no {bucket_of(url)}", url)
    return OSError(errno.EIO, one_line(error), url)


def one_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
