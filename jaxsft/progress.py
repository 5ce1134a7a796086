"""Progress bars, for a terminal and for a notebook, with its widgets or without."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any


def progress(iterable: Iterable[Any] | None = None, *, enabled: bool = True, **options: Any) -> Any:
    """A bar of tqdm's that leaves nothing behind; on stderr and only where that is a terminal, in a notebook always.

    There it is a widget, or a line of text in the cell's output where ipywidgets are not installed.

    Args:
      iterable: what to go through; None: the bar is moved by hand.
      enabled: False: no bar in any case.
      options: of tqdm.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing ipywidgets: text does as well
        from tqdm.auto import tqdm
    place: dict[str, Any] = {"disable": None}
    if "ipykernel.zmqshell" in sys.modules:  # as tqdm.auto finds out; stderr would be on red
        place = {"disable": False, "file": sys.stdout}
    if not enabled:
        place["disable"] = True
    return tqdm(iterable, leave=False, **place, **options)
