"""An ONNX file as a function, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxsft.cli import UserError
from jaxsft.data.threads import cores


def program(model: bytes | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function of a file with one input and one output, in a thread for each core; it takes what the file takes.

    Raises:
      UserError: onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed", "pip install 'jaxsft[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    content = model if isinstance(model, bytes) else model.read_bytes()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    return lambda images: session.run(None, {taken.name: images})[0]
