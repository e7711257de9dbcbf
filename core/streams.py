"""Redis Streams: one stream per node, hints that save time. Nothing written here makes a node run anything."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from core import crash
from core.cancellation import pause
from core.records import Attempt, Dispatch
from core.settings import Settings

# RedisError covers refused and broken connections, time-outs, a server that loads its data or is out of memory.
REDIS_ERRORS = (RedisError, OSError, TimeoutError)

GROUP = "worker"
MAX_LENGTH = 100_000
BLOCK_MS = 2_000
ANSWER_SECONDS = 5  # longer than BLOCK_MS, or a blocked read would be cut and sent again

Kind = Literal["run", "cancel"]


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a node's stream: a hint that an attempt is to be run, or that its cancel is requested."""

    entry_id: bytes
    kind: Kind
    attempt: Attempt


def stream_of(node: str) -> str:
    """The name of a node's stream."""
    return f"rowlock:node:{node}"


def moved_channel(client: redis.Redis) -> str:
    """The channel on which is said what jobs have come to (core/moves.py). Redis has one name for all its databases."""
    return f"rowlock:moved:{client.connection_pool.connection_kwargs.get('db', 0)}"


def connect(settings: Settings) -> redis.Redis:
    """A client that tries each command once: a retry is the caller's decision.

    How long an answer may take is up to who asks. redis-py's own limit makes a task of each write and waits for it by
    `wait_for`, which before Python 3.12 may lose a cancellation (python/cpython#86296). And with its notifications of
    maintenance it hands out connections that the server has closed.
    """
    return redis.Redis.from_url(
        settings.redis_dsn,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=None,
        socket_connect_timeout=ANSWER_SECONDS,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )


async def publish(client: redis.Redis, kind: Kind, dispatches: Sequence[Dispatch]) -> None:
    """Add a message for each attempt to its node's stream, all in one pipeline.

    A stream that takes none does not hold up its neighbours; that no stream took anything is raised.
    """
    pipeline = client.pipeline(transaction=False)
    for dispatch in dispatches:
        fields: dict[Any, Any] = {"kind": kind, "job_id": dispatch.job_id, "attempt": dispatch.attempt}
        pipeline.xadd(stream_of(dispatch.node), fields, maxlen=MAX_LENGTH, approximate=True)
    async with asyncio.timeout(ANSWER_SECONDS):
        answers = await pipeline.execute(raise_on_error=False)
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    if refused and len(refused) == len(answers):
        raise refused[0]


async def forget(client: redis.Redis, node: str) -> None:
    """Remove the stream of a node that is no more."""
    async with asyncio.timeout(ANSWER_SECONDS):
        await client.delete(stream_of(node))


async def ensure_group(client: redis.Redis, node: str) -> None:
    """Make the node's stream and group where they are missing; the group begins at the stream's start."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await client.xgroup_create(stream_of(node), GROUP, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


class Reader:
    """A node's one consumer. After any error it reads its own unacknowledged entries again, from the start."""

    def __init__(self, client: redis.Redis, node: str) -> None:
        self._client = client
        self._stream = stream_of(node)
        self._node = node
        self._replay = True
        self._done: list[bytes] = []
        self.somebody_listens = False
        """To what jobs have come to, as of the last read."""

    async def read(self, limit: int) -> list[Message]:
        """The next messages, at most `limit`; empty after BLOCK_MS without one. First, what is done is taken away.

        Entries that are no message are dropped.
        """
        if self._replay:
            self.somebody_listens = False
            await ensure_group(self._client, self._node)
        start = "0" if self._replay else ">"
        replaying, self._replay = self._replay, True
        pipeline = self._client.pipeline(transaction=False)
        done, self._done = self._done, []
        if done:
            pipeline.xack(self._stream, GROUP, *done)
            pipeline.xdel(self._stream, *done)
        block = None if replaying else BLOCK_MS
        pipeline.xreadgroup(GROUP, self._node, {self._stream: start}, count=limit, block=block)
        pipeline.pubsub_numsub(moved_channel(self._client))  # a read that ends anyway is a good time to ask
        async with asyncio.timeout(ANSWER_SECONDS):
            *answers, listeners = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        self.somebody_listens = _count(listeners) > 0
        crash.here("worker.acknowledged")
        entries = [entry for _, entries in _pairs(answers[-1]) for entry in entries]
        self._replay = replaying and bool(entries)
        messages = [(entry_id, _parse(entry_id, fields)) for entry_id, fields in entries]
        self.done([entry_id for entry_id, message in messages if message is None])
        return [message for _, message in messages if message is not None]

    def replay(self) -> None:
        """Read what is not acknowledged again: something went wrong with it."""
        self._replay = True

    def done(self, entry_ids: Sequence[bytes]) -> None:
        """Acknowledge and delete entries whose commit has made them old, on the way of the next read.

        One that is not taken away, whatever happens until then, is read once more and finds itself old.
        """
        self._done += entry_ids


def _count(answer: Any) -> int:
    """What PUBSUB NUMSUB says of one channel; 0 where it is refused, or something else answers."""
    try:
        [(_, count)] = answer
        return int(count)
    except (TypeError, ValueError):
        return 0


def _pairs(answer: object) -> Iterable[tuple[bytes, list[tuple[bytes, dict[bytes, bytes] | None]]]]:
    if not answer:
        return ()
    return answer.items() if isinstance(answer, dict) else answer  # type: ignore[return-value]


def _parse(entry_id: bytes, fields: dict[bytes, bytes] | None) -> Message | None:
    """The message, or None for what is deleted, forged or from another version."""
    try:
        kind = (fields or {})[b"kind"].decode()
        attempt = Attempt(int(fields[b"job_id"]), int(fields[b"attempt"]))  # type: ignore[index]
    except (KeyError, ValueError, UnicodeDecodeError):
        return None
    if kind not in ("run", "cancel") or not (0 < attempt.job_id < 2**63 and 0 < attempt.attempt < 2**31):
        return None
    return Message(entry_id, kind, attempt)  # type: ignore[arg-type]


async def name_when_away(client: redis.Redis, address: str, seconds: float = 0.5) -> None:
    """Say, at the start of a role, which Redis cannot be reached; return when it answers. Nothing waits for this."""
    log, said = structlog.get_logger(), ""
    while True:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await client.ping()
        except REDIS_ERRORS as error:
            if (problem := " ".join(str(error).split()) or type(error).__name__) != said:
                log.warning("redis_unreachable", address=address, error=problem)
                said = problem
            await pause(seconds)
        else:
            return
