"""Objects in buckets, gs://BUCKET/NAME and s3://BUCKET/NAME, as paths (extras [gcs], [s3]).

A bucket has objects with bytes in them: each is written whole, replaced whole, or made only where there is none yet;
there is no append, no rename, and a folder is no more than what the names of its objects begin with.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft import cli
from jaxsft.patience import SCHEMES, bucket_of, request, scheme_of

# gcsfs sends an object of fewer bytes than this in one request, between lines that end in a bare newline: "\r" at its
# end is then taken for a part of the last of them, and where it has this line itself, it ends there.
ONE_REQUEST, BOUNDARY = 5 * 2**20, b"--==0=="


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
    def bucket(self) -> BucketPath:
        """The bucket itself."""
        return BucketPath(bucket_of(self.url))

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
            return str(request(self.url, "info")["type"])
        except FileNotFoundError:
            return ""

    def iterdir(self) -> Iterator[BucketPath]:
        """The objects and folders directly in here, by name.

        Raises:
          FileNotFoundError: there are none.
        """
        found = {entry["name"].rstrip("/").rpartition("/")[2] for entry in request(self.url, "ls", detail=True)}
        return (self / name for name in sorted(found - {"", self.name}))

    def read_bytes(self) -> bytes:
        """The content of an object. Raises FileNotFoundError, OSError."""
        return bytes(request(self.url, "cat_file"))

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
        request(self.url, "pipe_file", content, **self._care(content))

    def create(self, content: bytes) -> bool:
        """Write an object where there is none yet; whether that was so. Of several who try, one succeeds."""
        try:
            request(self.url, "pipe_file", content, mode="create", **self._care(content))
        except FileExistsError:
            # An answer may be lost, and the next try then finds what the first one wrote.
            return self.read_bytes() == content
        return True

    def upload(self, file: Any) -> None:
        """Write an object from a file of this machine."""
        by_gcsfs_at_once = scheme_of(self.url) == "gs" and os.path.getsize(file) < ONE_REQUEST
        if by_gcsfs_at_once and is_spoilt(content := Path(file).read_bytes()):
            self.write_bytes(content)
        else:
            request(self.url, "put_file", str(file), **self._care())

    def _care(self, content: bytes = b"") -> dict[str, Any]:
        """What makes gcsfs compare what arrived, and send what its boundaries would spoil as a chunk, without them."""
        if scheme_of(self.url) != "gs":
            return {}
        return {"consistency": "md5", **({"chunksize": len(content)} if is_spoilt(content) else {})}

    def download(self, file: Any) -> None:
        """Write a file of this machine from an object."""
        request(self.url, "get_file", str(file))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            request(self.url, "rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def stat(self) -> Entry:
        """Of an object. Raises FileNotFoundError, OSError."""
        return entry_of(request(self.url, "info"))

    def walk(self) -> dict[str, Entry]:
        """All objects below here, by their names from here on, as one listing of the bucket brings them."""
        try:
            found = request(self.url, "find", detail=True, withdirs=False)
        except FileNotFoundError:
            return {}
        start = f"{self.url.partition('://')[2]}/"
        names = (name for name in sorted(found) if name.startswith(start) and not name.endswith("/"))
        return {name.removeprefix(start): entry_of(found[name]) for name in names}


def is_spoilt(content: bytes) -> bool:
    """Whether it is not what arrives if gcsfs sends it in one request."""
    return content.endswith(b"\r") or BOUNDARY in content


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
