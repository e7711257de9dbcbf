"""Bad requests: each gets its problem, none gets a 500, and nothing of it is stored."""

import asyncio
import gzip
import json
import reprlib
from collections.abc import AsyncIterator, Iterable
from io import BytesIO
from typing import Any

import pytest

from services.api.models import JobRequest
from tests.api import JOBS, SCRIPT, Api, answers_in, api_of_a_module, check_problem, request_bytes, send_raw
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

HUGE = 10**30
NAN, INFINITY = float("nan"), float("inf")
HALF = "\ud800"
LEFT_OUT = ...
JSON = {"Content-Type": "application/json"}
GOOD = {"account": "test", "environment": {"TOKEN": "hunter2"}}


@pytest.fixture(scope="module")
async def a_server(
    databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    hosts = {"allowed_hosts": ("rowlock.example", "other.example:81", "FD00::1"), "api_host": "::2"}
    async with api_of_a_module(databases, redis_url, folder, **hosts) as found:
        yield found


@pytest.fixture
async def api(a_server: Api) -> AsyncIterator[Api]:
    """The server; whatever it was asked, it stored nothing."""
    yield a_server
    assert await a_server.stored() == 0


def rows(*table: Any) -> list[Any]:
    """Parameters with short names."""
    return [pytest.param(*row, id=f"{number}-{_short(row)}") for number, row in enumerate(table)]


def _short(row: tuple[Any, ...]) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in reprlib.repr(row))[:60]


