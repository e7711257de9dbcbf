"""``GET /nodes``, ``GET /nodes/{name}``."""

import unicodedata

from aiohttp import web

from core.db import nodes
from core.documents import NodesDocument
from services.api import rendering, state
from services.api.problems import Problem


async def list_nodes(request: web.Request) -> web.Response:
    """Every node, by name."""
    async with state.of(request).database.connection() as connection:
        found = await nodes.all_nodes(connection)
    document: NodesDocument = {"nodes": [rendering.node_document(node) for node in found]}
    return rendering.answer(document)


async def get_node(request: web.Request) -> web.Response:
    """One node."""
    name = request.match_info["name"]
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):  # no text that PostgreSQL knows
        raise Problem(404, "there is no such node")
    async with state.of(request).database.connection() as connection:
        found = await nodes.all_nodes(connection, name)
    if not found:
        raise Problem(404, f"there is no node {name}")
    return rendering.answer(rendering.node_document(found[0]))
