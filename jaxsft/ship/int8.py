"""int8: an ONNX network whose weights and activations are whole numbers of 8 bits, their scales set by images.

Post-training quantisation by ONNX Runtime's quantiser, as pairs of QuantizeLinear and DequantizeLinear (QDQ). That is
standard ONNX, which any runtime computes, and one that has integer kernels fuses the pairs into them.

Products have weights of 8 bits, with a scale for each output channel, and biases of 32. What goes into them is 8 bits
with one scale and one zero point, from the least and the largest value that it takes on the images. All else, such as
softmax, a mean, or a normalisation that folds into no product, the preprocessing before the first convolution, and the
logits, stays in float32.

Weights lie in -64..64. An x86 CPU without VNNI adds pairs of 8-bit products in 16 bits and cuts what does not fit;
255 * 64 * 2 fits, so that the file computes the same there, on a CPU with VNNI, and on ARM.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxsft.cli import UserError

FACT = "quantisation"  # under which the file says how it was made
# Products, and what is done on 8 bits nearly as exactly as on floats: the sums of residual networks, maxima, and what
# only moves numbers. Where these stayed in float32, each would turn its input back and its output again.
KINDS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "Concat", "Split", "Transpose", "Reshape")


def quantised(model: bytes, batches: Iterable[np.ndarray]) -> bytes:
    """An ONNX file in int8, of the same input, output and metadata, and to the latter `quantisation` is added.

    Args:
      model: an ONNX file in float32, with one input, below 2 GiB.
      batches: for calibration, each as the model takes its input; gone through once.

    Returns:
      A file that holds each constant once and no names but those of its input and output.

    Raises:
      UserError: onnx or onnxruntime is missing.
    """
    try:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", "pip install 'jaxsft[onnx]'") from None
    given = onnx.load_from_string(model)
    (image,) = given.graph.input
    with tempfile.TemporaryDirectory(prefix="jaxsft-") as folder, quiet():
        source, ready, out = (Path(folder) / f"{name}.onnx" for name in ("source", "ready", "int8"))
        source.write_bytes(model)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        prepared = onnx.load(ready)
        before = named_before_convolution(prepared.graph)
        onnx.save(prepared, ready)
        reader = read_by(quantization.CalibrationDataReader, image.name, batches)
        quantization.quantize_static(
            ready,
            out,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(KINDS),
            nodes_to_exclude=before,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},  # logits of 255 steps would have ties
        )
        found = onnx.load(out)
    how = {"weights": "int8, -64..64, by output channel", "activations": "uint8", "calibrated_on": reader.count}
    said = {entry.key: entry.value for entry in given.metadata_props}
    del found.metadata_props[:]
    onnx.helper.set_model_props(found, {**said, FACT: json.dumps(how)})
    found.producer_name, found.producer_version = given.producer_name, given.producer_version
    slim(found)
    onnx.checker.check_model(found)
    return found.SerializeToString()


def named_before_convolution(graph: Any) -> list[str]:
    """The names of the nodes of an `onnx.GraphProto` before its first convolution; one without a name gets one.

    Every network here begins with a convolution. What comes before is the preprocessing, which may resize by products.
    """
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"
    return [node.name for node in itertools.takewhile(lambda node: node.op_type != "Conv", graph.node)]


def read_by(kind: type, name: str, batches: Iterable[np.ndarray]) -> Any:
    """The quantiser's form, a `kind`, of batches for the input `name`; its `count` is that of the images so far."""

    class Reader(kind):
        def __init__(self) -> None:
            self.batches, self.count = iter(batches), 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            self.count += len(batch)
            return {name: batch}

    return Reader()


def slim(model: Any) -> None:
    """Change an `onnx.ModelProto`: each constant once, and names that nobody asks for as short as can be.

    The names that the exporter and the quantiser give to tensors and nodes, and shapes of what lies between, are an
    eighth of a network of 300,000 weights in int8.
    """
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    domains = {node.domain for node in graph.node}
    opsets = [opset for opset in model.opset_import if opset.domain in domains | {""}]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    kept = {value.name for value in (*graph.input, *graph.output)}
    used = {name for node in graph.node for name in node.input}
    first: dict[bytes, str] = {}  # the content of a constant -> the first one's name
    same: dict[str, str] = {}
    short: dict[str, str] = {}

    def shortened(name: str) -> str:
        name = same.get(name, name)
        return name if name in kept or not name else short.setdefault(name, format(len(short), "x"))

    constants = [constant for constant in graph.initializer if constant.name in used | kept]
    for constant in constants:
        name, constant.name, constant.doc_string = constant.name, "", ""
        same[name] = name if name in kept else first.setdefault(constant.SerializeToString(deterministic=True), name)
        constant.name = name
    copies = []
    for constant in constants:
        if same[constant.name] == constant.name:
            copies.append(type(constant).FromString(constant.SerializeToString()))
            copies[-1].name = shortened(constant.name)
    del graph.initializer[:]
    graph.initializer.extend(copies)
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        node.input[:], node.output[:] = (list(map(shortened, names)) for names in (node.input, node.output))


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
