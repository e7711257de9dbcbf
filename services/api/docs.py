"""``GET /openapi.json`` and ``GET /docs``: the API's description, for programs and for people."""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable
from html import escape
from typing import Any

from aiohttp import web

from services.api import openapi, rendering

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-top: 1px solid #999; padding-top: 1rem; font-size: 1.2rem; }
h2 code { font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #ddd; padding: .2rem .6rem .2rem 0; vertical-align: top; }
td:last-child { width: 60%; }
pre { background: #f3f3f3; color: #111; padding: .7rem; overflow-x: auto; }
"""
_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_NOTHING_ELSE = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; {_NOTHING_ELSE}"


async def description(_: web.Request) -> web.Response:
    """``GET /openapi.json``."""
    return rendering.answer(openapi.document())


async def docs(request: web.Request) -> web.Response:
    """``GET /docs``: one page that loads nothing and runs nothing."""
    text = page(openapi.document(), f"{request.scheme}://{request.headers['Host']}")
    headers = {"Content-Security-Policy": POLICY}
    return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)


def page(document: dict[str, Any], address: str) -> str:
    """The description as HTML; `address` is where its examples go."""
    info, paths = document["info"], document["paths"]
    operations = [
        (method.upper(), path, operation) for path, methods in paths.items() for method, operation in methods.items()
    ]
    title = escape(f"{info['title']} {info['version']}")
    links = "".join(
        f'<tr><td><a href="#{operation["operationId"]}"><code>{method} {escape(path)}</code></a>'
        f"<td>{escape(operation['summary'])}"
        for method, path, operation in operations
    )
    schemas = document["components"]["schemas"]
    return "".join(
        (
            f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
            '<meta name="viewport" content="width=device-width">',
            f'<h1>{title}</h1><p>{escape(info["description"])}<p><a href="/openapi.json">openapi.json</a>',
            f"<table>{links}</table>",
            *(_operation(document, address, *operation) for operation in operations),
            *(_schema(name, schema) for name, schema in schemas.items()),
            "</html>\n",
        )
    )


def _operation(document: dict[str, Any], address: str, method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = [
        (parameter["name"], f"{parameter['in']}, {kind(parameter['schema'])}", parameter.get("description", ""))
        for parameter in operation["parameters"]
    ]
    content = operation.get("requestBody", {}).get("content", {})
    bodies = [("body", kind(media["schema"]), "") for media in content.values()]
    answers = [_answer(document, status, answer) for status, answer in operation["responses"].items()]
    return (
        f'<h2 id="{operation["operationId"]}"><code>{method} {escape(path)}</code></h2>'
        f"<p>{escape(operation['summary'])}.{_table([*parameters, *bodies])}"
        f"<pre>{escape(curl(address, method, path, operation))}</pre>{_table(answers)}{_example(operation)}"
    )


def _answer(document: dict[str, Any], status: str, answer: dict[str, Any]) -> tuple[str, str, str]:
    if "$ref" in answer:
        answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    kinds = [kind(media["schema"]) for media in answer.get("content", {}).values()]
    headers = f" Headers: {', '.join(answer['headers'])}." if answer.get("headers") else ""
    return status, ", ".join(kinds), answer["description"] + headers


def _example(operation: dict[str, Any]) -> str:
    """What a good answer may look like, where that is JSON."""
    content = next(iter(operation["responses"].values())).get("content", {})
    if openapi.JSON not in content:
        return ""
    return f"<pre>{escape(json.dumps(content[openapi.JSON]['example'], indent=2))}</pre>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    fields = [
        (field + (" *" if field in required else ""), kind(value), value.get("description", ""))
        for field, value in (schema["properties"] | schema.get("patternProperties", {})).items()
    ]
    return f'<h2 id="{name}"><code>{name}</code></h2><p>{escape(schema["description"])}{_table(fields)}'


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    cells = "".join(f"<tr><td><code>{escape(a)}</code><td>{escape(b)}<td>{escape(c)}" for a, b, c in rows)
    return f"<table>{cells}</table>" if cells else ""


def curl(address: str, method: str, path: str, operation: dict[str, Any]) -> str:
    """The call as a shell takes it, with the examples of the description."""
    for parameter in operation["parameters"]:
        path = path.replace("{" + parameter["name"] + "}", str(parameter.get("example")))
    words = ["curl", *([] if method == "GET" else ["-X", method]), address + path]
    for media, body in operation.get("requestBody", {}).get("content", {}).items():
        example = next(iter(body["examples"].values()))["value"]
        words += ["-H", f"Content-Type: {media}", "-d", json.dumps(example)]
    return shlex.join(words)


def kind(schema: dict[str, Any]) -> str:
    """A JSON Schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    for choice in ("anyOf", "oneOf"):
        if choice in schema and "properties" not in schema:
            return " or ".join(kind(each) for each in schema[choice])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    return str(schema.get("type", "anything")) + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    words = [f"{schema[key]}" for key in ("format",) if key in schema]
    words += [f"{name} {schema[key]}" for key, name in _BOUNDS.items() if key in schema]
    return f" ({', '.join(words)})" if words else ""


_BOUNDS = {
    "minimum": "from",
    "maximum": "to",
    "minLength": "characters from",
    "maxLength": "characters to",
    "default": "default",
}
