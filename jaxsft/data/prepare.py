"""Download and prepare a TFDS set as array_record, which training then reads without TensorFlow.

python -m jaxsft.data.prepare cifar10 [--data-dir DIR]

Needs the extra [tfds]: preparing is the one thing TFDS does with TensorFlow.
"""

from __future__ import annotations

import argparse
import importlib.util

from jaxsft import cli
from jaxsft.data.sources import OFFLINE, find_builder


def prepare(name: str, data_dir: str) -> None:
    """Prepare `name` under `data_dir` ('' is TFDS's default).

    Raises:
      UserError: no such set, no TensorFlow, or it could not be downloaded.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise cli.UserError("TensorFlow is not installed", "install the extra: pip install 'jaxsft[tfds]'")
    import requests
    import tensorflow_datasets as tfds

    find_builder(name, data_dir)
    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    try:
        builder.download_and_prepare()
    except (requests.RequestException, tfds.download.DownloadError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise cli.UserError(f"tfds:{name} could not be fetched ({reason[:200]})", OFFLINE) from None
    print(builder.data_path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jaxsft.data.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="as TFDS writes it, such as cifar10")
    parser.add_argument("--data-dir", default="", help="TFDS's data directory")
    args = parser.parse_args()
    prepare(args.name, args.data_dir)


if __name__ == "__main__":
    cli.run(main)
