"""Download and prepare a TFDS set as array_record, which training then reads without TensorFlow.

python -m jaxsft.data.prepare cifar10 [--data-dir DIR]

Needs the extra [tfds]: preparing is the one thing TFDS does with TensorFlow.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from jaxsft import cli, storage
from jaxsft.data.tfds import find_builder, own_tfds, reason


def prepare(name: str, data_dir: str) -> str:
    """Prepare `name` under `data_dir` ('' is TFDS's default); where it lies then.

    Raises:
      UserError: no such set, no TensorFlow, or it could not be downloaded or prepared.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise cli.UserError("TensorFlow is not installed", "install the extra: pip install 'jaxsft[tfds]'")
    import requests

    tfds = own_tfds()
    builder = find_builder(name, data_dir, file_format="array_record")
    try:
        for url in list(builder.url_infos or ())[:1]:  # TFDS itself would retry an absent network for minutes
            requests.head(url, timeout=20, allow_redirects=True)
        builder.download_and_prepare()
    except (requests.RequestException, tfds.download.DownloadError, OSError) as error:
        raise cli.UserError(f"tfds:{name} could not be fetched ({cause(error)})", cli.OFFLINE) from None
    except (AssertionError, ImportError, ValueError) as error:  # files to be fetched by hand, packages that it needs
        raise cli.UserError(f"tfds:{name} could not be prepared: {reason(error)}", "see TFDS's catalog") from None
    return str(builder.data_path)


def cause(error: BaseException) -> str:
    """The innermost reason of a failed request, without the layers that pass it on."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    inner = getattr(error, "reason", None)
    return (str(inner or error).splitlines() or [type(error).__name__])[0].rpartition("): ")[2][:200]


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="as TFDS writes it, such as cifar10")
    parser.add_argument("--data-dir", type=storage.location, help="TFDS's data directory, also in a bucket")
    args = parser.parse_args()
    if not storage.is_remote(str(args.data_dir)):
        cli.say(prepare(args.name, str(args.data_dir or "")))
        return
    with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder:
        made = prepare(args.name, folder)
        try:
            storage.upload(Path(folder), args.data_dir, last="dataset_info.json")
        except OSError as error:
            raise cli.UserError(f"{args.data_dir} can't be written: {error.strerror}", "name another") from None
        cli.say(args.data_dir / Path(made).relative_to(folder))


if __name__ == "__main__":
    cli.run(main)
