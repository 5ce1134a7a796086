"""Pictures of a report, small and inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import PIL.Image
from PIL import features

from jaxsft.interpret.mistakes import Mistake
from jaxsft.interpret.report.page import Html, attribute, escape, paragraph
from jaxsft.interpret.report.reported import Gallery

SIDE = 128  # px, the longer one
EXACT = 64  # px: pictures up to this are kept bit for bit where that takes no more than MOST_BYTES, and shown enlarged
MOST_BYTES = 4500  # of a picture: a hundred of them leave the page below its 2 MB
QUALITIES = (80, 50, 20)  # from the best, until a picture is small enough; the last resort is half the side


def encoded(image: PIL.Image.Image) -> str:
    """An image of up to SIDE px as an address that holds it: WebP, or where PIL lacks that PNG and JPEG."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    has_webp = features.check("webp")
    lossy = "webp" if has_webp else "jpeg"
    attempts: list[tuple[str, dict[str, Any]]] = [(lossy, {"quality": quality}) for quality in QUALITIES]
    if max(image.size) <= EXACT:
        fast = {"lossless": True, "method": 1, "quality": 0}  # a fifth of the time, and 1 % more bytes
        attempts.insert(0, ("webp", fast) if has_webp else ("png", {}))
    for kind, options in attempts:
        file = io.BytesIO()
        image.save(file, kind.upper(), **options)
        if file.tell() <= MOST_BYTES:
            break
    else:
        file = io.BytesIO()
        image.reduce(2).save(file, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def gallery(shown: Gallery, caption: Callable[[Mistake], Html], alternative: Callable[[Mistake], str]) -> Html:
    """Pictures side by side, each with its caption, and for those who can't see it what stands for it."""
    items = []
    for one in shown.pictures:
        small = max(one.image.size) <= EXACT
        image = (
            f'<img src="{encoded(one.image)}" alt="{escape(alternative(one))}"{attribute("title", one.file)}'
            f'{attribute("class", "exact" if small else "")} decoding="async">'
        )
        items.append(f"<li><figure>{image}<figcaption>{caption(one)}</figcaption></figure></li>")
    body = f'<ul class="gallery">{"".join(items)}</ul>' if items else ""
    return Html(body + (paragraph(shown.missing, "note") if shown.missing else ""))
