"""int8: an ONNX network whose weights and activations are whole numbers of 8 bits, their scales set by images.

Post-training quantisation by ONNX Runtime's quantiser, in the form of pairs of QuantizeLinear and DequantizeLinear
(QDQ), which is standard ONNX: any runtime computes it, and one that has integer kernels fuses the pairs into them.

The convolutions and products have weights of 8 bits and a scale for each output channel; what goes into them is 8 bits
with one scale and zero point, from the least and largest value that it takes on the images. All else, such as
normalisation that can't be folded into a product, softmax and mean, stays in float32.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxsft.cli import UserError

# Products, and what lies between them and is done on 8 bits as exactly as on floats, or nearly: sums of a residual
# network, maxima, concatenations.
QUANTISED = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "Concat", "Split", "Transpose", "Reshape")


def quantised(model: bytes, batches: Iterable[np.ndarray]) -> bytes:
    """An ONNX file in int8, of the same input, outputs and metadata.

    Args:
      model: an ONNX file in float32, with one input.
      batches: for calibration, each as the model takes its input. They are gone through once.

    Returns:
      A file that holds each weight once, in 8 bits, and no names but those of its input and outputs.

    Raises:
      UserError: onnxruntime is missing.
    """
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise UserError("onnxruntime is not installed", "pip install 'jaxsft[onnx]'") from None
    given = onnx.load_from_string(model)
    (image,) = given.graph.input
    with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder, quiet():
        source, ready, out = (Path(folder) / f"{name}.onnx" for name in ("source", "ready", "int8"))
        source.write_bytes(model)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            out,
            reader(image.name, batches),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        found = onnx.load(out)
    del found.metadata_props[:]
    found.metadata_props.extend(given.metadata_props)
    found.producer_name, found.producer_version = given.producer_name, given.producer_version
    return slim(found).SerializeToString()


def reader(name: str, batches: Iterable[np.ndarray]) -> Any:
    """The quantiser's form of batches for the input `name`."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    return Reader()


def slim(model: Any) -> Any:
    """An `onnx.ModelProto`, changed in place: each constant once, and names that nobody asks for as short as can be.

    The names that the exporter and the quantiser give to tensors and nodes, and the exporter's notes on each node of
    the Python line that it comes from, are more than a tenth of a network of 300,000 weights in int8.
    """
    graph = model.graph
    del graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    del graph.metadata_props[:]
    kept = {value.name for value in (*graph.input, *graph.output)}
    used = {name for node in graph.node for name in node.input} | kept
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    constants = []
    for constant in graph.initializer:
        name = constant.name
        constant.name = constant.doc_string = ""
        del constant.metadata_props[:]
        same[name] = first.setdefault(constant.SerializeToString(deterministic=True), name)
        constant.name = name
        if same[name] == name and name in used:
            constants.append(constant)
    short: dict[str, str] = {}

    def shortened(name: str) -> str:
        name = same.get(name, name)
        return name if name in kept or not name else short.setdefault(name, format(len(short), "x"))

    for constant in constants:
        constant.name = shortened(constant.name)
    constants = [type(constant).FromString(constant.SerializeToString()) for constant in constants]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        node.input[:], node.output[:] = (list(map(shortened, names)) for names in (node.input, node.output))
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the quantiser's hints, which it logs as warnings of the root logger, from the terminal."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
