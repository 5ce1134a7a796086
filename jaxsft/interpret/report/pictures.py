"""Pictures of a report, small and inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import PIL.Image
from PIL import features

from jaxsft.interpret.mistakes import Mistake
from jaxsft.interpret.report.page import Html, attribute, escape, paragraph
from jaxsft.interpret.report.reported import Gallery

SIDE = 128  # px, the longer one
EXACT = 64  # px: pictures up to this are kept bit for bit, and shown enlarged
QUALITY = 80  # of larger ones


def encoded(image: PIL.Image.Image) -> str:
    """An image of up to SIDE px as an address that holds it: WebP, or where PIL lacks that PNG and JPEG."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    exact, file = max(image.size) <= EXACT, io.BytesIO()
    if features.check("webp"):
        kind = "webp"
        image.save(file, "WEBP", lossless=exact, quality=QUALITY, method=4)
    else:
        kind = "png" if exact else "jpeg"
        image.save(file, kind.upper(), **({} if exact else {"quality": QUALITY}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def gallery(shown: Gallery, caption: Callable[[Mistake], Html], alternative: Callable[[Mistake], str]) -> Html:
    """Pictures side by side, each with its caption, and for those who can't see it what stands for it."""
    items = []
    for one in shown.pictures:
        small = max(one.image.size) <= EXACT
        image = (
            f'<img src="{encoded(one.image)}" alt="{escape(alternative(one))}"{attribute("title", one.file)}'
            f'{attribute("class", "exact" if small else "")} loading="lazy">'
        )
        items.append(f"<li><figure>{image}<figcaption>{caption(one)}</figcaption></figure></li>")
    body = f'<ul class="gallery">{"".join(items)}</ul>' if items else ""
    return Html(body + (paragraph(shown.missing, "note") if shown.missing else ""))
