"""Port weights between torchvision and Flax.

python -m convert to-flax  WEIGHTS --arch ARCH --out DIR    WEIGHTS: IMAGENET1K_V1 ... | a .pth or .safetensors file
python -m convert to-torch DIR --out FILE.pth|FILE.safetensors
python -m convert verify   DIR --against WEIGHTS
python -m convert list
"""

from __future__ import annotations

import argparse
from functools import partial

import jax
import numpy as np

from convert import checkpoints, files, names
from convert.porting import to_flax, to_torch
from convert.reference import torchvision_model
from jaxsft import cli, storage
from jaxsft.models import weights
from jaxsft.models.families import ARCHITECTURES, family_of
from jaxsft.storage import Location

LOGIT_TOLERANCE = 1e-5  # of the largest logit: a few hundred float32 roundings of 6e-8, what summation order costs


def verify(directory: Location, against: str, image_size: int | None = None) -> int:
    """Hold a ported directory against its source: every tensor bit for bit, logits in evaluation and in training.

    `image_size` (px) None is the weights' own. Returns 0 when all agree and 1 when not, after printing one line a
    quantity.
    """
    variables, card = weights.load(directory)
    own = card.preprocessing.crop_size
    image_size = image_size or own
    if image_size < 32:
        raise cli.UserError(f"--image-size is {image_size}", "the smallest is 32")
    tensors, _ = checkpoints.read(against, card.arch)
    ported = names.to_torch(variables, card.arch)
    differing = [
        name
        for name in sorted(tensors.keys() | ported.keys())
        if name not in tensors or name not in ported or not np.array_equal(tensors[name], ported[name])
    ]
    cli.say(f"tensors      {len(ported)}, differing: {', '.join(differing) or 'none'}")
    passed = not differing
    if card.num_classes == 0:
        cli.say("logits       none, there is no head")
        return 0 if passed else 1

    model = ARCHITECTURES[card.arch](num_classes=card.num_classes)
    if image_size != own and family_of(card.arch).resized:
        raise cli.UserError(f"--image-size is {image_size}", f"these weights of {card.arch} are for {own} px")
    # Four images: in training the last stage then still normalises over a hundred values a channel, not over a few,
    # whose tiny variance would magnify rounding.
    images = np.random.default_rng(0).standard_normal((4, image_size, image_size, 3), np.float32)
    for train in (False, True):
        with jax.default_matmul_precision("highest"):
            logits, _ = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))(variables, images)
        expected = torchvision_logits(card, tensors, images, train)
        largest = np.abs(expected).max() or 1.0  # of a head of zeros all logits are 0
        relative = float(np.abs(np.asarray(logits) - expected).max() / largest)
        ok = relative <= LOGIT_TOLERANCE
        passed &= ok
        mode, verdict = ("train" if train else "eval"), ("ok" if ok else "FAIL")
        cli.say(f"logits {mode:5} {relative:.1e} of the largest, tolerance {LOGIT_TOLERANCE:.0e}: {verdict}")
    return 0 if passed else 1


def torchvision_logits(
    card: weights.ModelCard, tensors: dict[str, np.ndarray], images: np.ndarray, train: bool
) -> np.ndarray:
    """Logits [N, classes] of torchvision's model for NHWC images; `train`: by batch statistics, nothing dropped."""
    model = torchvision_model(card.arch, card.num_classes, card.preprocessing.crop_size)
    import torch
    from torchvision.ops import StochasticDepth

    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    model.train(train)
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, StochasticDepth)):
            module.eval()  # ours draws nothing where it gets no keys
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def list_registry() -> None:
    """Print torchvision's weights: arch, name, top-1 on ImageNet, parameters, size."""
    files.import_torch()
    import torchvision

    cli.say(f"{'arch':18} {'weights':26} {'top-1 %':>8} {'params':>11} {'MB':>6}  resize, crop, interpolation")
    for arch in ARCHITECTURES:
        if arch not in torchvision.models.list_models():
            continue
        for name, entry in checkpoints.registry(arch).items():
            meta, preset = entry.meta, entry.transforms()
            top1 = meta["_metrics"]["ImageNet-1K"]["acc@1"]
            how = f"{preset.resize_size[0]}, {preset.crop_size[0]}, {preset.interpolation.value}"
            cli.say(f"{arch:18} {name:26} {top1:8.3f} {meta['num_params']:11,d} {meta['_file_size']:6.0f}  {how}")


def main() -> int:
    parser = cli.Parser(
        prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-flax", help="port torchvision weights to a directory")
    command.add_argument("weights", help="registry name, or a file of PyTorch's or .safetensors")
    command.add_argument("--arch", required=True, help=", ".join(ARCHITECTURES))
    command.add_argument("--out", required=True, type=storage.location)
    command = commands.add_parser("to-torch", help="write a ported directory as a torchvision state_dict")
    command.add_argument("directory", type=storage.location)
    command.add_argument("--out", required=True, type=storage.location)
    command = commands.add_parser("verify", help="hold a ported directory against torchvision")
    command.add_argument("directory", type=storage.location)
    command.add_argument("--against", required=True, help="registry name, or a file of PyTorch's or .safetensors")
    command.add_argument("--image-size", type=int, help="px; default: what the weights are for")
    commands.add_parser("list", help="torchvision's weights")
    args = parser.parse_args()
    if args.command == "verify":
        return verify(args.directory, args.against, args.image_size)
    if args.command == "to-flax":
        to_flax(args.weights, args.arch, args.out)
    elif args.command == "to-torch":
        to_torch(args.directory, args.out)
    else:
        list_registry()
    return 0


if __name__ == "__main__":
    cli.run(main)
