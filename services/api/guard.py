"""What a request must look like before it is read: against web pages in a local browser, and slow bodies."""

import asyncio
import ipaddress
import re
import socket

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from core.errors import SettingsError
from core.settings import Settings
from services.api.problems import Problem

MAX_BODY = 8 * 1024 * 1024
MAX_LIST_BODY = 64 * 1024 * 1024
TOO_LARGE = (
    f"the body is too large: at most {MAX_BODY // 2**20} MiB, or {MAX_LIST_BODY // 2**20} MiB for a list of jobs that"
    " says its Content-Length"
)
BODY_SECONDS = 60
EVERYWHERE = "0.0.0.0"  # noqa: S104 - what an empty host means to a listener

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]{1,5})?", re.ASCII)
_JSON = re.compile(r'application/json[ \t]*(;[ \t]*charset=("?)utf-8\2[ \t]*)?', re.IGNORECASE | re.ASCII)


async def check_address(settings: Settings) -> None:
    """Refuse to listen where others can reach it, unless that was said in so many words."""
    if settings.auth:
        return
    host = settings.api_host or EVERYWHERE
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(
            f"API_HOST={settings.api_host}: should be an address of this machine ({error.strerror})"
        ) from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not all(address.is_loopback for address in addresses):
        raise SettingsError(
            f"API_HOST={settings.api_host}: others could submit jobs there, and there are no tokens yet;"
            " should be 127.0.0.1, or say AUTH=none beside it"
        )


def known_hosts(settings: Settings) -> frozenset[str]:
    """The names that a Host header may say, with or without a port."""
    names = ("localhost", "127.0.0.1", "[::1]", settings.api_host, *settings.allowed_hosts)
    return frozenset(_bracketed(name.lower()) for name in names if name)


def _bracketed(name: str) -> str:
    """An IPv6 address as a Host header has it; more than one colon is neither a name nor a name with its port."""
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


def guard(settings: Settings) -> Middleware:
    """Host is ours (DNS rebinding), Origin is this very server (other pages)."""
    known = known_hosts(settings)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        _check_host(request, known)
        _check_origin(request)
        return await handler(request)

    return check


def _check_host(request: web.Request, known: frozenset[str]) -> None:
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1:
        raise Problem(400, "a request needs exactly one Host header")
    authority = hosts[0].lower()
    found = _AUTHORITY.fullmatch(authority)
    if not found:
        raise Problem(400, "the Host header should be a name or an address, with or without a port")
    if authority not in known and found[1] not in known:
        raise Problem(421, "this server does not go by that Host: add it to ALLOWED_HOSTS if it should")


def _check_origin(request: web.Request) -> None:
    origins = request.headers.getall("Origin", [])
    if not origins:
        return
    authority = request.headers["Host"].lower()
    if any(origin.lower() not in (f"http://{authority}", f"https://{authority}") for origin in origins):
        raise Problem(403, "requests from pages of another origin are refused")


def check_json(request: web.Request) -> None:
    """Problem 415 unless the request says that its body is JSON."""
    types = request.headers.getall("Content-Type", [])
    if len(types) != 1 or not _JSON.fullmatch(types[0].strip()):
        raise Problem(415, "Content-Type must be application/json, with no parameter but charset=utf-8")


async def body_of(request: web.Request, most: int = MAX_BODY) -> bytes:
    """The body, whatever it is, or Problem: 415 when it is compressed, 413, 408, 400."""
    if any(coding.lower() != "identity" for coding in request.headers.getall("Content-Encoding", [])):
        raise Problem(415, "the body must not be compressed")
    if (request.content_length or 0) > most:
        raise Problem(413, TOO_LARGE)
    _invite(request)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read(request, most)
    except TimeoutError:
        raise Problem(408, f"the body took longer than {BODY_SECONDS} s", closes=True) from None
    except (web.RequestPayloadError, ConnectionError):
        raise Problem(400, "the body is malformed or was cut off", closes=True) from None


async def _read(request: web.Request, most: int) -> bytes:
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > most:  # it came in pieces, without saying how long it would be
            raise Problem(413, TOO_LARGE)
    return bytes(body)


def is_there(request: web.Request) -> bool:
    """Whether the client has not gone, as far as is known."""
    return request.transport is not None and not request.transport.is_closing()


def _invite(request: web.Request) -> None:
    """Tell a client that waits for it that it may send its body."""
    if "Expect" in request.headers and request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
