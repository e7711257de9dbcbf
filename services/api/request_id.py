"""X-Request-ID: by it an answer, its lines in the log and the client's own records are found together."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web
from structlog.contextvars import bound_contextvars

HEADER = "X-Request-ID"
# What is safe in a header, a log and a shell, and long enough for everybody's.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}", re.ASCII)
_KEY = web.RequestKey("request_id", str)


@contextmanager
def known(request: web.Request) -> Iterator[None]:
    """Give the request an id, the client's own where that is one, and put it into every line logged in the block."""
    given = request.headers.getall(HEADER, [])
    request_id = given[0] if len(given) == 1 and _ID.fullmatch(given[0]) else secrets.token_hex(8)
    request[_KEY] = request_id
    with bound_contextvars(request_id=request_id):
        yield


def of(request: web.BaseRequest) -> str | None:
    """The request's id; None for what never became a request."""
    return request.get(_KEY) if isinstance(request, web.Request) else None