def body(fields: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A good submission but for what is given; LEFT_OUT leaves a field out."""
    job = {**GOOD, **(fields or {})}
    whole = {"job": {key: value for key, value in job.items() if value is not LEFT_OUT}, "script": SCRIPT, **top}
    return {key: value for key, value in whole.items() if value is not LEFT_OUT}


# --- one wrong field of a job


def wrong(field: str, detail: str, *values: Any) -> Iterable[tuple[Any, ...]]:
    """Rows of one field with values that are wrong for one reason."""
    return [({field: value}, field, detail) for value in values]


COUNTS = ("tasks", "cpus_per_task", "tasks_per_node", "ntasks_per_node")

FIELDS = rows(
    # texts
    ({"account": LEFT_OUT}, "account", "required"),
    *wrong("account", "at least 1", ""),
    *wrong("account", "at most 255", "a" * 256, "ü" * 256),
    *wrong("account", "control characters", "a\n", "\x00", "a\x7fb", "\x85", "\x1b[31m"),
    *wrong("account", "half a surrogate pair", HALF),
    *wrong("account", "valid string", 5, 1.5, True, None, [], {}, ["test"]),
    *wrong("name", "at least 1", ""),
    *wrong("name", "at most 255", "a" * 256, "a" * 5_000_000),
    *wrong("name", "control characters", "\r", "a\tb"),
    *wrong("name", "half a surrogate pair", f"a{HALF}"),
    *wrong("name", "valid string", 5, False, None, []),
    *wrong("partition", "at least 1", ""),
    *wrong("partition", "control characters", "a\n"),
    *wrong("partition", "valid string", 5, ["default"]),
    *wrong("comment", "at most 4096", "a" * 4097),
    *wrong("comment", "control characters", "\x00", "a\rb"),
    *wrong("comment", "half a surrogate pair", HALF),
    *wrong("comment", "valid string", 5, {}),
    # counts
    *(
        row
        for field in COUNTS
        for row in (
            *wrong(field, "greater than or equal to 1", 0, -1, -HUGE),
            *wrong(field, "less than or equal to 1000000", HUGE, 10**100, 1_000_001),
            *wrong(field, "valid integer", True, False, 1.0, 1.5, "1", "", None, [], {}),
        )
    ),
    ({"tasks": 1, "tasks_per_node": 2}, "tasks_per_node", "differs from tasks"),
    ({"tasks": 2, "ntasks_per_node": 1}, "ntasks_per_node", "differs from tasks"),
    ({"tasks_per_node": 1, "ntasks_per_node": 2}, "ntasks_per_node", "differs from tasks_per_node"),
    ({"tasks": 1, "tasks_per_node": 2, "ntasks_per_node": 3}, "ntasks_per_node", "differs from tasks"),
    ({"tasks": 2000, "cpus_per_task": 2000}, "cpus_per_task", "at most 1000000"),
    # switches, memory, time
    *wrong("requeue", "valid boolean", "true", "", 1, 0, None, [], 1.0),
    *wrong("memory_per_node", "lies between 1 MiB and", 0, -1, HUGE, 2**30 + 1, "0", "0K", "1025T"),
    *wrong("memory_per_node", "memory is a number of MiB", 1.5, 1.0, True, "-1", "1.5G", "4X", "", "4 G", "٣", "1e3"),
    *wrong("memory_per_node", "memory is a number of MiB", "9" * 50, "4GiB", " 4", "4\n", [], {}, HALF, "0x10"),
    *wrong("time_limit", "a time limit is", -1, -0.001, True, False, "abc", "", "-1", "1:", ":1", "1:2:3:4", "1-"),
    *wrong("time_limit", "a time limit is", "1-2:3:4:5", " 1", "1 ", "1\n", "٣", "1.5", [], {}, "9" * 50, HALF),
    *wrong("time_limit", "10 years", HUGE, 5_256_001, "3651-0", 1e300),
    # environment
    *wrong("environment", "an object of texts, or a list", "A=1", 1, True, 0, ""),
    *(({"environment": [entry]}, "environment/0", "NAME=VALUE") for entry in ("A", "", "é")),
    *(({"environment": [entry]}, "environment/0", "valid string") for entry in (1, None, ["A=1"], {})),
    *(({"environment": [entry]}, "environment/0", "A-Za-z_") for entry in ("=1", "1A=1", "A B=1", "A\n=1", "Ä=1")),
    ({"environment": ["A=1", "SLURM_X=1"]}, "environment/1", "SLURM_"),
    ({"environment": ["A=\0"]}, "environment/0", "NUL"),
    ({"environment": [f"A={HALF}"]}, "environment/0", "half a surrogate pair"),
    ({"environment": ["A=1", "A=1"]}, "environment", "given twice"),
    *(({"environment": {"A": value}}, "environment/A", "valid string") for value in (1, None, True, [], {})),
    *(({"environment": {name: "1"}}, f"environment/{name}", "A-Za-z_") for name in ("", "1A", "A-B", "A\n", "É")),
    ({"environment": {"a/b~c": "1"}}, "environment/a~1b~0c", "A-Za-z_"),
    ({"environment": {"SLURM_JOB_ID": "1"}}, "environment/SLURM_JOB_ID", "SLURM_"),
    ({"environment": {"A": "\0"}}, "environment/A", "NUL"),
    ({"environment": {"A": HALF}}, "environment/A", "half a surrogate pair"),
    ({"environment": {"A": "x" * 131072}}, "environment", "less than 128 KiB"),
    ({"environment": {f"A{n}": "x" * 1000 for n in range(1100)}}, "environment", "at most 1 MiB"),
    ({"environment": {f"A{n}": "" for n in range(10_001)}}, "environment", "at most 10000"),
    ({"environment": [1] * 10_001}, "environment", "at most 10000"),
    # folders and files
    *wrong("current_working_directory", "allowed folder", "/", "/etc", "//etc", "/./etc", "{root}x", "{up}"),
    *wrong("current_working_directory", "'..'", "..", "a/../b", "{root}/../x", "../{root}", "{root}/.."),
    *wrong("current_working_directory", "control characters", "a\nb", "a\0b", "{root}/\x7f"),
    *wrong("current_working_directory", "half a surrogate pair", HALF),
    *wrong("current_working_directory", "too long", "x" * 256, "ü" * 128, "x/" * 2001, "/" * 1_000_000),
    *wrong("current_working_directory", "empty", ""),
    *wrong("current_working_directory", "valid string", 5, True, []),
    *(
        row
        for field in ("standard_output", "standard_error")
        for row in (
            *wrong(field, "allowed folder", "/etc/passwd", "/var/%j", "/dev/zero", "//dev/null", "{root}x/y", "/%x"),
            *wrong(field, "'..'", "..", "../x", "a/../x", "a/..", "{root}/../x", "/dev/../dev/null"),
            *wrong(field, "name of a file", "a/", ".", "a/.", "/", "{root}/"),
            *wrong(field, "control characters", "a\n", "\0", "\x85"),
            *wrong(field, "half a surrogate pair", HALF),
            *wrong(field, "255 bytes", "x" * 256, "ü/" + "ü" * 128),
            *wrong(field, "too long", "x/" * 2001),
            *wrong(field, "empty", ""),
            *wrong(field, "valid string", 5, False, {}),
            ({field: "%x%x", "name": "n" * 200}, field, "255 bytes when it is filled in"),
        )
    ),
    # scripts inside of the job
    *wrong("script", "should begin with '#!'", "echo", ""),
    *wrong("script", "valid string", 5),
    # what there is not
    *(({name: 1}, name, "unknown field") for name in ("ntasks", "cpus", "Account", "job_id", "user", "x" * 90)),
    ({"": 1}, "", "unknown field"),
    ({"a/b~c": 1}, "a~1b~0c", "unknown field"),
)


@pytest.mark.parametrize(("fields", "field", "detail"), FIELDS)
async def test_a_wrong_field(api: Api, fields: dict[str, Any], field: str, detail: str) -> None:
    root = str(api.settings.work_base_dir)
    places = {"{root}": root, "{up}": str(api.settings.work_base_dir.parent)}
    job = {key: _placed(value, places) for key, value in fields.items()}
    inner = {"script": LEFT_OUT} if "script" in fields else {}
    check_problem(await api.post(body(job, **inner)), 422, detail, f"/job/{field}")


def _placed(value: Any, places: dict[str, str]) -> Any:
    for word, place in places.items():
        value = value.replace(word, place) if isinstance(value, str) else value
    return value


# --- what slurm.md has and is not built yet

SLURM_FIELDS = """
name account partition qos comment script argv environment current_working_directory standard_input
standard_output standard_error open_mode tasks cpus_per_task tasks_per_node nodes minimum_nodes maximum_nodes
memory_per_node memory_per_cpu tres_per_job tres_per_node time_limit time_minimum begin_time deadline dependency array
hold priority nice requeue constraints licenses required_nodes excluded_nodes exclusive kill_warning_signal
kill_warning_delay mail_type mail_user kill_on_node_fail wckey
"""

ASKS = {
    "qos": ["high", 1],
    "argv": [["x"], "x"],
    "standard_input": ["/etc/passwd", "in.txt", 5],
    "open_mode": ["append", "TRUNCATE"],
    "nodes": [0, 2, "2", "1-2", "n1", True, 1.0, HUGE, [1]],
    "minimum_nodes": [2, -1, "1", True],
    "maximum_nodes": [2, HUGE],
    "memory_per_cpu": [100, "1G"],
    "tres_per_job": ["gres/gpu:1"],
    "tres_per_node": ["gres/gpu:1"],
    "time_minimum": ["10", 10],
    "begin_time": ["now+1hour", 1_700_000_000],
    "deadline": ["2030-01-01T00:00:00"],
    "dependency": ["afterok:1", HALF],
    "array": ["0-15", 1],
    "hold": [True, "true", 1],
    "priority": [0, 5, -1],
    "nice": [100, -1, INFINITY],
    "constraints": ["fast"],
    "licenses": ["a:1"],
    "required_nodes": [["n1"], "n1"],
    "excluded_nodes": [["n1"]],
    "exclusive": [True, "user"],
    "kill_warning_signal": ["USR1"],
    "kill_warning_delay": [60],
    "mail_type": [["END"], "END", ["NONE", "END"]],
    "mail_user": ["someone@example.org"],
    "kill_on_node_fail": ["yes", 1],
    "wckey": ["x"],
}

NOTHING = {field: [None, "", [], {}, False, *([] if field in ("nodes", "priority") else [0, 0.0])] for field in ASKS}
NOTHING["nodes"] += [1, "1", "1-1"]
NOTHING["minimum_nodes"] += [1]
NOTHING["maximum_nodes"] += [1]
NOTHING["qos"] += ["normal"]
NOTHING["open_mode"] += ["truncate"]
NOTHING["standard_input"] += ["/dev/null"]
NOTHING["begin_time"] += ["now"]
NOTHING["mail_type"] += ["NONE", ["NONE"]]
NOTHING["kill_on_node_fail"] += [True]


def test_every_field_of_slurm_is_known() -> None:
    named = set(SLURM_FIELDS.split())
    assert named <= set(JobRequest.model_fields)
    assert set(ASKS) < named


@pytest.mark.parametrize(("field", "value"), rows(*((field, value) for field in ASKS for value in ASKS[field])))
async def test_what_is_not_built_yet_is_refused(api: Api, field: str, value: Any) -> None:
    document = json.dumps(body({field: value})).replace("Infinity", "1e999")
    check_problem(await api.ask("POST", JOBS, data=document, headers=JSON), 422, "not supported yet", f"/job/{field}")


async def test_what_is_not_built_yet_may_ask_for_nothing(a_server: Api) -> None:
    most = max(map(len, NOTHING.values()))
    jobs = [
        (await a_server.submit(**{field: values[n % len(values)] for field, values in NOTHING.items()}))["job_id"]
        for n in range(most)
    ]
    await _forget(a_server, *jobs)


async def _forget(api: Api, *job_ids: int) -> None:
    """Take back what a test stored on purpose, for those that count."""
    for table in ("jobs", "job_specs", "pending", "job_events"):
        await api.database.execute(f"DELETE FROM {table} WHERE job_id = ANY ($1)", job_ids)


# --- the whole of a submission

WHOLES = rows(
    ([], 422, "", "an object"),
    ([body()], 422, "", "an object"),
    (None, 422, "", "an object"),
    (1, 422, "", "an object"),
    ("text", 422, "", "an object"),
    (True, 422, "", "an object"),
    ({}, 422, "/job", "required"),
    ({}, 422, "/script", "required"),
    ({"job": {}}, 422, "/job/account", "required"),
    ({"job": {}}, 422, "/script", "required"),
    *(({"job": value, "script": SCRIPT}, 422, "/job", "an object") for value in (None, [], "x", 5, True)),
    (body(script=LEFT_OUT), 422, "/script", "required"),
    (body(script=None), 422, "/script", "required"),
    (body({"script": None}, script=None), 422, "/script", "required"),
    *((body(script=value), 422, "/script", "valid string") for value in (5, True, [], {}, [SCRIPT])),
    *(
        (body(script=value), 422, "/script", "should begin with '#!'")
        for value in ("", "echo", " #!/bin/sh", "\n#!/bin/sh", "\ufeff#!/bin/sh", "# !/bin/sh")
    ),
    *((body(script=value), 422, "/script", "carriage return") for value in ("#!/bin/sh\r\necho", "#!/bin/sh\r")),
    (body(script="#!/bin/sh\necho \0"), 422, "/script", "NUL"),
    (body(script=f"#!/bin/sh\necho {HALF}"), 422, "/script", "half a surrogate pair"),
    (body(script="#!/bin/sh\necho \udc00\ud800"), 422, "/script", "half a surrogate pair"),
    (body({"script": "#!/bin/sh\n"}), 422, "/script", "differs from /job/script"),
    (body(x=1), 422, "/x", "unknown field"),
    (body(jobs=[]), 422, "/job", "unknown field beside jobs"),
    (body(account="test"), 422, "/account", "unknown field"),
    ({**body(), HALF: 1}, 422, "", "half a surrogate pair"),
    (body({HALF: 1}), 422, "/job", "half a surrogate pair"),
    ({**body(), **{str(n): n for n in range(200)}}, 422, "", "fields"),
    (body({str(n): n for n in range(201)}), 422, "/job", "fields"),
    (body(script="#!" + "x" * 1024 * 1024), 413, "/script", "1 MiB"),
    (body(script="#!" + "ü" * (512 * 1024)), 413, "/script", "1 MiB"),
    (body({"script": "#!" + "x" * 1024 * 1024}, script=LEFT_OUT), 413, "/job/script", "1 MiB"),
    (body(script="x" * (8 * 1024 * 1024)), 413, None, "8 MiB"),
)


@pytest.mark.parametrize(("document", "status", "where", "detail"), WHOLES)
async def test_a_wrong_submission(api: Api, document: object, status: int, where: str | None, detail: str) -> None:
    check_problem(await api.post(document), status, detail, where)


async def test_all_faults_at_once(api: Api) -> None:
    fields = {"account": "", "tasks": 0, "ntasks_per_node": 2, "standard_output": "/etc/x", "x": 1, "array": "1-2"}
    problem = check_problem(await api.post(body(fields, script="echo", y=2)), 422, "8 faults")
    assert sorted(fault["pointer"] for fault in problem["errors"]) == [
        "/job/account",
        "/job/array",
        "/job/ntasks_per_node",
        "/job/standard_output",
        "/job/tasks",
        "/job/x",
        "/script",
        "/y",
    ]


async def test_a_flood_of_faults_is_cut_short(api: Api) -> None:
    problem = check_problem(await api.post(body({"environment": ["x"] * 10_000})), 422, "10000 faults, the first 100")
    assert len(problem["errors"]) == 100


# --- what is no JSON

INNER = json.dumps(body())[1:-1].encode()

NO_JSON = rows(
    (b"", "no JSON"),
    (b"   ", "no JSON"),
    (b"{", "no JSON"),
    (b"{" + INNER, "no JSON"),
    (b"{" + INNER + b"}x", "no JSON"),
    (b"{" + INNER + b"}{}", "no JSON"),
    (b"{" + INNER + b",}", "no JSON"),
    (b"{" + INNER + b'} // "', "no JSON"),
    (b"{" + INNER + b"}\0", "no JSON"),
    (b"\xef\xbb\xbf{" + INNER + b"}", "no JSON"),
    (b"nul", "no JSON"),
    (b"{'job': 1}", "no JSON"),
    (b"{job: 1}", "no JSON"),
    (b"[1,]", "no JSON"),
    (b"01", "no JSON"),
    (b"+1", "no JSON"),
    (b".5", "no JSON"),
    (b"1.", "no JSON"),
    (b"0x10", "no JSON"),
    (b"1_000", "no JSON"),
    ("١".encode(), "no JSON"),
    (b'"\\x41"', "no JSON"),
    (b'"\\u12"', "no JSON"),
    (b'"a\nb"', "no JSON"),
    (b'"\x01"', "no JSON"),
    (b"job=1&script=2", "no JSON"),
    (b"<job/>", "no JSON"),
    (b"NaN", "NaN"),
    (b"-Infinity", "-Infinity"),
    (b'{"job": {"account": "a", "time_limit": NaN}}', "NaN"),
    (b'{"job": {"account": "a", "time_limit": Infinity}}', "Infinity"),
    (b'{"job": {"account": "a", "time_limit": -Infinity}}', "-Infinity"),
    (b"\xff", "UTF-8 (byte 0)"),
    (b'{"job": "\xc3"}', "UTF-8 (byte 9)"),
    (b'"\xc0\x80"', "UTF-8"),
    (b'"\xed\xa0\x80"', "UTF-8"),
    ("{}".encode("utf-16"), "UTF-8"),
    ("{}".encode("utf-16-le"), "no JSON"),
    (b"{" + INNER + b', "script": "#!"}', '"script" stands twice'),
    (b"{" + INNER + b', "\\u0073cript": "#!"}', '"script" stands twice'),
    (b'{"job": {"account": "a", "account": "a"}, "script": "#!/bin/sh"}', '"account" stands twice'),
    (b'{"job": {"environment": {"A": "1", "A": "2"}}}', '"A" stands twice'),
    (b'{"\\ud800": 1, "\\ud800": 2}', "stands twice"),
    (b'{"x": [[[{"": 1, "": 1}]]]}', '"" stands twice'),
    (b"[" * 100_000, "too deeply"),
    (b'{"a":' * 100_000, "too deeply"),
    (b"[" * 4_000_000 + b"]" * 4_000_000, "too deeply"),
    (b'{"job":' * 50_000 + b"1" + b"}" * 50_000, "too deeply"),
    (b"[" * 1001 + b"]" * 1001, "too deeply"),
    (b'{"x":[' * 500 + b"[]" + b"]}" * 500, "too deeply"),
)


@pytest.mark.parametrize(("sent", "detail"), NO_JSON)
async def test_what_is_no_json(api: Api, sent: bytes, detail: str) -> None:
    answer = await api.ask("POST", JOBS, data=_in_one_piece(sent), headers=JSON)
    check_problem(answer, 400, detail)


async def test_many_brackets_are_not_deep(api: Api) -> None:
    deep = b"[" * 900 + b"]" * 900
    answer = await api.ask("POST", JOBS, data=b"[" + b",".join([deep] * 50) + b"]", headers=JSON)
    check_problem(answer, 422)


def _in_one_piece(sent: bytes) -> Any:
    """With a length; aiohttp warns of large bodies that are bytes."""
    return BytesIO(sent) if sent else b""


NUMBERS = rows(
    (b"1" * 1_000_000, "cpus_per_task", "less than or equal to 1000000"),
    (b"-" + b"1" * 1_000_000, "cpus_per_task", "greater than or equal to 1"),
    (b"1e999", "cpus_per_task", "valid integer"),
    (b"1E0", "cpus_per_task", "valid integer"),
    (b"1" * 1_000_000, "memory_per_node", "lies between"),
    (b"1e999", "memory_per_node", "memory is"),
    (b"1" * 1_000_000, "time_limit", "10 years"),
    (b"1" * 1_000_000 + b".0", "time_limit", "10 years"),
    (b"1e999", "time_limit", "10 years"),
    (b"-1e999", "time_limit", "10 years"),
    (b"9" * 41, "account", "valid string"),
    (b"[" * 900 + b"]" * 900, "account", "valid string"),
    (b"[" * 900 + b"]" * 900, "array", "not supported yet"),
    (b"[" * 900 + b"]" * 900, "environment", "NAME=VALUE"),
    (b'{"a":' * 900 + b"1" + b"}" * 900, "x", "unknown field"),
)


@pytest.mark.parametrize(("value", "field", "detail"), NUMBERS)
async def test_values_of_no_size_that_anybody_needs(api: Api, value: bytes, field: str, detail: str) -> None:
    account = b"" if field == "account" else b'"account": "a", '
    sent = b'{"job": {%s"%s": %s}, "script": "#!/bin/sh"}' % (account, field.encode(), value)
    problem = check_problem(await api.ask("POST", JOBS, data=_in_one_piece(sent), headers=JSON), 422)
    assert (
        any(fault["pointer"].startswith(f"/job/{field}") and detail in fault["detail"] for fault in problem["errors"])
        or detail == "NAME=VALUE"
    )


async def test_two_deep_scripts_are_not_compared(api: Api) -> None:
    deep = b"[" * 900 + b"]" * 900
    sent = b'{"job": {"account": "a", "script": %s}, "script": %s}' % (deep, deep)
    check_problem(await api.ask("POST", JOBS, data=sent, headers=JSON), 422, "valid string", "/script")


# --- what is said of the body

TYPES = rows(
    ({}, "application/json"),
    ({"Content-Type": ""}, "application/json"),
    *(
        ({"Content-Type": kind}, "application/json")
        for kind in (
            "text/plain",
            "text/json",
            "application/jsonx",
            "application/vnd.api+json",
            "application/problem+json",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/json; charset=latin-1",
            "application/json; charset=utf8",
            "application/json; charset=utf-16",
            'application/json; charset="utf-8',
            "application/json; version=1",
            "application/json; charset=utf-8; charset=utf-8",
            "application/json; charset=utf-8; x=y",
            "application/json;",
            "application/json, text/plain",
            "application /json",
            "*/*",
        )
    ),
    *(
        ({**JSON, "Content-Encoding": coding}, "compressed")
        for coding in ("gzip", "deflate", "br", "zstd", "x-gzip", "identity, gzip", "nonsense")
    ),
)


@pytest.mark.parametrize(("headers", "detail"), TYPES)
async def test_a_body_that_says_it_is_something_else(api: Api, headers: dict[str, str], detail: str) -> None:
    lines = [f"{name}: {value}" for name, value in headers.items()]
    sent = b"{" + INNER + b"}"
    raw = await send_raw(api.port, request_bytes("POST", JOBS, *lines, f"Content-Length: {len(sent)}", body=sent))
    check_problem(*answers_in(raw), 415, detail)


async def test_two_content_types(api: Api) -> None:
    lines = ("Content-Type: application/json", "Content-Type: text/plain", "Content-Length: 2")
    check_problem(*answers_in(await send_raw(api.port, request_bytes("POST", JOBS, *lines, body=b"{}"))), 400)


async def test_a_bomb_is_not_unpacked(api: Api) -> None:
    bomb = gzip.compress(b"x" * 50_000_000)
    answer = await api.ask("POST", JOBS, data=bomb, headers={**JSON, "Content-Encoding": "gzip"})
    check_problem(answer, 415, "compressed")


async def test_a_large_body_without_a_length(api: Api) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"script": "'
        for _ in range(9):
            yield b"x" * 1024 * 1024

    check_problem(await api.ask("POST", JOBS, data=chunks(), headers=JSON), 413, "8 MiB")


# --- paths and methods

METHODS = rows(
    *(
        (method, path, allow)
        for path, allow in {
            "/": "GET,HEAD",
            "/health": "GET,HEAD",
            JOBS: "GET,HEAD,POST",
            f"{JOBS}/1": "DELETE,GET,HEAD",
            f"{JOBS}/1/script": "GET,HEAD",
            f"{JOBS}/1/logs": "GET,HEAD",
            f"{JOBS}/1/cancel": "POST",
            "/api/v1/nodes": "GET,HEAD",
            "/api/v1/nodes/n1": "DELETE,GET,HEAD,PATCH",
        }.items()
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")
        if method not in allow
    ),
)


@pytest.mark.parametrize(("method", "path", "allow"), METHODS)
async def test_a_method_that_is_not_possible(api: Api, method: str, path: str, allow: str) -> None:
    answer = await api.ask(method, path)
    check_problem(answer, 405, method)
    assert answer.headers["Allow"] == allow
    assert "Access-Control-Allow-Methods" not in answer.headers


NOWHERE = rows(
    *(
        ("GET", path)
        for path in (
            "/api",
            "/api/v1",
            "/api/v1/",
            "/api/v2/jobs",
            "/API/V1/JOBS",
            f"{JOBS}/",
            f"/{JOBS}",
            f"{JOBS}/1/",
            f"{JOBS}/1/logs/",
            f"{JOBS}/1/nothing",
            f"{JOBS}//logs",
            "/health/",
            "/api/v1/nodes/",
            "/api/v1/nodes/n1/x",
            "/api/v1/../v1/jobs",
            "/api/v1/%2e%2e/v1/jobs",
            "/api/v1%2Fjobs",
            "/favicon.ico",
        )
    ),
    *(
        (method, f"{JOBS}/{job_id}{end}")
        for job_id in ("1", "0", "-1", "01", "x", "1.0", "1e3", "%31", "%D9%A1", "%20", "%00", "%FF", "%ED%A0%80")
        for method, end in (("GET", ""), ("DELETE", ""))
    ),
    *(
        (method, f"{JOBS}/{job_id}{end}")
        for job_id in ("1", "9223372036854775807", "9223372036854775808", "1" * 30, "%2E%2E%2F1", "1;x", "1%0A", "+1")
        for method, end in (("GET", "/script"), ("GET", "/logs"), ("POST", "/cancel"))
    ),
    *(
        ("GET", f"/api/v1/nodes/{name}")
        for name in ("n1", "%00", "%0A", "%FF", "%ED%A0%80", "%2e%2e", "a%2Fb", "%F0%9F%9A%80", "{x}", "x" * 5000)
    ),
)


@pytest.mark.parametrize(("method", "path"), NOWHERE)
async def test_there_is_nothing(api: Api, method: str, path: str) -> None:
    check_problem(await api.ask(method, path), 404)


CANCEL_BODIES = rows(
    (b"x", {}, 415, None),
    (b"{}", {"Content-Type": "text/plain"}, 415, None),
    (b"{", JSON, 400, None),
    (b"[]", JSON, 422, ""),
    (b"null", JSON, 422, ""),
    (b'{"signal": "KILL"}', JSON, 422, "/signal"),
    (json.dumps({"k" * 5000: 1}).encode(), JSON, 422, "/" + "k" * 100),
    (b'{"a": 1, "a": 1}', JSON, 400, None),
    (b"{}", {**JSON, "Content-Encoding": "gzip"}, 415, None),
)


@pytest.mark.parametrize(("sent", "headers", "status", "where"), CANCEL_BODIES)
async def test_a_cancel_that_says_more(
    api: Api, sent: bytes, headers: dict[str, str], status: int, where: str | None
) -> None:
    answer = await api.ask("POST", f"{JOBS}/1/cancel", data=sent, headers=headers, skip_auto_headers=["Content-Type"])
    check_problem(answer, status, "", where)


# --- queries

QUERIES = rows(
    *(("limit", value, "a number from 1 to 200") for value in ("0", "201", "-1", "", "1.0", "%D9%A3", "+5", "1%00")),
    ("limit", "9" * 30, "a number from 1 to 200"),
    ("limit", "5&limit=5", "given once"),
    *(("order", value, "newest or oldest") for value in ("", "NEWEST", "asc", "newest,oldest")),
    *(("state", value, "should be among PENDING") for value in ("", "pending", "PD", "PENDING,", "PENDING,X", "%00")),
    ("state", "PENDING&state=GONE", "should be among PENDING"),
    *(("account", value, "control characters") for value in ("%00", "a%0A", "%7F")),
    *(("name", value, "control characters") for value in ("%00", "%C2%85")),
    ("node", "%00", "control characters"),
    ("account", "a&account=b", "given once"),
    *(
        (field, value, "an RFC 3339 time")
        for field in ("submitted_after", "submitted_before")
        for value in (
            "",
            "now",
            "2026-01-31",
            "2026-01-31T12:00:00",
            "2026-02-30T12:00:00Z",
            "2026-01-31T25:00:00Z",
            "2026-01-31T12:00:00%2B99:00",
            "0001-01-01T00:00:00%2B01:00",
            "9999-12-31T23:59:59-01:00",
            "1700000000",
            "20%D9%A36-01-31T12:00:00Z",
        )
    ),
    *(
        ("cursor", value, "no cursor of this API")
        for value in ("", "x", "%00", "e30", "W10", "bnVsbA", "!!!!", "%C3%BC", "eyJxIjoxLCJqIjoxLjV9", "A" * 4000)
    ),
    ("x", "1", "unknown parameter"),
    ("Limit", "1", "unknown parameter"),
    ("limit%20", "1", "unknown parameter"),
    ("", "", "unknown parameter"),
)


@pytest.mark.parametrize(("parameter", "value", "detail"), QUERIES)
async def test_a_wrong_query_of_a_list(api: Api, parameter: str, value: str, detail: str) -> None:
    answer = await api.get(f"{JOBS}?{parameter}={value}")
    check_problem(answer, 422, detail, parameter.replace("%20", " "), "parameter")


async def test_a_cursor_belongs_to_its_query(a_server: Api) -> None:
    jobs = [(await a_server.submit())["job_id"] for _ in range(2)]
    cursor = (await a_server.get(f"{JOBS}?limit=1")).json["next_cursor"]
    for query in ("order=oldest", "state=PENDING", "account=test", "submitted_after=2020-01-01T00:00:00Z"):
        answer = await a_server.get(f"{JOBS}?{query}&cursor={cursor}")
        check_problem(answer, 422, "belongs to another query", "cursor", "parameter")
    for forged in (cursor[:-2], cursor + "AAAA", cursor.swapcase()):
        check_problem(await a_server.get(f"{JOBS}?cursor={forged}"), 422, "cursor", "cursor", "parameter")
    await _forget(a_server, *jobs)


LOG_QUERIES = rows(
    *(("stream", value, "stdout or stderr") for value in ("", "STDOUT", "both", "../x", "%00")),
    *(
        (field, value, "a number from 0")
        for field in ("offset", "tail")
        for value in ("-1", "", "x", "1.5", "%D9%A3", "%EF%BC%91", "9" * 25, "9223372036854775808", "0x1", "+1", "1%20")
    ),
    ("offset", "1&tail=1", "excludes offset"),
    ("offset", "1&offset=1", "given once"),
    ("path", "/etc/passwd", "unknown parameter"),
)


@pytest.mark.parametrize(("parameter", "value", "detail"), LOG_QUERIES)
async def test_a_wrong_query_of_an_output(api: Api, parameter: str, value: str, detail: str) -> None:
    answer = await api.get(f"{JOBS}/1/logs?{parameter}={value}")
    where = "tail" if "tail=" in value else parameter
    check_problem(answer, 422, detail, where, "parameter")


# --- who asks whom

HOSTS = rows(
    *(
        (host, 200)
        for host in (
            "localhost",
            "LocalHost:8000",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]",
            "[::1]:8000",
            "[::2]:8000",
            "rowlock.example",
            "ROWLOCK.example:99999",
            "other.example:81",
            "[fd00::1]",
            "[FD00::1]:80",
        )
    ),
    *(
        (host, 421)
        for host in (
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "localhost.",
            "evil-localhost",
            "other.example",
            "other.example:82",
            "127.0.0.2",
            "127.1",
            "2130706433",
            "0.0.0.0",  # noqa: S104 - what a page may try
            "[::]",
            "[::ffff:127.0.0.1]",
            "xn--lcalhost-54a",
            "localhost,evil.example",
        )
    ),
    *(
        (host, 400)
        for host in ("", "::1", "[::1", "::1]", "[]", "localhost:x", "localhost:", "localhost:123456", "a b", "a@b")
    ),
    *((host, 400) for host in ("localhost/", "http://localhost", "localhost:80:80", "a\tb")),
)


@pytest.mark.parametrize(("host", "status"), HOSTS)
async def test_the_host_that_is_asked_for(api: Api, host: str, status: int) -> None:
    [answer] = answers_in(await send_raw(api.port, request_bytes("GET", "/", host=host)))
    if status == 200:
        assert answer.status == 200
    else:
        check_problem(answer, status, "Host")


@pytest.mark.parametrize(("method", "path"), [("GET", "/nowhere"), ("PUT", "/"), ("POST", JOBS), ("GET", "/health")])
async def test_the_host_comes_before_all_else(api: Api, method: str, path: str) -> None:
    check_problem(*answers_in(await send_raw(api.port, request_bytes(method, path, host="evil.example"))), 421)


ORIGINS = rows(
    ("localhost:8000", ["http://localhost:8000"], 201),
    ("localhost:8000", ["https://localhost:8000"], 201),
    ("LOCALHOST:8000", ["http://localhost:8000"], 201),
    ("[::1]:8000", ["http://[::1]:8000"], 201),
    ("localhost:8000", ["http://localhost:8001"], 403),
    ("localhost:8000", ["http://localhost"], 403),
    ("localhost:8000", ["http://127.0.0.1:8000"], 403),
    ("localhost:8000", ["http://evil.example"], 403),
    ("localhost:8000", ["http://localhost:8000.evil.example"], 403),
    ("localhost:8000", ["http://evil.example#http://localhost:8000"], 403),
    ("localhost:8000", ["null"], 403),
    ("localhost:8000", [""], 403),
    ("localhost:8000", ["file://"], 403),
    ("localhost:8000", ["ftp://localhost:8000"], 403),
    ("localhost:8000", ["localhost:8000"], 403),
    ("localhost:8000", ["http://localhost:8000/"], 403),
    ("localhost:8000", ["http://localhost:8000 http://evil.example"], 403),
    ("localhost:8000", ["http://localhost:8000", "http://evil.example"], 403),
    ("localhost:8000", ["\xff\xfe"], 403),
)


@pytest.mark.parametrize(("host", "origins", "status"), ORIGINS)
async def test_the_page_that_asks(a_server: Api, host: str, origins: list[str], status: int) -> None:
    sent = b"{" + INNER + b"}"
    lines = ["Content-Type: application/json", f"Content-Length: {len(sent)}", *(f"Origin: {o}" for o in origins)]
    [answer] = answers_in(await send_raw(a_server.port, request_bytes("POST", JOBS, *lines, body=sent, host=host)))
    assert "Access-Control-Allow-Origin" not in answer.headers
    if status == 201:
        await _forget(a_server, answer.json["job_id"])
    else:
        check_problem(answer, status, "origin")
    assert await a_server.stored() == 0


# --- what is hardly HTTP


def post(*headers: str, body: bytes = b"") -> bytes:
    return request_bytes("POST", JOBS, "Content-Type: application/json", *headers, body=body)


UNREADABLE = rows(
    (b"GARBAGE\r\n\r\n",),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",),
    (b"\x00" * 100,),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",),
    (b"GET / HTTP/3.1\r\nHost: localhost\r\n\r\n",),
    (b"GET / HTTP/1.1\nHost: localhost\n\n",),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n",),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",),
    (b"GET / HTTP/1.1\r\n\r\n",),
    (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",),
    (b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    (b"GET http://[bad/ HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    (b"G\xff / HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n",),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGARBAGE\r\n\r\n",),
    (post("Content-Length: abc"),),
    (post("Content-Length: -1"),),
    (post("Content-Length: 1, 2"),),
    (post("Content-Length: +2", body=b"{}"),),
    (post("Content-Length: 2", "Content-Length: 3", body=b"{}"),),
    (post("Content-Length: 2", "Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),),
    (post("Transfer-Encoding: chunked", "Content-Length: 2", body=b"2\r\n{}\r\n0\r\n\r\n"),),
    (post("Transfer-Encoding: gzip", body=b"{}"),),
    (post("Transfer-Encoding: chunked, gzip", body=b"{}"),),
    (post("Transfer-Encoding: chunked, chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),),
    (post("Transfer-Encoding: xchunked", body=b"2\r\n{}\r\n0\r\n\r\n"),),
    (post("Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),),
    (post("Transfer-Encoding: chunked", body=b"-2\r\n{}\r\n0\r\n\r\n"),),
    (post("Transfer-Encoding: chunked", body=b"2\r\n{}xx0\r\n\r\n"),),
    (post("Transfer-Encoding: chunked", body=b"fffffffffffffffffff\r\n{}"),),
)


@pytest.mark.parametrize("sent", UNREADABLE)
async def test_what_cannot_be_read_ends_the_connection(api: Api, sent: bytes) -> None:
    check_problem(answers_in(await send_raw(api.port, sent))[-1], 400)


@pytest.mark.parametrize("chunk", rows((b"zz\r\n",), (b"2\r\n{}xx",), (b"2\r\n{}\r\nGARBAGE",)))
async def test_a_body_that_breaks_on_its_way(api: Api, chunk: bytes) -> None:
    raw = await send_raw(api.port, post("Transfer-Encoding: chunked"), chunk)
    check_problem(answers_in(raw)[0], 400)


@pytest.mark.parametrize(
    "sent",
    rows(
        (post("Content-Length: 10", body=b"{}"),),
        (post("Transfer-Encoding: chunked", body=b"5\r\n{}"),),
        (post("Transfer-Encoding: chunked", body=b"2\r\n{}\r\n"),),
        (post(f"Content-Length: {len(INNER) + 3}", body=b"{" + INNER + b"}"),),
        (b"POST /api/v1/jobs HTT",),
    ),
)
async def test_a_body_that_is_cut_off(api: Api, sent: bytes) -> None:
    for answer in answers_in(await send_raw(api.port, sent, end=True)):
        check_problem(answer, 400)


async def test_a_body_that_never_comes(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.api.guard.BODY_SECONDS", 0.05)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = await api.ask("POST", JOBS, data=slowly(), headers=JSON)
    check_problem(answer, 408, "longer than")
    assert answer.headers["Connection"] == "close"


async def test_garbage_behind_a_good_request(a_server: Api) -> None:
    sent = b"{" + INNER + b"}"
    keep = post(f"Content-Length: {len(sent)}", body=sent).replace(b"Connection: close\r\n", b"")
    first, second = answers_in(await send_raw(a_server.port, keep, b"GARBAGE\r\n\r\n"))
    assert first.status == 201
    check_problem(second, 400)
    await _forget(a_server, first.json["job_id"])
    assert await a_server.stored() == 0


async def test_many_requests_at_once_on_one_connection(api: Api) -> None:
    one = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"
    found = answers_in(await send_raw(api.port, one * 20 + request_bytes("GET", "/")))
    assert [answer.status for answer in found] == [404] * 20 + [200]


EXPECTATIONS = rows(
    *((method, path, 417) for method, path in (("GET", "/"), ("GET", "/nowhere"), ("PUT", "/"), ("POST", JOBS))),
)


@pytest.mark.parametrize(("method", "path", "status"), EXPECTATIONS)
async def test_an_expectation_that_cannot_be_met(api: Api, method: str, path: str, status: int) -> None:
    raw = await send_raw(api.port, request_bytes(method, path, "Expect: the-unexpected"))
    check_problem(*answers_in(raw), status, "100-continue")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Content-Type: application/json", "Content-Length: 99999999"), 413),
        (("Content-Type: text/plain", "Content-Length: 10"), 415),
        (("Content-Type: application/json", "Content-Length: 10", "Content-Encoding: gzip"), 415),
    ],
)
async def test_a_body_that_would_be_refused_is_not_asked_for(api: Api, headers: tuple[str, ...], status: int) -> None:
    raw = await send_raw(api.port, request_bytes("POST", JOBS, "Expect: 100-continue", *headers), last=b'"}')
    check_problem(*answers_in(raw), status)  # the one answer: no "100 Continue" before it
