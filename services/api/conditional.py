"""ETag and If-None-Match (RFC 9110, 8.8.3 and 13.1.2): who asks again for what has not changed gets no body again."""

import hashlib

from aiohttp import web
from aiohttp.typedefs import Handler


@web.middleware
async def answer_unchanged(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tag JSON that was asked for; 304 where the client has it already."""
    response = await handler(request)
    if request.method not in ("GET", "HEAD") or response.status != 200 or response.content_type != "application/json":
        return response
    if not isinstance(response, web.Response) or not isinstance(response.body, bytes):
        return response
    tag = f'"{hashlib.blake2b(response.body, digest_size=12).hexdigest()}"'
    if not _knows(request, tag):
        response.headers["ETag"] = tag
        return response
    return web.Response(status=304, headers={"ETag": tag})


def _knows(request: web.Request, tag: str) -> bool:
    """Whether the tag is among those that the client has; a weak one is as good."""
    known = {word.strip() for value in request.headers.getall("If-None-Match", []) for word in value.split(",")}
    return bool(known & {"*", tag, f"W/{tag}"})
