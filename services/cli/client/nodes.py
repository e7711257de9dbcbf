"""Nodes: listed, looked at, taken out and back in."""

import argparse
import json

from core.client import Client
from core.documents import NodeDocument, NodesDocument
from services.cli.client.jobs import show
from services.cli.client.table import Table


async def nodes(client: Client, options: argparse.Namespace) -> int:
    """``nodes``: all of them."""
    found = await client.nodes()
    if options.json:
        document: NodesDocument = {"nodes": found}
        print(json.dumps(document))
    else:
        table = Table("NODE", "STATE", "CPUS", "ALLOC", "LOAD", "MEMORY", "PARTITIONS", "REASON")
        table.show([row(node) for node in found])
    return 0


def row(node: NodeDocument) -> tuple[object, ...]:
    """The node in the table; memory is MiB."""
    return (
        node["name"],
        _state(node),
        node["cpus"],
        node["alloc_cpus"],
        node["cpu_load"],
        node["real_memory"],
        node["partitions"],
        node["reason"],
    )


def _state(node: NodeDocument) -> str:
    return "+".join([node["state"], *node["state_flags"]])


async def node(client: Client, options: argparse.Namespace) -> int:
    """``node``: every field of one."""
    show(await client.node(options.name), as_json=options.json)
    return 0


async def change(client: Client, options: argparse.Namespace) -> int:
    """``drain``, ``resume`` and ``down``."""
    changed = await client.set_node_state(options.name, options.command.upper(), options.reason)
    if options.json:
        print(json.dumps(changed))
    else:
        Table("NODE", "STATE", "CPUS", "ALLOC", "REASON").show(
            [(changed["name"], _state(changed), changed["cpus"], changed["alloc_cpus"], changed["reason"])]
        )
    return 0
