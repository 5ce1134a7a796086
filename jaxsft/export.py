"""Hand a run's model on: to PyTorch, ONNX, any JAX runtime, or the Hugging Face hub; and its model card.

python -m jaxsft.export --workdir DIR --format FORMAT --out FILE [--checkpoint best]

torch (.pth), safetensors   torchvision's names: torchvision.models.ARCH(num_classes=K).load_state_dict takes them
stablehlo                   images to logits for CPU, CUDA and TPU: jax.export.deserialize(FILE's bytes).call(images)
onnx                        images to logits for onnxruntime and others
int8 (.int8.onnx)           the same, quantised: weights and activations of 8 bits, calibrated on training images
hf                          a folder for the hub: model.safetensors, config.json, README.md
card                        MODEL_CARD.md (.md)

stablehlo takes uint8 [n, S, S, 3], RGB, any n: pictures as evaluation resizes and crops them; dividing by 255 and
normalising are inside. So does onnx with --preprocessing inside, else float32 [n, 3, S, S], normalised. With
--image-size HxW both take pictures of that size, uint8 [n, H, W, 3], and resize and crop them, too. int8 takes what
onnx does, but for --image-size. Logits are plain.

Before it is done, what was written is read back and compared with the model on images of the run's evaluation split, or
on --images, and it is removed where it does not agree. Of int8 the accuracy on all of that split is said, beside that
of float32. A run with a moving average gives its average.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from jaxsft import cli, storage
from jaxsft.cli import UserError
from jaxsft.run import model_card, quantised
from jaxsft.run.machine import keep_compilations
from jaxsft.run.real_images import real_images
from jaxsft.run.saved import Run, load_run
from jaxsft.ship import check, hf, onnx_file, stablehlo, state_dict
from jaxsft.ship.check import Model, Pictures
from jaxsft.storage import Location

INSIDE, OUTSIDE = "inside", "outside"
LARGEST = 4096  # px of a side
MOST_LOST = 1.0  # points of accuracy, in per cent, that int8 may cost without a warning


@dataclasses.dataclass(frozen=True)
class How:
    """What may be chosen of a form, and what it is checked on."""

    preprocessing: str = ""  # INSIDE, OUTSIDE; '': as the form has it by itself
    image_size: tuple[int, int] | None = None  # (height, width) in px of pictures that are resized inside
    images: Sequence[Location] = ()  # to compare on; none: the run's own
    calibrate: int = 0  # training images that int8 is calibrated on; 0: as many as it has by itself


def write_weights(run: Run, out: Path, how: How) -> str:
    """Write a torchvision state_dict, and say how it is read and that it agrees."""
    pictures = real_images(run, how.images)
    state_dict.write(out, run.variables, run.card, run.step)
    said = check.check_state_dict(out, model_of(run), pictures)
    return f"{state_dict.network_call(run.card)} loads it strictly; {said}"


def write_stablehlo(run: Run, out: Path, how: How) -> str:
    """Write images -> logits as a serialized `jax.export.Exported`, and say how it is read and that it agrees."""
    pictures = real_images(run, how.images, how.image_size)
    products = run.config.train.matmul_precision
    made = stablehlo.to_stablehlo(
        run.variables, run.card, matmul_precision=products, step=run.step, image_size=how.image_size
    )
    out.write_bytes(made)
    said = check.check_stablehlo(out, model_of(run), pictures)
    return f"jax.export.deserialize takes its bytes; {taken(pictures, run)}; {said}"


def write_onnx(run: Run, out: Path, how: How) -> str:
    """Write images -> logits as an ONNX file, and say what it takes and that it agrees."""
    inside = how.preprocessing == INSIDE or how.image_size is not None
    check.import_onnxruntime()
    pictures = real_images(run, how.images, how.image_size)
    out.write_bytes(onnx_file.to_onnx(run.variables, run.card, inside=inside, step=run.step, image_size=how.image_size))
    said = check.check_onnx(out, model_of(run), pictures, inside=inside)
    crop = run.card.preprocessing.crop_size
    takes = taken(pictures, run) if inside else f"float32 [n, 3, {crop}, {crop}] to [n, {run.card.num_classes}]"
    return f"{onnx_file.INPUT} {takes}; {said}"


def write_int8(run: Run, out: Path, how: How) -> str:
    """Write images -> logits as an ONNX file in int8, and say how large and how right it is, and float32's."""
    check.import_onnxruntime()
    files = quantised.onnx_files(run, inside=how.preprocessing == INSIDE, calibrate=how.calibrate)
    out.write_bytes(files.int8)
    cost = quantised.cost(run, files)
    if cost.points > MOST_LOST:
        cli.warn(f"int8 is {cost.points:.1f} points behind float32; some networks need training for it")
    return str(cost)


def write_folder(run: Run, out: Path, how: How) -> str:
    """Fill a folder for Hugging Face's hub, and say whose it is and that it agrees."""
    pictures = real_images(run, how.images)
    hf.write(out, run.variables, run.card, run.step)
    said = check.check_state_dict(out / hf.WEIGHTS, model_of(run), pictures)
    library, usage = hf.library(run.card.arch), hf.usage(run.card)
    (out / hf.CARD).write_text(card_of(run, library=library, usage=usage), encoding="utf-8", errors="replace")
    return f"a model of {library}'s; {said}"


