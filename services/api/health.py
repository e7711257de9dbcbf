"""``GET /health`` and ``GET /``."""

from aiohttp import web

from core import __version__
from core.documents import HealthDocument, RootDocument
from services.api import rendering, state

SERVICE = "rowlock-api"


async def health(request: web.Request) -> web.Response:
    """200 when PostgreSQL answers and the schema fits, else 503 that names what is wrong."""
    api = state.of(request)
    await api.database.check()
    document: HealthDocument = {"status": "ok", "service": SERVICE, "version": __version__}
    return rendering.answer(document)


async def root(request: web.Request) -> web.Response:
    """What this is, and where to go on."""
    links = {
        "health": "/health",
        "jobs": "/api/v1/jobs",
        "nodes": "/api/v1/nodes",
        "openapi": "/openapi.json",
        "docs": "/docs",
    }
    document: RootDocument = {"service": SERVICE, "version": __version__, "links": links}
    return rendering.answer(document)
