"""When silence is believed: by examples and by properties."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.loss import MARGIN, Calm, Lease, Loss, calm, losses

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=30)
GRACE = timedelta(seconds=7)
REQUEUE_AFTER = timedelta(seconds=300)
LONG_AGO = NOW - timedelta(days=1)
MOMENT = timedelta(microseconds=1)


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def node(name: str, silence: timedelta, **changes: Any) -> Lease:
    """A node whose last heartbeat was so long ago."""
    plain = Lease(name, 1, NOW - silence, silence < LEASE, False, True, GRACE, REQUEUE_AFTER)
    return replace(plain, **changes)


def lost(leases: Sequence[Lease], after: timedelta = timedelta(), since: datetime = LONG_AGO) -> dict[str, Loss]:
    """What is lost so long after NOW; no heartbeat has come meanwhile."""
    now = NOW + after
    then = [replace(lease, alive=lease.heartbeat_time + LEASE > now) for lease in leases]
    return {loss.lease.node: loss for loss in losses(then, now=now, since=since, patience=LEASE)}


LIVING = [node(name, seconds(1)) for name in ("a", "b", "c")]
FIRST = 2 * LEASE
REQUEUE = REQUEUE_AFTER + GRACE + MARGIN


# One node among others


def test_a_node_that_speaks_is_not_lost() -> None:
    assert lost(LIVING) == {}


def test_silence_is_believed_after_a_second_lease() -> None:
    assert lost([*LIVING, node("x", FIRST - MOMENT)]) == {}
    assert set(lost([*LIVING, node("x", FIRST)])) == {"x"}


def test_what_may_be_requeued_has_ended_by_then() -> None:
    """By its own node: REQUEUE_AFTER, the grace period, and a margin."""
    assert not lost([*LIVING, node("x", REQUEUE - MOMENT)])["x"].requeue
    assert lost([*LIVING, node("x", REQUEUE)])["x"].requeue


def test_a_time_limit_has_the_grace_and_the_margin_as_well() -> None:
    assert lost([*LIVING, node("x", FIRST)])["x"].limits == NOW - GRACE - MARGIN


def test_a_worker_that_was_stopped_on_purpose_has_lost_nothing_but_what_its_keeper_ends() -> None:
    stopped = lost([*LIVING, node("x", REQUEUE, draining=True)])["x"]
    assert (stopped.limits, stopped.requeue) == (None, True)


def test_a_node_that_holds_nothing_has_nothing_to_lose() -> None:
    assert lost([*LIVING, node("x", seconds(10**6), holds=False)]) == {}


def test_a_node_with_a_longer_lease_of_its_own_lives_as_long_as_that_says() -> None:
    alive = node("x", seconds(10**4), alive=True)
    assert losses([*LIVING, alive], now=NOW, since=LONG_AGO, patience=LEASE) == []


def test_a_doubt_costs_one_lease() -> None:
    """PostgreSQL began, or we began to look, a moment ago."""
    silent = [*LIVING, node("x", seconds(10**5))]
    assert lost(silent, since=NOW - LEASE + MOMENT) == {}
    assert set(lost(silent, since=NOW - LEASE)) == {"x"}


# Many at once


def test_many_at_once_cost_one_lease_more() -> None:
    silent = [node(name, REQUEUE) for name in ("x", "y", "z", "w")]
    assert not any(loss.requeue for loss in lost([*LIVING, *silent]).values())
    assert all(loss.requeue for loss in lost([*LIVING, *silent], LEASE).values())
    silent = [node(name, FIRST) for name in ("x", "y", "z", "w")]
    assert lost([*LIVING, *silent], LEASE - MOMENT) == {}
    assert set(lost([*LIVING, *silent], LEASE)) == {"x", "y", "z", "w"}


@pytest.mark.parametrize(("fallen", "living", "many"), [(1, 0, False), (1, 1, False), (2, 0, True), (2, 1, True)])
def test_many_are_two_at_least(fallen: int, living: int, many: bool) -> None:
    silent = [node(str(number), FIRST) for number in range(fallen)]
    assert (lost([*silent, *LIVING[:living]]) == {}) == many


@pytest.mark.parametrize(("fallen", "living", "many"), [(2, 2, False), (3, 2, True), (3, 3, False), (50, 49, True)])
def test_many_are_more_than_half(fallen: int, living: int, many: bool) -> None:
    silent = [node(f"x{number}", FIRST) for number in range(fallen)]
    talking = [node(f"a{number}", seconds(1)) for number in range(living)]
    assert (lost([*silent, *talking]) == {}) == many


def test_many_that_are_dead_for_long_are_not_many_now() -> None:
    dead = [node(f"d{number}", seconds(10**5)) for number in range(9)]
    assert "x" in lost([*LIVING, *dead, node("x", FIRST)])


def test_many_need_not_fall_in_the_same_second() -> None:
    silent = [node("x", FIRST + LEASE), node("y", FIRST + LEASE / 2), node("z", FIRST), node("w", FIRST)]
    assert "w" not in lost([*LIVING, *silent])
    assert "y" not in lost([*LIVING, *silent])


# Properties

seconds_of = st.integers(0, 2000).map(lambda count: seconds(count / 2))


@st.composite
def clusters(draw: Any) -> list[Lease]:
    """Nodes, living and silent, with grants of their own; few moments, so that many fall at once."""
    moments = draw(st.lists(seconds_of, min_size=1, max_size=4))
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8))
    return [
        node(
            name,
            draw(st.sampled_from(moments)) + seconds(draw(st.integers(0, 40))),
            holds=draw(st.booleans()),
            grace=draw(seconds_of),
            requeue_after=2 * LEASE + draw(seconds_of),
        )
        for name in names
    ]


property_test = settings(max_examples=100, deadline=None)


@property_test
@given(clusters(), seconds_of)
def test_nothing_is_lost_before_its_own_node_has_ended_it(leases: list[Lease], after: timedelta) -> None:
    for loss in lost(leases, after).values():
        silence = NOW + after - loss.lease.heartbeat_time
        assert loss.lease.holds
        assert silence >= 2 * LEASE
        assert loss.limits is not None
        assert loss.limits <= NOW + after - loss.lease.grace - MARGIN
        assert not loss.requeue or silence >= loss.lease.requeue_after + loss.lease.grace + MARGIN


@property_test
@given(clusters(), seconds_of, seconds_of)
def test_nothing_is_lost_within_a_lease_of_a_doubt(leases: list[Lease], after: timedelta, ago: timedelta) -> None:
    found = lost(leases, after, since=NOW + after - ago)
    assert found == ({} if ago < LEASE else lost(leases, after))


@property_test
@given(clusters(), seconds_of, seconds_of)
def test_what_is_lost_stays_lost(leases: list[Lease], first: timedelta, more: timedelta) -> None:
    """While nobody speaks, time never takes a conclusion back: who falls silent later makes no "many" of it."""
    before, later = lost(leases, first), lost(leases, first + more)
    assert set(before) <= set(later)
    for name, loss in before.items():
        assert later[name].requeue >= loss.requeue
        assert (later[name].limits or LONG_AGO) >= (loss.limits or NOW)


@property_test
@given(clusters())
def test_what_stays_silent_is_lost_in_the_end(leases: list[Lease]) -> None:
    found = lost(leases, seconds(10**5))
    assert set(found) == {lease.node for lease in leases if lease.holds}
    assert all(loss.requeue for loss in found.values())


@property_test
@given(clusters(), seconds_of, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(leases: list[Lease], after: timedelta, random: Any) -> None:
    shuffled = leases[:]
    random.shuffle(shuffled)
    assert lost(shuffled, after) == lost(leases, after)


@property_test
@given(clusters(), seconds_of, st.sampled_from("abcdefgh"))
def test_who_speaks_again_is_not_lost(leases: list[Lease], after: timedelta, name: str) -> None:
    back = [replace(o, heartbeat_time=NOW + after) if o.node == name else o for o in leases]
    assert name not in lost(back, after)


# Calm


def test_calm_begins_with_the_first_look() -> None:
    assert calm(None, NOW, LEASE) == Calm(NOW, NOW)


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=20))
def test_calm_is_since_the_last_gap(steps: list[int]) -> None:
    """A gap, or a clock that was set back or forward by more than a lease."""
    now, found, since = NOW, None, NOW
    for step in steps:
        now += seconds(step)
        if found is None or not 0 <= step <= LEASE.total_seconds():
            since = now
        found = calm(found, now, LEASE)
        assert found == Calm(since, now)
