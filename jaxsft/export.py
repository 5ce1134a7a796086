"""Hand a run's weights on: to PyTorch, or as a compiled function for any JAX runtime.

python -m jaxsft.export --workdir DIR --format torch|safetensors|stablehlo --out FILE [--checkpoint best]

torch (.pth) and safetensors hold torchvision's names: torchvision.models.ARCH(num_classes=K).load_state_dict takes them
strictly. stablehlo is `jax.export`'s form, weights included: uint8 images [N, S, S, 3] of any N, S the run's image
size, to float32 logits [N, K] on CPU, CUDA and TPU; `jax.export.deserialize(FILE's bytes).call(images)` runs it, within
the six months over which JAX keeps the form readable. A run with a moving average gives its average.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from convert import checkpoints, names
from jaxsft import cli, storage
from jaxsft.data.augment import preprocess
from jaxsft.models.precision import with_products
from jaxsft.run.machine import keep_compilations
from jaxsft.run.saved import Run, load_run
from jaxsft.storage import Location

PLATFORMS = ("cpu", "cuda", "tpu")


def write_weights(run: Run, out: Location) -> str:
    """Write a torchvision state_dict, and say how it is read.

    Raises:
      UserError: the file exists or can't be written.
    """
    checkpoints.write(out, names.to_torch(run.variables, run.card.arch))
    return f"torchvision.models.{run.card.arch}(num_classes={run.card.num_classes}).load_state_dict takes it strictly"


def write_stablehlo(run: Run, out: Location) -> str:
    """Write images -> logits as a serialized `jax.export.Exported`, and say how it is read.

    Raises:
      UserError: the file exists or can't be written.
    """
    size = run.card.preprocessing.crop_size

    def logits(images: jax.Array) -> jax.Array:
        return run.model.apply(run.variables, preprocess(images, run.card.preprocessing), train=False)

    (count,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8)
    step = jax.jit(with_products(logits, run.config.train.matmul_precision))
    exported = jax.export.export(step, platforms=PLATFORMS)(images)
    with storage.new_file(out) as partial:
        partial.write_bytes(exported.serialize())
    return f"jax.export.deserialize takes its bytes; uint8 [n, {size}, {size}, 3] to [n, {run.card.num_classes}]"


# format -> (the file's ending, how it is written)
FORMATS: Mapping[str, tuple[str, Callable[[Run, Location], str]]] = MappingProxyType(
    {
        "torch": (".pth", write_weights),
        "safetensors": (".safetensors", write_weights),
        "stablehlo": (".stablehlo", write_stablehlo),
    }
)


def write(run: Run, out: Location) -> None:
    """Write a run's weights in the form that the name of `out` ends in, and say how they are read.

    Raises:
      UserError: no form has such an ending, or the file exists or can't be written.
    """
    by_ending = dict(FORMATS.values())
    if out.suffix not in by_ending:
        raise cli.UserError(f"{out} is no name of an export", f"let it end in one of {', '.join(by_ending)}")
    cli.say(f"{out}: {run.card.arch} at step {run.step}; {by_ending[out.suffix](run, out)}")


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, type=storage.location)
    args = parser.parse_args()
    if args.format not in FORMATS:
        raise cli.UserError(f"--format {args.format} is not supported", f"known: {', '.join(FORMATS)}")
    suffix, _ = FORMATS[args.format]
    if args.out.suffix != suffix:
        raise cli.UserError(f"--out {args.out} is no name for --format {args.format}", f"let it end in {suffix}")
    keep_compilations()
    write(load_run(args.workdir, args.checkpoint), args.out)


if __name__ == "__main__":
    cli.run(main)
