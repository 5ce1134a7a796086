"""Objects in buckets, gs://BUCKET/NAME and s3://BUCKET/NAME, through fsspec's gcsfs and s3fs (extras [gcs], [s3]).

A bucket has objects with bytes in them: each is written whole, replaced whole, or made only where there is none yet;
there is no append, no rename, and a folder is no more than what the names of its objects begin with. Requests that fail
for a while (429, 5xx, a connection that breaks) are made again for PATIENCE seconds. What can't be had is an OSError
whose strerror is a line for the user, as the system's are, so that files and objects fail alike.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import importlib.util
import io
import logging
import os
import random
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxsft import cli

# scheme -> (the package that speaks it, which is also the name of the loggers to be kept quiet; the extra that has it)
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
PATIENCE = 600.0  # seconds from the first request that fails, over which it and all others are made again
FIRST_PATIENCE = 90.0  # of a bucket that has not answered yet: its name, or the network, may be wrong
SAID_AFTER = 5.0  # seconds without an answer, after which the user is told
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


class Entry(NamedTuple):
    """What a listing says of an object."""

    size: int  # bytes
    changed_ns: int  # time of the last write in ns since 1970, by the bucket's clock


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """A place in a bucket, with those of pathlib's methods that make sense there."""

    url: str  # "gs://bucket/folder/name", without a slash at the end

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: object) -> BucketPath:
        return BucketPath(f"{self.url}/{name}".rstrip("/"))

    @property
    def scheme(self) -> str:
        """'gs' or 's3'."""
        return self.url.partition("://")[0]

    @property
    def bucket(self) -> BucketPath:
        """The bucket itself."""
        return BucketPath("/".join(self.url.split("/")[:3]))

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return os.path.splitext(self.name)[1]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return os.path.splitext(self.name)[0]

    @property
    def parent(self) -> BucketPath:
        """The place that this one lies in; of a bucket itself."""
        return self if self == self.bucket else BucketPath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is an object, or a folder, of this name."""
        return self._kind() != ""

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there are objects whose names begin with this one and a slash."""
        return self._kind() == "directory"

    def _kind(self) -> str:
        try:
            return str(request(self, "info")["type"])
        except FileNotFoundError:
            return ""

    def iterdir(self) -> Iterator[BucketPath]:
        """The objects and folders directly in here, by name.

        Raises:
          FileNotFoundError: there are none.
        """
        found = {entry["name"].rstrip("/").rpartition("/")[2] for entry in request(self, "ls", detail=True)}
        return (self / name for name in sorted(found - {"", self.name}))

    def read_bytes(self) -> bytes:
        """The content of an object. Raises FileNotFoundError, OSError."""
        return bytes(request(self, "cat_file"))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """The same as text."""
        return self.read_bytes().decode(encoding, errors)

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The content of an object to be read, as a file."""
        if mode != "rb":
            raise ValueError(mode)
        return io.BytesIO(self.read_bytes())

    def write_bytes(self, content: bytes) -> None:
        """Write an object, whole or not at all; what was there is replaced."""
        request(self, "pipe_file", content)

    def create(self, content: bytes) -> bool:
        """Write an object where there is none yet; whether that was so. Of several who try, one succeeds."""
        try:
            request(self, "pipe_file", content, mode="create")
        except FileExistsError:
            # An answer may be lost, and the next try then finds what the first one wrote.
            return self.read_bytes() == content
        return True

    def upload(self, file: Any) -> None:
        """Write an object from a file of this machine."""
        request(self, "put_file", str(file))

    def download(self, file: Any) -> None:
        """Write a file of this machine from an object."""
        request(self, "get_file", str(file))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            request(self, "rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def stat(self) -> Entry:
        """Of an object. Raises FileNotFoundError, OSError."""
        return entry_of(request(self, "info"))

    def walk(self) -> dict[str, Entry]:
        """All objects below here, by their names from here on, as one listing of the bucket brings them."""
        try:
            found = request(self, "find", detail=True, withdirs=False)
        except FileNotFoundError:
            return {}
        start = f"{self.url.partition('://')[2]}/"
        names = (name for name in sorted(found) if name.startswith(start) and not name.endswith("/"))
        return {name.removeprefix(start): entry_of(found[name]) for name in names}


def entry_of(info: dict[str, Any]) -> Entry:
    """What fsspec says of an object, of either kind of bucket."""
    changed = info.get("mtime") or info.get("updated") or info.get("LastModified")
    return Entry(int(info.get("size") or 0), int(changed.timestamp() * 1e9) if changed else 0)


def parse(url: str) -> BucketPath:
    """The place that an address names.

    Raises:
      UserError: no such scheme, no bucket in it, or the extra that speaks it is not installed.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = " or ".join(f"{name}://BUCKET/…" for name in SCHEMES)
        raise cli.UserError(f"{url} can't be used: {scheme}:// is not known", f"name a local path, or {known}")
    parts = rest.rstrip("/").split("/")
    if not parts[0] or any(part in ("", ".", "..") for part in parts):
        raise cli.UserError(f"{url} names no place in a bucket", f"write it as {scheme}://BUCKET/FOLDER")
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        what_to_do = f"install the extra: pip install 'jaxsft[{extra}]'"
        raise cli.UserError(f"{url} needs the package {package!r}", what_to_do)
    return BucketPath(f"{scheme}://{'/'.join(parts)}")


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


HEALTH: collections.defaultdict[BucketPath, Health] = collections.defaultdict(Health)


@functools.cache
def file_system(scheme: str) -> Any:
    """fsspec's file system, which asks the bucket every time: another process may have written since."""
    import fsspec

    for name in (SCHEMES[scheme][0], "google", "google.auth", "botocore", "aiobotocore", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they log they also raise, and that is ours to tell
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


def request(path: BucketPath, method: str, *args: Any, **kwargs: Any) -> Any:
    """What fsspec's `method` says of `path`, asked again while the bucket fails for a while.

    Raises:
      OSError: FileNotFoundError, FileExistsError, PermissionError or another, with a strerror of one line.
    """
    began, pause, health = time.monotonic(), 0.5, HEALTH[path.bucket]
    places = (*args, path.url) if method == "put_file" else (path.url, *args)
    while True:
        try:
            answer = getattr(file_system(path.scheme), method)(*places, **kwargs)
            health.answered()
            return answer
        except Exception as error:
            if not is_passing(error):
                health.answered()
                raise as_os_error(error, path) from error
            if not health.failed(began, f"{path.bucket}: {one_line(error)}"):
                raise as_os_error(error, path) from error
        time.sleep(pause * random.uniform(0.5, 1))  # several machines do not come back at the same moment
        pause = min(2 * pause, LONGEST_PAUSE)


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


def as_os_error(error: Exception, path: BucketPath) -> OSError:
    """An exception of fsspec's as the system would raise it, its strerror a line for the user."""
    status = status_of(error)
    if any(cause in NO_CREDENTIALS for cause in names(error)) or status == 401:
        return PermissionError(errno.EACCES, f"there are no credentials for it: {HINTS[path.scheme]}", str(path))
    if isinstance(error, FileExistsError) or status in (409, 412):
        return FileExistsError(errno.EEXIST, "it exists", str(path))
    if isinstance(error, PermissionError) or status == 403 or str(error).startswith("Forbidden"):
        return PermissionError(errno.EACCES, "the bucket does not permit it", str(path))
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, f"it is not there, or there is no {path.bucket}", str(path))
    return OSError(errno.EIO, one_line(error), str(path))


def one_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
