"""The decision: FIFO with first fit, by examples and by properties."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.policy import plan
from core.records import Capacity, Placement, Waiting

PARTITIONS = ("batch", "big", "debug")


def node(name: str, free: int, *partitions: str) -> Capacity:
    return Capacity(name, frozenset(partitions or ("batch",)), free)


def job(job_id: int, cpus: int, partition: str = "batch") -> Waiting:
    return Waiting(job_id, partition, cpus)


def placed(waiting: Sequence[Waiting], nodes: Sequence[Capacity]) -> list[tuple[int, str]]:
    return [(placement.job_id, placement.node) for placement in plan(waiting, nodes)]


def naive(waiting: Sequence[Waiting], nodes: Sequence[Capacity]) -> list[Placement]:
    """The same decision as anyone would write it down: every job looks at every node."""
    free = {node.name: node.free_cpus for node in nodes}
    placements = []
    for job in waiting:
        for node in sorted(nodes, key=lambda node: node.name):
            if job.partition in node.partitions and job.cpus <= free[node.name]:
                free[node.name] -= job.cpus
                placements.append(Placement(job.job_id, node.name, job.cpus))
                break
    return placements


@st.composite
def queues(draw: Any) -> list[Waiting]:
    """Jobs in the order of submission; few shapes, so that many are of the same."""
    shapes = st.tuples(st.sampled_from(PARTITIONS), st.integers(1, 9))
    return [Waiting(i, *shape) for i, shape in enumerate(draw(st.lists(shapes, max_size=25)), 1)]


@st.composite
def clusters(draw: Any) -> list[Capacity]:
    """Nodes of some partitions each, in no order; some are full."""
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=6))
    partitions = st.frozensets(st.sampled_from(PARTITIONS), min_size=1)
    return [Capacity(name, draw(partitions), draw(st.integers(0, 12))) for name in names]


property_test = settings(max_examples=70, deadline=None)


def left(nodes: Sequence[Capacity], placements: Sequence[Placement]) -> dict[str, int]:
    """What is free after the pass."""
    taken = {node.name: sum(p.cpus for p in placements if p.node == node.name) for node in nodes}
    return {node.name: node.free_cpus - taken[node.name] for node in nodes}


@property_test
@given(queues(), clusters())
def test_never_over_capacity(waiting: list[Waiting], nodes: list[Capacity]) -> None:
    assert all(free >= 0 for free in left(nodes, plan(waiting, nodes)).values())


@property_test
@given(queues(), clusters())
def test_a_job_runs_once_in_its_partition_with_its_cpus(waiting: list[Waiting], nodes: list[Capacity]) -> None:
    jobs, members = {job.job_id: job for job in waiting}, {node.name: node.partitions for node in nodes}
    placements = plan(waiting, nodes)
    assert len({placement.job_id for placement in placements}) == len(placements)
    for placement in placements:
        assert jobs[placement.job_id].partition in members[placement.node]
        assert placement.cpus == jobs[placement.job_id].cpus


@property_test
@given(queues(), clusters())
def test_nothing_that_still_waits_would_fit(waiting: list[Waiting], nodes: list[Capacity]) -> None:
    placements = plan(waiting, nodes)
    gone, free = {placement.job_id for placement in placements}, left(nodes, placements)
    for job in waiting:
        if job.job_id not in gone:
            assert not [n.name for n in nodes if job.partition in n.partitions and free[n.name] >= job.cpus]


@property_test
@given(queues(), clusters())
def test_no_job_passes_an_older_one_of_its_shape(waiting: list[Waiting], nodes: list[Capacity]) -> None:
    gone = {placement.job_id for placement in plan(waiting, nodes)}
    for shape in {(job.partition, job.cpus) for job in waiting}:
        got = [job.job_id in gone for job in waiting if (job.partition, job.cpus) == shape]
        assert got == sorted(got, reverse=True)


@property_test
@given(queues(), clusters())
def test_decides_as_the_naive_way_would(waiting: list[Waiting], nodes: list[Capacity]) -> None:
    assert plan(waiting, nodes) == naive(waiting, nodes)


@property_test
@given(queues(), clusters(), st.randoms(use_true_random=False))
def test_the_order_in_which_nodes_are_told_does_not_matter(
    waiting: list[Waiting], nodes: list[Capacity], random: Any
) -> None:
    shuffled = random.sample(nodes, len(nodes))
    assert plan(waiting, shuffled) == plan(waiting, nodes)


@property_test
@given(queues(), clusters())
def test_the_oldest_jobs_decide_alone(waiting: list[Waiting], nodes: list[Capacity]) -> None:
    """What comes later changes nothing for those before it: a pass may be cut anywhere."""
    whole = plan(waiting, nodes)
    for length in range(len(waiting)):
        first = plan(waiting[:length], nodes)
        assert whole[: len(first)] == first


class Counted(int):
    """A number of CPUs that counts how often somebody asks whether a job fits it."""

    looks = 0

    def __lt__(self, other: int) -> bool:
        Counted.looks += 1
        return int(self) < int(other)

    def __sub__(self, other: int) -> "Counted":
        return Counted(int(self) - int(other))

    __hash__ = int.__hash__


@pytest.mark.parametrize("jobs", [1_000, 20_000])
def test_the_cost_is_a_look_per_job_and_one_per_shape_and_node(jobs: int) -> None:
    nodes = [node(f"n{i:03}", Counted(7)) for i in range(200)]
    shapes = 5
    waiting = [job(i, i % shapes + 1) for i in range(jobs)]
    Counted.looks = 0
    placements = plan(waiting, nodes)
    assert 200 <= len(placements) < jobs
    # Each look either places a job, or moves a shape on to its next node.
    assert Counted.looks <= len(placements) + shapes * len(nodes)


def test_in_the_order_of_submission() -> None:
    assert placed([job(1, 1), job(2, 1), job(3, 1)], [node("a", 2)]) == [(1, "a"), (2, "a")]


def test_the_first_node_by_name_that_fits() -> None:
    nodes = [node("c", 8), node("b", 2), node("a", 1)]
    assert placed([job(1, 2), job(2, 1), job(3, 2)], nodes) == [(1, "b"), (2, "a"), (3, "c")]


def test_a_smaller_job_may_pass_one_that_does_not_fit_now() -> None:
    assert placed([job(1, 5), job(2, 3), job(3, 5), job(4, 1)], [node("a", 4)]) == [(2, "a"), (4, "a")]


def test_a_job_is_not_split_over_nodes() -> None:
    assert placed([job(1, 3)], [node("a", 2), node("b", 2)]) == []


def test_an_earlier_node_is_used_again_by_a_smaller_shape() -> None:
    assert placed([job(1, 3), job(2, 3), job(3, 1)], [node("a", 4), node("b", 3)]) == [(1, "a"), (2, "b"), (3, "a")]


def test_where_one_shape_goes_on_is_not_where_another_does() -> None:
    assert placed([job(1, 1), job(2, 3), job(3, 1)], [node("a", 2), node("b", 3)]) == [(1, "a"), (2, "b"), (3, "a")]
    nodes = [node("a", 1, "batch"), node("b", 6, "batch", "big")]
    assert placed([job(1, 3, "batch"), job(2, 3, "big")], nodes) == [(1, "b"), (2, "b")]


def test_only_nodes_of_the_partition() -> None:
    nodes = [node("a", 8, "debug"), node("b", 1, "batch", "big")]
    assert placed([job(1, 1, "big"), job(2, 1, "batch"), job(3, 1, "unknown")], nodes) == [(1, "b")]


def test_partitions_share_the_cpus_of_a_node() -> None:
    nodes = [node("a", 3, "debug", "batch")]
    assert placed([job(1, 2, "debug"), job(2, 2, "batch"), job(3, 1, "batch")], nodes) == [(1, "a"), (3, "a")]


def test_nothing_to_place_or_nowhere_to_place_it() -> None:
    assert placed([], [node("a", 1)]) == []
    assert placed([job(1, 1)], []) == []
    assert placed([job(1, 1)], [node("a", 0)]) == []


def test_what_it_is_given_stays_as_it_was() -> None:
    waiting, nodes = [job(1, 1), job(2, 1)], [node("b", 1), node("a", 1)]
    plan(waiting, nodes)
    assert waiting == [job(1, 1), job(2, 1)]
    assert nodes == [node("b", 1), node("a", 1)]
