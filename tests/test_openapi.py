"""The API's description: complete, valid and true; the page made of it; the README beside it."""

import asyncio
import base64
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.api import docs, models, openapi
from services.api.app import ROUTES
from tests.api import Api, api_of_a_module, check_problem
from tests.builders import a_node, register
from tests.conftest import Databases

pytestmark = pytest.mark.anyio

CONFIG = Path(__file__).parent / "data" / "schemathesis.toml"
README = Path(__file__).parents[1] / "README.md"

Described = tuple[str, str, dict[str, Any]]


@pytest.fixture(scope="module")
async def api(databases: Databases, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with api_of_a_module(databases, redis_url, tmp_path_factory.mktemp("api")) as found:
        await register(found.database, a_node("node-01", 1_000_000))
        yield found


@pytest.fixture
async def fresh(databases: Databases, redis_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """One in which nothing has been done: what is answered decides what is asked next."""
    async with api_of_a_module(databases, redis_url, tmp_path) as found:
        await register(found.database, a_node("node-01", 1_000_000))
        yield found


def described() -> list[Described]:
    """Method, path and description of every operation."""
    paths = openapi.document()["paths"]
    return [(method.upper(), path, what) for path, methods in paths.items() for method, what in methods.items()]


def conforms(instance: object, schema: dict[str, Any]) -> bool:
    """Whether it is what the description says."""
    whole = {**schema, "components": openapi.document()["components"]}
    return jsonschema_rs.Draft202012Validator(whole).is_valid(instance)


def media(what: object) -> Iterator[dict[str, Any]]:
    """Everything in the description that has a schema and an example of it."""
    if isinstance(what, dict):
        for name, inner in what.items():
            yield from inner.values() if name == "content" else media(inner)


def test_it_is_openapi() -> None:
    from schemathesis.specs.openapi.definitions import OPENAPI_31  # takes a second, of this test alone

    jsonschema_rs.Draft202012Validator(OPENAPI_31).validate(openapi.document())


def test_it_describes_what_is_served_and_nothing_else() -> None:
    served = {(method, openapi.path_of(path)) for method, path, _ in ROUTES}
    assert {(method, path) for method, path, _ in described()} == served


def test_each_operation_has_a_name_of_its_own_and_the_parameters_of_its_path() -> None:
    assert len({what["operationId"] for _, _, what in described()}) == len(ROUTES)
    for _, path, what in described():
        in_path = [parameter["name"] for parameter in what["parameters"] if parameter["in"] == "path"]
        assert in_path == re.findall(r"\{(\w+)\}", path)


def test_each_reference_leads_somewhere() -> None:
    text = json.dumps(openapi.document())
    for kind, name in set(re.findall(r'"#/components/(\w+)/(\w+)"', text)):
        assert name in openapi.document()["components"][kind]


def test_its_examples_are_what_it_says() -> None:
    found = list(media(openapi.document()))
    assert len(found) > len(ROUTES)
    for shown in found:
        examples = [each["value"] for each in shown.get("examples", {}).values()] or [shown["example"]]
        assert all(conforms(example, shown["schema"]) for example in examples), examples


TEXTS = st.text(st.sampled_from("#!/bin\r\n\t\0\x1f\x7f\x85aZ_9=-SLURM é"), max_size=12) | st.text(max_size=12)
PAIRS = [
    (models.SCRIPT, models._script),
    (models.NO_CONTROLS, models._without_controls),
    (models.NO_CONTROLS_BUT_LINES, models._comment),
    (models.NO_NUL, models._variable_value),
    (models.VARIABLE, models._variable_name),
    (models.ENTRY, models._entry),
]


@pytest.mark.parametrize(("pattern", "check"), PAIRS)
def test_a_pattern_says_what_is_checked(pattern: str, check: Any) -> None:
    described = jsonschema_rs.Draft202012Validator({"pattern": pattern})

    @settings(max_examples=150, deadline=None)
    @given(TEXTS | TEXTS.map("#!{}".format) | TEXTS.map("SLURM_{}".format) | TEXTS.map("a={}".format))
    def compare(text: str) -> None:
        try:
            check(text)
        except ValueError:
            assert not described.is_valid(text)
        else:
            assert described.is_valid(text)

    compare()


@pytest.mark.parametrize("field", [name for name, _ in models.JobRequest.model_fields.items()])
def test_a_field_that_asks_for_nothing(field: str) -> None:
    """Of the fields of Slurm's, the very values that are taken are described."""
    about = {"$ref": "#/components/schemas/JobRequest"}
    for value in (None, False, "", [], {}, 0, 1, "1", "normal", True, ["NONE"], "now", -1, "x"):
        try:
            models.JobRequest.model_validate({"account": "a", field: value}, context=SITE)
        except ValueError:
            assert not conforms({"account": "a", field: value}, about), value
        else:
            assert conforms({"account": "a", field: value}, about), value


SITE = models.Site(roots=(), default_partition="default", user="me")


async def test_it_is_served_behind_the_guard(api: Api) -> None:
    answer = await api.get("/openapi.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json == openapi.document()
    for path in ("/openapi.json", "/docs"):
        check_problem(await api.get(path, headers={"Host": "evil.example"}), 421)
        check_problem(await api.get(path, headers={"Origin": "http://evil.example"}), 403)
        check_problem(await api.ask("POST", path), 405)


class Tags(HTMLParser):
    """The tags of a page, its text, and that what it opens is closed where it must be."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_page_loads_nothing(api: Api) -> None:
    answer = await api.get("/docs")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page = Tags()
    page.feed(answer.body.decode())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "form", "object", "base"})
    for _, attributes in page.tags:
        assert attributes.keys() <= {"href", "id", "lang", "charset", "name", "content"}
        assert (attributes.get("href") or "#").startswith(("#", "/openapi.json"))
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {href[1:] for _, a in page.tags if (href := a.get("href") or "").startswith("#")} <= targets
    style = re.search(r"<style>(.*)</style>", answer.body.decode(), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")


async def test_the_page_shows_everything(api: Api) -> None:
    page = Tags()
    page.feed((await api.get("/docs")).body.decode())
    for method, path, what in described():
        assert f"{method} {path}" in page.text
        assert what["summary"] in page.text
        assert all(parameter["name"] in page.text for parameter in what["parameters"])
    assert all(name in page.text for name in openapi.document()["components"]["schemas"])


def test_what_stands_on_the_page_is_no_markup() -> None:
    """Whatever comes into the description, say by an example."""
    evil = "<script>alert('&\"')</script>"

    def poisoned(what: Any, key: str = "") -> Any:
        if isinstance(what, dict):
            return {name: poisoned(inner, name) for name, inner in what.items()}
        if isinstance(what, list):
            return [poisoned(inner, key) for inner in what]
        return what + evil if isinstance(what, str) and key in ("summary", "description", "detail", "enum") else what

    page = Tags()
    page.feed(docs.page(poisoned(openapi.document()), f"http://{evil}"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) > 100


async def test_the_calls_on_the_page_work(api: Api) -> None:
    """In an order in which they can: a job first, and the end of what is looked at last."""
    order = {"POST": 0, "PATCH": 1, "GET": 2, "DELETE": 3}
    for method, path, what in sorted(described(), key=lambda each: order[each[0]]):
        words = shlex.split(docs.curl(api.address, method, path, what))
        url = next(word for word in words if word.startswith("http"))
        given = dict(itertools.pairwise(words))
        assert given.get("-X", "GET") == method
        headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
        answer = await api.ask(method, url.removeprefix(api.address), data=given.get("-d"), headers=headers)
        alive = what["operationId"] == "delete_node"
        assert answer.status == 409 if alive else answer.status < 300, (method, path, answer.body)
        told = what["responses"][str(answer.status)]
        if "content" in told and answer.headers["Content-Type"].startswith("application/json"):
            assert conforms(answer.json, told["content"]["application/json"]["schema"])


def test_the_table_of_the_readme() -> None:
    """Its calls are those of the description; what is served to tell of the API stands beside it."""
    text = README.read_text(encoding="utf-8").partition("## HTTP")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    calls = [call.split(" ") for row in rows for call in re.findall(r"`((?:GET|POST|PATCH|DELETE) [^`]*)`", row)]
    at_the_root = {"/", "/health", "/openapi.json", "/docs"}
    told = {
        (method, path if path in at_the_root else f"/api/v1{path}")
        for method, path in ((method, path.partition("?")[0]) for method, path in calls)
    }
    assert told == {(method, path) for method, path, _ in described()}


async def schemathesis(api: Api, folder: Path, *options: str) -> None:
    """Every check against the live document, the same cases each time."""
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{api.address}/openapi.json",
        "--generation-deterministic", *options,
        cwd=folder, stdout=PIPE, stderr=STDOUT, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    text = (await run.communicate())[0].decode()
    assert run.returncode == 0, text


@pytest.mark.parametrize(
    "options",
    [
        # Of a submission there are hundreds of such cases, which the longer run goes through.
        ("--phases", "coverage", "--exclude-operation-id", "submit"),
        ("--phases", "examples,fuzzing,stateful", "--max-examples", "5"),
    ],
    ids=["coverage", "fuzzing"],
)
async def test_schemathesis_finds_nothing(fresh: Api, tmp_path: Path, options: tuple[str, ...]) -> None:
    await schemathesis(fresh, tmp_path, *options)


@pytest.mark.long
async def test_schemathesis_finds_nothing_in_a_longer_run(fresh: Api, tmp_path: Path) -> None:
    await schemathesis(fresh, tmp_path, "--max-examples", "50")
