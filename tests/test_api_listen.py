"""Where the API listens, whom it answers there, and how it ends."""

import asyncio
import socket
from contextlib import suppress

import asyncpg
import pytest

from core.client import Client, ClientError
from core.errors import SettingsError
from core.settings import Settings
from services.api import guard, serving
from services.api.guard import check_address, known_hosts
from services.api.serving import ListenError, serve
from tests.api import PATIENCE, SCRIPT

pytestmark = pytest.mark.anyio

ANYWHERE = "0.0.0.0"  # noqa: S104


def plain(**changes: object) -> Settings:
    return Settings.model_construct().model_copy(update=changes)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
async def test_loopback_needs_no_word(host: str) -> None:
    await check_address(plain(api_host=host))


@pytest.mark.parametrize("host", [ANYWHERE, "::", "", "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"])
async def test_elsewhere_needs_to_be_said(host: str) -> None:
    with pytest.raises(SettingsError, match=f"^API_HOST={host}: .*AUTH=none"):
        await check_address(plain(api_host=host))
    for word in ("none", "NONE"):
        await check_address(plain(api_host=host, auth=word))


async def test_a_host_that_is_none() -> None:
    with pytest.raises(SettingsError, match=r"^API_HOST=no\.such\.host\.invalid: should be an address"):
        await check_address(plain(api_host="no.such.host.invalid"))


def test_the_names_it_goes_by() -> None:
    found = known_hosts(
        plain(api_host="FD00::2", allowed_hosts=("Rowlock.Example", "other:81", "fd00::1", "[fd00::3]:80"))
    )
    assert found == {
        "localhost",
        "127.0.0.1",
        "[::1]",
        "[fd00::2]",
        "rowlock.example",
        "other:81",
        "[fd00::1]",
        "[fd00::3]:80",
    }


async def test_a_port_that_is_taken_is_said_in_one_line(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ExceptionGroup) as caught:
            await serve(settings.model_copy(update={"api_port": port}), asyncio.Event())
    [error] = caught.value.exceptions
    assert isinstance(error, ListenError)
    assert str(error).startswith(f"API_HOST=127.0.0.1 API_PORT={port}: cannot listen there: ")
    assert "\n" not in str(error)


async def test_an_address_that_is_refused_is_not_listened_on(settings: Settings) -> None:
    with pytest.raises(SettingsError):
        await serve(settings.model_copy(update={"api_host": ANYWHERE}), asyncio.Event())


async def test_it_serves_until_told_to_stop_and_finishes_what_it_began(
    settings: Settings, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, listening = asyncio.Event(), asyncio.Event()
    ports: list[int] = []
    listen = serving.listen

    async def noted(runner: serving.Runner, given: Settings) -> None:
        await listen(runner, given)
        ports.append(runner.addresses[0][1])
        listening.set()

    monkeypatch.setattr(serving, "listen", noted)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        served = group.create_task(serve(settings, stop))
        await listening.wait()
        async with Client(f"http://127.0.0.1:{ports[0]}") as client:
            await _well(client)
            async with connection.transaction():
                await connection.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
                post = group.create_task(client.submit({"account": "test"}, SCRIPT))
                await _blocked(connection)
                stop.set()
                await asyncio.sleep(0.05)
                assert not served.done()
            assert (await post)["state"] == "PENDING"
    async with Client(f"http://127.0.0.1:{ports[0]}") as client:
        with pytest.raises(ClientError, match="cannot be reached"):
            await client.health()


@pytest.mark.parametrize("before", [b"", b"GET /no HTTP/1.1\r\nHost: localhost\r\n\r\n"])
async def test_a_head_that_never_ends_is_cut_off(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(serving, "KEEP_ALIVE_SECONDS", 0.3)
    stop, ports = asyncio.Event(), asyncio.Queue[int]()
    listen = serving.listen

    async def noted(runner: serving.Runner, given: Settings) -> None:
        await listen(runner, given)
        ports.put_nowait(runner.addresses[0][1])

    async def send_on(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.02)

    monkeypatch.setattr(serving, "listen", noted)
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(serve(settings, stop))
        reader, writer = await asyncio.open_connection("127.0.0.1", await ports.get())
        writer.write(before + b"GET / HTTP/1.1\r\nX: ")
        sending = group.create_task(send_on(writer))
        with suppress(ConnectionError):
            assert (await reader.read()).startswith(b"HTTP/1.1 404" if before else b"")
        writer.transport.abort()
        sending.cancel()
        stop.set()


async def _well(client: Client) -> None:
    while True:
        try:
            await client.jobs()
        except ClientError:
            await asyncio.sleep(0.01)
        else:
            return


async def _blocked(connection: asyncpg.Connection) -> None:
    """Wait until somebody waits for what we locked."""
    while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_a_body_takes_no_more_than_a_minute() -> None:
    assert guard.BODY_SECONDS <= 60
