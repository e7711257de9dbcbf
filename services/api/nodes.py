"""``GET /nodes``, and one node: looked at, taken out, taken back in, forgotten."""

import asyncio
import unicodedata

import structlog
from aiohttp import web

from core import streams
from core.db import allocations, nodes
from core.db.allocations import Held
from core.db.connection import Connection, describe
from core.documents import NodesDocument
from core.records import Node
from services.api import guard, models, rendering, state, strict_json
from services.api.cancel import HINT_SECONDS, hint
from services.api.problems import Problem

BATCH = 1000
SHOWN = 10
# Until there are users: whoever reaches the API operates it.
OPERATOR = "operator"


async def list_nodes(request: web.Request) -> web.Response:
    """Every node, by name."""
    async with state.of(request).database.connection() as connection:
        found = await nodes.all_nodes(connection)
    document: NodesDocument = {"nodes": [rendering.node_document(node) for node in found]}
    return rendering.answer(document)


async def get_node(request: web.Request) -> web.Response:
    """``GET /nodes/{name}``."""
    name = _name_of(request)
    async with state.of(request).database.connection() as connection:
        node = await _found(connection, name)
    return rendering.answer(rendering.node_document(node))


async def patch_node(request: web.Request) -> web.Response:
    """``PATCH /nodes/{name}``: DRAIN, RESUME, or DOWN, which ends what runs there. The node as it is then."""
    api, name = state.of(request), _name_of(request)
    guard.check_json(request)
    asked = models.node_request(strict_json.parse(await guard.body_of(request)))
    reason = None if asked.state == "RESUME" else asked.reason  # a node that is back in has none
    async with api.database.connection() as connection:
        changed = await nodes.set_state(connection, name, asked.state, reason=reason, by=OPERATOR)
        if changed is None:
            raise _no_such(name)
        if changed:
            structlog.get_logger().info(
                "node_state_set", node=name, state=asked.state, reason=asked.reason, by=OPERATOR
            )
        ended = []
        # In answering, so that who reads the answer finds the CPUs returned; what a crash leaves, the scheduler ends.
        while asked.state == "DOWN" and (batch := await allocations.end_on_down(connection, BATCH, name)):
            ended += batch
        node = await _found(connection, name)
    if ended:
        await hint(api, ended[0])  # one is enough: the worker looks at everything that it runs
    api.wake.set()
    return rendering.answer(rendering.node_document(node))


async def delete_node(request: web.Request) -> web.Response:
    """``DELETE /nodes/{name}``: 204 once it is forgotten; 409 unless it is DOWN and holds nothing."""
    api, name = state.of(request), _name_of(request)
    async with api.database.connection() as connection:
        if not await nodes.forget(connection, name):
            node = await _found(connection, name)
            raise Problem(409, _why_kept(node, await allocations.of_node(connection, name)))
    structlog.get_logger().info("node_deleted", node=name, by=OPERATOR)
    await _forget_stream(api, name)
    return web.Response(status=204)


def _name_of(request: web.Request) -> str:
    """The node that the path names; 404 for what can be none."""
    name = request.match_info["name"]
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):  # no text that PostgreSQL knows
        raise Problem(404, "there is no such node")
    return name


async def _found(connection: Connection, name: str) -> Node:
    found = await nodes.all_nodes(connection, name)
    if not found:
        raise _no_such(name)
    return found[0]


def _no_such(name: str) -> Problem:
    return Problem(404, f"there is no node {name}")


def _why_kept(node: Node, held: list[Held]) -> str:
    if held:
        jobs = ", ".join(str(job.job_id) for job in held[:SHOWN]) + (", …" if len(held) > SHOWN else "")
        return f"node {node.name} holds {node.alloc_cpus} CPUs for jobs ({jobs}): declare it DOWN, and they end"
    return f"node {node.name} is not DOWN: its worker's lease is alive; declare it DOWN, or stop the worker"


async def _forget_stream(api: state.State, name: str) -> None:
    """Redis being away costs some bytes there only: whatever the stream says, nothing comes of it."""
    try:
        async with asyncio.timeout(HINT_SECONDS):
            await streams.forget(api.redis, name)
    except streams.REDIS_ERRORS as error:
        structlog.get_logger().warning("stream_not_removed", node=name, error=describe(error))
