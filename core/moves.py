"""What jobs have come to, told over Redis to whoever waits for it.

Hints like the streams: who hears one reads the tables, and what nobody hears costs a poll.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from core.states import State
from core.streams import ANSWER_SECONDS, Link, moved_channel
from core.wakeup import Wakeup

SILENCE_SECONDS = 5
"""After which a subscription is asked whether it is still one."""


class Moves:
    """What one role has to tell. All that comes while one message is on its way is the next one."""

    def __init__(self, *, wanted: Callable[[], bool]) -> None:
        self.wanted = wanted
        """Whether anybody listens, as far as is known: nothing is said otherwise."""
        self.wake = Wakeup()
        self._states: dict[int, State] = {}

    def add(self, job_id: int, state: State) -> None:
        """Tell of a move, after its commit."""
        if self.wanted():
            self._states[job_id] = state
            self.wake.set()

    async def tell_once(self, link: Link) -> int:
        """Publish what there is to tell; raise one of REDIS_ERRORS, and forget it, when that cannot be done."""
        states, self._states = self._states, {}
        if states:
            text = " ".join(f"{job_id}={state}" for job_id, state in states.items())
            [answer] = await link.ask(("PUBLISH", moved_channel(link.client), text))
            if isinstance(answer, Exception):
                raise answer
        return len(self._states)


class Ear:
    """A subscription to what is told, opened by its first use, and anew after any error."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._subscription: PubSub | None = None

    @property
    def is_open(self) -> bool:
        """Whether it hears what is told now."""
        return self._subscription is not None

    async def hear(self) -> list[tuple[int, State]] | None:
        """What is told next, nothing now and then; None once it is open, since what was told before is not heard.

        Raises one of REDIS_ERRORS when the server is away, or silent.
        """
        try:
            async with asyncio.timeout(SILENCE_SECONDS + 2 * ANSWER_SECONDS):  # redis-py bounds no reconnect
                if self._subscription is not None:
                    return _said(await _next(self._subscription))
                await self._open()
                return None
        except BaseException:
            await self.close()
            raise

    async def _open(self) -> None:
        subscription = self._client.pubsub()
        try:
            await subscription.subscribe(moved_channel(self._client))
            await subscription.get_message(timeout=None)  # that it is so
        except BaseException:
            await subscription.aclose()  # type: ignore[no-untyped-call]
            raise
        self._subscription = subscription

    async def close(self) -> None:
        """Hear nothing more."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.aclose()  # type: ignore[no-untyped-call]


async def _next(subscription: PubSub) -> dict[str, Any]:
    message = await subscription.get_message(timeout=SILENCE_SECONDS)
    if message is None:
        await subscription.ping()
        message = await subscription.get_message(timeout=ANSWER_SECONDS)
        if message is None:
            raise TimeoutError(f"Redis has been silent for {SILENCE_SECONDS + ANSWER_SECONDS} s")
    found: dict[str, Any] = message
    return found


def _said(message: dict[str, Any]) -> list[tuple[int, State]]:
    """What is said, without what cannot be meant: the channel is open to others."""
    text = message["data"] if message["type"] == "message" else b""
    found = []
    for word in text.split() if isinstance(text, bytes) else ():
        job_id, _, state = word.partition(b"=")
        try:
            found.append((int(job_id), State(state.decode())))
        except ValueError:
            continue
    return found
