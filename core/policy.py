"""The scheduling decision: FIFO with first fit. A function of values, nothing that can wait."""

from collections.abc import Iterable, Sequence

from core.records import Capacity, Placement, Waiting


def plan(waiting: Sequence[Waiting], nodes: Sequence[Capacity]) -> list[Placement]:
    """Give each waiting job, in the order of submission, the first node of its partition where it fits.

    A job that fits nowhere now is passed by later ones that do. Jobs of equal shape are interchangeable: once one
    does not fit, none behind it of its shape is tried, so the cost is that of what is placed plus one look per shape.
    """
    free = {node.name: node.free_cpus for node in nodes}
    members = _by_partition(nodes)
    # Where the search of a shape goes on: capacity only shrinks within a pass, so a node too small stays too small.
    cursors: dict[tuple[str, int], int] = {}
    placements = []
    for job in waiting:
        candidates = members.get(job.partition, ())
        at = cursors.get((job.partition, job.cpus), 0)
        while at < len(candidates) and free[candidates[at]] < job.cpus:
            at += 1
        cursors[job.partition, job.cpus] = at
        if at < len(candidates):
            free[candidates[at]] -= job.cpus
            placements.append(Placement(job.job_id, candidates[at], job.cpus))
    return placements


def _by_partition(nodes: Iterable[Capacity]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    for node in sorted(nodes, key=lambda node: node.name):
        for partition in node.partitions:
            members.setdefault(partition, []).append(node.name)
    return members