def write_card(run: Run, out: Path, how: How) -> str:
    """Write MODEL_CARD.md."""
    out.write_text(card_of(run), encoding="utf-8", errors="replace")
    return "its model card"


def card_of(run: Run, **more: str) -> str:
    """The model card of a run; `more` are fields of `ship.card.Facts`."""
    return model_card.of_run(run.workdir, run.config, run.card, run.variables, run.step, **more)


def model_of(run: Run) -> Model:
    """What is exported of a run."""
    return Model(run.variables, run.card, run.step)


def taken(pictures: Pictures, run: Run) -> str:
    """What a program takes that preprocesses, and what it gives."""
    height, width = pictures.images.shape[1:3]
    return f"uint8 [n, {height}, {width}, 3] to [n, {run.card.num_classes}]"


Writer = Callable[[Run, Path, How], str]  # raises Stop: what it wrote does not agree with the model
# format -> (the ending of its file, '': it is a folder; how it is written; the options that it has)
FORMATS: Mapping[str, tuple[str, Writer, tuple[str, ...]]] = MappingProxyType(
    {
        "torch": (state_dict.PTH, write_weights, ()),
        "safetensors": (state_dict.SAFETENSORS, write_weights, ()),
        "stablehlo": (".stablehlo", write_stablehlo, ("image_size",)),
        "onnx": (".onnx", write_onnx, ("image_size", "preprocessing")),
        "int8": (".int8.onnx", write_int8, ("calibrate", "preprocessing")),
        "hf": ("", write_folder, ()),
        "card": (".md", write_card, ()),
    }
)


def write(run: Run, out: Location, form: str = "", how: How = How()) -> None:
    """Write a run's model, and say how it is read.

    Args:
      run: whose.
      out: a new file, or for 'hf' a new folder.
      form: of FORMATS; '': the one whose ending `out` has.
      how: what may be chosen.

    Raises:
      UserError: there is no such form, it has another ending or no such option, or the file exists or can't be written.
      Stop: what was written does not agree with the model, and is gone again.
    """
    form = form or form_of(out)
    check_options(form, out, how)
    suffix, writer, _ = FORMATS[form]
    with storage.new_file(out) if suffix else storage.new_directory(out, last=hf.CONFIG) as partial:
        said = writer(run, partial, how)
    cli.say(f"{out}: {run.card.arch} at step {run.step}; {said}")


def form_of(out: Location) -> str:
    """The form that a file's ending means. Raises UserError."""
    found = {suffix: form for form, (suffix, *_) in FORMATS.items() if suffix}
    endings = [suffix for suffix in found if out.name.endswith(suffix)]
    if not endings:
        raise UserError(f"{out} is no name of an export", f"let it end in one of {', '.join(found)}")
    return found[max(endings, key=len)]  # .int8.onnx ends in .onnx, too


def check_options(form: str, out: Location, how: How) -> None:
    """Raise a UserError where a form is not known, or does not go with what else was asked for."""
    if form not in FORMATS:
        raise UserError(f"--format {form} is not supported", f"known: {', '.join(FORMATS)}")
    suffix, _, options = FORMATS[form]
    if suffix and (not out.name.endswith(suffix) or form_of(out) != form):
        raise UserError(f"--out {out} is no name for --format {form}", f"let it end in {suffix}")
    for option in ("image_size", "preprocessing", "calibrate"):
        if getattr(how, option) and option not in options:
            known = ", ".join(name for name, (*_, has) in FORMATS.items() if option in has)
            raise UserError(f"--format {form} has no --{option.replace('_', '-')}", f"leave it out; it is for {known}")
    if how.preprocessing not in ("", INSIDE, OUTSIDE):
        raise UserError(f"--preprocessing is {how.preprocessing!r}", f"it must be {INSIDE} or {OUTSIDE}")
    if how.preprocessing == OUTSIDE and how.image_size:
        raise UserError("--image-size resizes inside, and --preprocessing is outside", "leave out one of them")


def size(text: str) -> tuple[int, int]:
    """Argparse's `type` for HEIGHTxWIDTH in px."""
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not match or not all(0 < int(side) <= LARGEST for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text} is no HEIGHTxWIDTH in px, such as 480x640, up to {LARGEST}")
    return int(match[1]), int(match[2])


def whole(text: str) -> int:
    """Argparse's `type` for a number of things: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def main() -> None:
    parser = cli.Parser(
        prog="python -m jaxsft.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=storage.location)
    parser.add_argument("--checkpoint", default="last", help="last, best or a step; default: %(default)s")
    parser.add_argument("--format", required=True, help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, type=storage.location)
    parser.add_argument("--preprocessing", default="", help="of onnx and int8: inside or outside (default)")
    parser.add_argument("--image-size", type=size, metavar="HxW", help="px of pictures that are resized inside")
    parser.add_argument(
        "--images", nargs="+", type=storage.location, default=[], help="files and folders to compare on, not the run's"
    )
    parser.add_argument(
        "--calibrate", type=whole, default=0, metavar="N", help=f"training images for int8 ({quantised.CALIBRATE})"
    )
    args = parser.parse_args()
    how = How(args.preprocessing, args.image_size, args.images, args.calibrate)
    check_options(args.format, args.out, how)
    keep_compilations()
    write(load_run(args.workdir, args.checkpoint), args.out, args.format, how)


if __name__ == "__main__":
    cli.run(main)
