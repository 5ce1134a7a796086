"""A tuned model as one ONNX file, made by torch's exporter from torch's own network of the same weights.

There is no way from JAX to ONNX that fits beside what this program needs, so the exported state_dict is loaded strictly
into the network of torchvision's, and that is traced; what comes out is held against our logits, not torch's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert import files, names
from convert.reference import torch_network
from jaxsft.cli import UserError
from jaxsft.data.resize import BITS, HEIGHT, WIDTH, passes, weights
from jaxsft.models.weights import ModelCard, Preprocessing
from jaxsft.ship.facts import BATCH, as_text, facts, taken

INPUT, OUTPUT = "images", "logits"
MOST_BYTES = 2**31 - 2**20  # protobuf ends at 2 GiB; the rest is for the graph
EXAMPLES = 2  # images that the network is traced with; with one, torch would take the batch for a constant


def to_onnx(
    variables: Mapping[str, Any],
    card: ModelCard,
    *,
    inside: bool,
    step: int = 0,
    image_size: tuple[int, int] | None = None,
) -> bytes:
    """A model as an ONNX file's bytes: input "images", output "logits" float32 [n, num_classes], any n.

    The metadata_props are `facts.as_text` of its facts. Batch norm is folded into convolutions by the exporter.

    Args:
      variables: {"params", "batch_stats"}, float32.
      card: of them.
      inside: whether the preprocessing is part of the graph. If so "images" is uint8 [n, crop_size, crop_size, 3], RGB,
        resized and cropped as `data.decode.middle` does, and is divided by 255 and normalised inside; else it is
        float32 [n, 3, crop_size, crop_size], normalised.
      step: of the run, for the metadata.
      image_size: (height, width) in px of pictures as they come, uint8 [n, height, width, 3], which are resized and
        cropped inside, too; None: they have been. Only with `inside`.

    Raises:
      UserError: an optional package is missing, torch has no network of this architecture, or it is over 2 GiB.
    """
    torch = files.import_torch()
    onnx = import_onnx()
    tensors = names.to_torch(variables, card.arch)
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > MOST_BYTES:
        raise UserError(f"{card.arch} takes {size / 2**30:.1f} GiB, and an ONNX file at most 2", "export it otherwise")
    crop = card.preprocessing.crop_size
    network = torch_network(card.arch, card.num_classes, crop)
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, strict=True)
    network.eval()
    if inside:
        network = with_preprocessing(network, card.preprocessing, image_size)
        height, width = image_size or (crop, crop)
        example = torch.zeros(EXAMPLES, height, width, 3, dtype=torch.uint8)
        images = taken(card.preprocessing, image_size)
    else:
        example = torch.zeros(EXAMPLES, 3, crop, crop)
        images = f"float32 [{BATCH}, 3, {crop}, {crop}], RGB, resized, cropped and normalised"
    with quiet():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            verbose=False,
        )
    model = program.model_proto
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # lines of torch's source, where it lies on this machine, names of its own
    found = facts(variables, card, step, images)
    model.producer_name, model.producer_version, model.doc_string = "jaxsft", found["jaxsft"], ""
    onnx.helper.set_model_props(model, as_text(found))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def import_onnx() -> Any:
    """The onnx module.

    Raises:
      UserError: it, or what torch's exporter is made of, is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch asks for it in the middle of its work)
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", "pip install 'jaxsft[onnx]'") from None
    return onnx


def with_preprocessing(network: Any, to: Preprocessing, image_size: tuple[int, int] | None) -> Any:
    """torch's network of pictures uint8 [n, height, width, 3] that `network` takes once they are normalised."""
    import torch

    class Preprocessed(torch.nn.Module):
        """Resizes and crops as PIL does on 8 bits, in the passes that `resizing` says, and normalises."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            for name, values in (("mean", to.mean), ("std", to.std)):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])
            self.axes = []
            for axis, matrix in resizing(image_size, to) if image_size else ():
                self.axes.append(axis)
                self.register_buffer(f"matrix_{axis}", torch.from_numpy(matrix))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.permute(0, 3, 1, 2)
            if self.axes:
                x = x.to(torch.float64)  # which holds the sums in fixed point exactly
            for axis in self.axes:
                matrix = getattr(self, f"matrix_{axis}")
                sums = matrix @ x if axis == HEIGHT else x @ matrix.T
                x = torch.floor(sums / (1 << BITS) + 0.5).clamp(0, 255)
            return self.network((x.to(torch.float32) / 255 - self.mean) / self.std)

    return Preprocessed().eval()


def resizing(image_size: tuple[int, int], to: Preprocessing) -> list[tuple[int, np.ndarray]]:
    """The passes by which pictures of one size become what `augment.preprocess` cuts out of them, to the last bit.

    Returns:
      In their order the axis, HEIGHT or WIDTH, and the weights of each pixel along it, float64 [crop_size, side]: whole
      numbers in units of 2**-BITS.
    """
    short = min(image_size)
    size = (to.resize_size * image_size[0] // short, to.resize_size * image_size[1] // short)
    order = passes(image_size, size, to.interpolation)
    found = []
    for axis in (*order, *(axis for axis in (HEIGHT, WIDTH) if axis not in order)):
        side, resized = image_size[axis - 1], size[axis - 1]
        whole = weights(side, resized, to.interpolation) if axis in order else np.eye(side, dtype=np.int64) << BITS
        first = round((resized - to.crop_size) / 2)
        found.append((axis, whole[first : first + to.crop_size].astype(np.float64)))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let torch's exporter say nothing: it warns of its own parts, and prints how far it is."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
