"""What PyTorch's users write to serve a model: FastAPI, a picture decoded and put through the network a request.

python -m jaxsft.bench.serve_reference --weights FILE.pth --card model.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from convert.make_sample import resnet10_w16
from convert.reference import torchvision_model
from jaxsft.models.weights import ModelCard
from jaxsft.ship import listener

TOPK = 5


def make_app(model: torch.nn.Module, card: ModelCard) -> FastAPI:
    """POST a form with "file" to /predict."""
    to = card.preprocessing
    transform = transforms.Compose(
        [
            transforms.Resize(to.resize_size, InterpolationMode(to.interpolation)),
            transforms.CenterCrop(to.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(to.mean, to.std),
        ]
    )
    app = FastAPI()

    def predict(file: UploadFile) -> dict[str, Any]:
        image = PIL.Image.open(file.file).convert("RGB")
        with torch.inference_mode():
            probabilities = model(transform(image)[None])[0].softmax(0)
        values, classes = probabilities.topk(min(TOPK, len(probabilities)))
        found = zip(classes.tolist(), values.tolist(), strict=True)
        return {"classes": [{"class": card.names[i], "probability": p} for i, p in found]}

    app.post("/predict")(predict)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--card", required=True, type=Path)
    args = parser.parse_args()
    card = ModelCard.of(json.loads(args.card.read_text()))
    own = card.arch == "resnet10_w16"
    classes, size = card.num_classes, card.preprocessing.crop_size
    model = resnet10_w16(classes) if own else torchvision_model(card.arch, classes, size)
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    app = make_app(model.eval(), card)
    with listener.bind("127.0.0.1", 0) as listening:
        print(f"serving {card.arch} on {listener.url_of(listening)}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    main()
