"""Redis Streams: one stream per node, hints that save time. Nothing written here makes a node run anything."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import redis.asyncio as redis
import structlog
from redis.asyncio.connection import AbstractConnection
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

Kind = Literal["run", "cancel", "take"]
KINDS = frozenset(get_args(Kind))
Command = tuple[str | bytes | int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a node's stream: a hint that an attempt is to be run, that its cancel is requested, or that it waits
    and there may be room for it."""

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


class Link:
    """One connection that is kept, for one user at a time; others wait.

    A client takes a connection from its pool for each command and looks at it, for half of the CPU that the command
    costs. Opened by its first use, and anew after any error, or when the server has closed it meanwhile.
    """

    def __init__(self, client: redis.Redis) -> None:
        """Closed together with its client."""
        self.client = client
        self._connection: AbstractConnection | None = None
        self._free = asyncio.Lock()

    async def ask(self, *commands: Command) -> list[Any]:
        """Send commands in one go; the answers, as they come: what the server refuses is a ResponseError among them.

        Raises one of REDIS_ERRORS when it is away, or silent.
        """
        async with asyncio.timeout(ANSWER_SECONDS), self._free:
            if self._connection is None:
                self._connection = await self.client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
            connection = self._connection
            try:
                if connection.is_connected and await connection.can_read():  # its end, or what nobody asked for
                    await connection.disconnect(nowait=True)
                await connection.send_packed_command(connection.pack_commands(commands))
                return [await _answer(connection) for _ in commands]
            except BaseException:  # also of one that was interrupted as it was opened
                await connection.disconnect(nowait=True)
                raise


async def _answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as refusal:
        return refusal


async def publish(link: Link, kind: Kind, dispatches: Sequence[Dispatch]) -> int:
    """Add a message for each attempt to its node's stream, all in one go; answer how many were refused.

    A stream that takes none does not hold up its neighbours; that no stream took anything is raised.
    """
    answers = await link.ask(*[_message(kind, dispatch) for dispatch in dispatches])
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    if refused and len(refused) == len(answers):
        raise refused[0]
    return len(refused)


def _message(kind: Kind, dispatch: Dispatch) -> Command:
    fields = ("kind", kind, "job_id", dispatch.job_id, "attempt", dispatch.attempt)
    return ("XADD", stream_of(dispatch.node), "MAXLEN", "~", MAX_LENGTH, "*", *fields)


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
        self._link = Link(client)
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
            await ensure_group(self._link.client, self._node)
        start = "0" if self._replay else ">"
        replaying, self._replay = self._replay, True
        done, self._done = self._done, []
        away: list[Command] = [("XACK", self._stream, GROUP, *done), ("XDEL", self._stream, *done)] if done else []
        block = () if replaying else ("BLOCK", BLOCK_MS)
        *answers, listeners = await self._link.ask(
            *away,
            ("XREADGROUP", "GROUP", GROUP, self._node, "COUNT", limit, *block, "STREAMS", self._stream, start),
            ("PUBSUB", "NUMSUB", moved_channel(self._link.client)),  # a read that ends anyway is a good time to ask
        )
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
        _, count = answer
        return int(count)
    except (TypeError, ValueError):
        return 0


def _pairs(answer: Any) -> Iterable[tuple[bytes, list[tuple[bytes, list[bytes] | None]]]]:
    """What XREADGROUP answers: streams with their entries, in whichever version of the protocol."""
    return answer.items() if isinstance(answer, dict) else answer or ()


def _parse(entry_id: bytes, words: list[bytes] | None) -> Message | None:
    """The message, or None for what is deleted, forged or from another version."""
    fields = dict(zip((words or ())[::2], (words or ())[1::2], strict=False))
    try:
        kind = fields[b"kind"].decode()
        attempt = Attempt(int(fields[b"job_id"]), int(fields[b"attempt"]))
    except (KeyError, ValueError, UnicodeDecodeError):
        return None
    if kind not in KINDS or not (0 < attempt.job_id < 2**63 and 0 < attempt.attempt < 2**31):
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
