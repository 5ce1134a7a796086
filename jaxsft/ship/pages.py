"""HTML for browsers: the policy that lets a page run its own script and nothing else, and a list of what there is."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.5 ui-monospace, monospace } h2 code { font-size: 1.1rem }
pre { white-space: pre-wrap; padding: .7rem; border: 1px solid }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; font-weight: normal }
"""


def with_policy(page: str) -> tuple[str, str]:
    """A page, and the Content-Security-Policy under which its own inline script and style run, and nothing else does.

    It may show pictures that it made itself (blob:, data:) and ask the service that it came from; it loads nothing from
    elsewhere, sends no form, and can't be framed.
    """
    allowed = {kind: " ".join(map(digest, re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL))) for kind in TAGS}
    rules = {
        "default-src": "'none'",
        "script-src": allowed["script"] or "'none'",
        "style-src": allowed["style"] or "'none'",
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in rules.items())


TAGS = ("script", "style")


def digest(content: str) -> str:
    """A script or style as a Content-Security-Policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def reference(schema: dict[str, Any], base: str) -> str:
    """A page on what the service takes and answers, made of its OpenAPI description; it needs no network.

    Args:
      schema: of FastAPI.
      base: the address that the reader sees the service at, such as http://127.0.0.1:8000/.
    """
    title = html.escape(f"{schema['info']['title']}: {schema['info'].get('summary', '')}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>",
        "<p><a href='./'>The page</a> to drop a picture on; <a href='openapi.json'>the same for programs</a>.",
        f"<pre>curl -F file=@cat.jpg {html.escape(base)}predict\n"
        "curl -H 'Content-Type: image/jpeg' --data-binary @cat.jpg "
        f"'{html.escape(base)}predict?topk=3&amp;explain=true'</pre>",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{html.escape(f'{method.upper()} {path}')}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('description', ''))}")
            if asked := operation.get("parameters"):
                parts.append(table([(p["name"], described(p)) for p in asked]))
            if body := operation.get("requestBody"):
                parts.append(
                    f"<p>Body: {html.escape(body['description'])}; as {', '.join(map(coded, body['content']))}"
                )
            answers = operation["responses"].items()
            parts.append(table([(status, answer["description"]) for status, answer in answers]))
    for name, model in schema.get("components", {}).get("schemas", {}).items():
        if "Validation" not in name:
            parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(model.get('description', ''))}")
            parts.append(table([(k, v.get("description", "")) for k, v in model.get("properties", {}).items()]))
    return "\n".join(parts)


def described(parameter: dict[str, Any]) -> str:
    """A parameter's meaning and default."""
    default = json.dumps(parameter["schema"].get("default"))
    return f"{parameter.get('description', '')}; default {default}"


def coded(text: str) -> str:
    """As code, in HTML."""
    return f"<code>{html.escape(text)}</code>"


def table(rows: list[tuple[str, str]]) -> str:
    """A name and its meaning a row, as HTML."""
    lines = (f"<tr><th><code>{html.escape(name)}</code><td>{html.escape(meaning)}" for name, meaning in rows)
    return f"<table>{''.join(lines)}</table>"
