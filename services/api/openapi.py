"""The API's own description, OpenAPI 3.1: made of the very declarations by which requests are read and answered."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, Final

from pydantic import TypeAdapter

from core import __version__
from core.documents import (
    HealthDocument,
    JobDocument,
    JobsDocument,
    NodeDocument,
    NodesDocument,
    ProblemDocument,
    RootDocument,
    SubmittedDocument,
)
from core.states import State
from services.api import examples, guard, idempotency, listing, lists, models, problems

Json = dict[str, Any]

JSON: Final = "application/json"
TEXT: Final = "text/plain"
EVENTS: Final = "text/event-stream"
ABOUT: Final = (
    "Post a script and the CPUs it needs, and it runs on a node that has them. Where GET is possible, HEAD is as well;"
    " another method is answered 405 with `Allow`, another path 404. Every error is a problem document (RFC 9457)."
    " A request whose Host this server does not go by is refused, and so is one from a page of another origin."
    " Every answer has an X-Request-ID, the request's own where it brings a good one."
)

_BODIES: Final = (models.SubmitRequest, models.NodeRequest)
_ANSWERS: Final = (
    JobDocument,
    JobsDocument,
    SubmittedDocument,
    NodeDocument,
    NodesDocument,
    HealthDocument,
    RootDocument,
    ProblemDocument,
)
_LIST: Final = "SubmitListRequest"

WHY: Final[Mapping[int, str]] = {
    400: "No HTTP or no JSON, a Host header that is none, or an Idempotency-Key that is none",
    403: "From a page of another origin",
    404: "There is no such thing",
    408: f"The body took longer than {guard.BODY_SECONDS} s",
    409: "The node is not DOWN, or holds jobs",
    410: "The node that had the output was deleted",
    413: guard.TOO_LARGE[0].upper() + guard.TOO_LARGE[1:] + f"; a script, {models.MAX_SCRIPT // 2**20} MiB",
    415: "The body is not application/json, or compressed",
    416: "The output does not reach that far",
    417: "An expectation other than 100-continue",
    421: "This server does not go by that Host",
    422: "Every fault, with its place",
    500: "An error of Rowlock's own",
    503: "PostgreSQL, or the node that has the output, is away: try again soon",
}
ALWAYS: Final = (400, 403, 417, 421, 500)
BODY: Final = (408, 413, 415, 422)


@cache
def document() -> Json:
    """The whole of it; made when it is asked for first."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rowlock", "version": __version__, "description": ABOUT},
        "servers": [{"url": "/"}],
        "paths": _tagged(_paths()),
        "components": {"schemas": _schemas(), "responses": {_name(status): _problem(status) for status in WHY}},
    }


def _tagged(paths: Json) -> Json:
    """With what all JSON that is read has: a tag, and an answer to who knows it."""
    for methods in paths.values():
        answers = methods.get("get", {"responses": {}})["responses"]
        if JSON in answers.get("200", {}).get("content", {}):
            tag = _header("ETag", "Of what is answered.", {"type": "string"})
            answers["200"] = {**answers["200"], "headers": tag}
            answers["304"] = {"description": "It is what If-None-Match has.", "headers": tag}
            methods["get"]["parameters"].append(_in_header("If-None-Match", "Tags of what the client has."))
    return paths


def path_of(route: str) -> str:
    """A route's path as OpenAPI spells it: without a pattern of its variables."""
    return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route)


def _schemas() -> Json:
    bodies = [(body.__name__, "validation", TypeAdapter(body)) for body in _BODIES]
    answers = [(answer.__name__, "serialization", TypeAdapter(answer)) for answer in _ANSWERS]
    _, found = TypeAdapter.json_schemas([*bodies, *answers], ref_template="#/components/schemas/{model}")  # type: ignore[list-item]
    schemas: Json = found["$defs"]
    schemas[_LIST] = {  # looked at item by item, so that others have their turn
        "type": "object",
        "description": "Many jobs: all of them are stored, or none.",
        "properties": {"jobs": _list_of(_ref("SubmitRequest"), 1, lists.MAX_JOBS)},
        "required": ["jobs"],
        "additionalProperties": False,
    }
    for schema in schemas.values():
        schema.pop("title", None)
        for name, field in schema["properties"].items():
            field.pop("title", None)
            if name.endswith(("_time", "_at")):
                _add_format(field)
    schemas["JobDocument"]["properties"]["state"]["enum"] = [*State]
    schemas["JobPart"] = {**schemas["JobDocument"], "description": "Some fields of a job.", "required": []}
    parts = {**schemas["JobsDocument"]["properties"], "jobs": {"type": "array", "items": _ref("JobPart")}}
    schemas["JobsPart"] = {**schemas["JobsDocument"], "description": "A page, some fields a job.", "properties": parts}
    return schemas


def _add_format(field: Json) -> None:
    for text in field.get("anyOf", [field]):
        if text["type"] == "string":
            text["format"] = "date-time"


def _list_of(item: Json, least: int, most: int) -> Json:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def _ref(name: str, kind: str = "schemas") -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _name(status: int) -> str:
    return f"Problem{status}"


def _problem(status: int) -> Json:
    fault = {"pointer": "/job/cpus_per_task", "detail": "Input should be greater than or equal to 1"}
    example = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": "1 fault" if status == 422 else WHY[status],
        **({"errors": [fault]} if status == 422 else {}),
    }
    headers = {503: _header("Retry-After", "Seconds.", {"type": "integer"})}
    headers[416] = _header("Content-Range", "How long the output is.", {"type": "string"})
    content = {problems.CONTENT_TYPE: {"schema": _ref("ProblemDocument"), "example": example}}
    return {"description": WHY[status] + ".", "headers": headers.get(status, {}), "content": content}


def _header(name: str, says: str, schema: Json) -> Json:
    return {name: {"description": says, "schema": schema}}


def _answer(says: str, schema: Json, example: object, *, media: str = JSON, headers: Json | None = None) -> Json:
    return {"description": says, "headers": headers or {}, "content": {media: {"schema": schema, "example": example}}}


def _operation(
    name: str,
    tag: str,
    says: str,
    answers: Mapping[int, Json],
    *refusals: int,
    parameters: Sequence[Json] = (),
    body: Json | None = None,
) -> Json:
    """One operation; `refusals` are the problems that it has beside those that everything has."""
    refused = {str(status): _ref(_name(status), "responses") for status in sorted({*ALWAYS, *refusals})}
    return {
        "operationId": name,
        "tags": [tag],
        "summary": says,
        "parameters": list(parameters),
        **({"requestBody": body} if body else {}),
        "responses": {**{str(status): answer for status, answer in answers.items()}, **refused},
    }


def _body(schema: Json, shown: Mapping[str, object], *, required: bool = True) -> Json:
    named = {name: {"value": value} for name, value in shown.items()}
    return {"required": required, "content": {JSON: {"schema": schema, "examples": named}}}


def _query(parameter: listing.Parameter[Any]) -> Json:
    schema = {"type": "array", "items": parameter.schema} if parameter.several else parameter.schema
    spread = {"style": "form", "explode": True} if parameter.several else {}
    return {"name": parameter.name, "in": "query", "description": parameter.says, "schema": schema, **spread}


def _in_header(name: str, says: str, **schema: Any) -> Json:
    return {"name": name, "in": "header", "description": says, "schema": {"type": "string", **schema}}


def _in_path(name: str, example: object, **schema: Any) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": schema, "example": example}


_JOB: Final = _in_path("job_id", 1, type="integer", minimum=1, maximum=2**63 - 1)
_NAME: Final = _in_path("name", "node-01", type="string", minLength=1)
_KEY: Final = _in_header(
    idempotency.HEADER,
    "Makes the submission one job, however often it is sent; it belongs to the account.",
    pattern=f"^{idempotency.KEY.pattern}$",
)
_RANGE: Final = _in_header("Range", "One range of bytes (RFC 9110); anything else is ignored.")

_LAST_EVENT: Final = _in_header(
    "Last-Event-ID", "Of whoever follows: the id of its last event, OFFSET or ATTEMPT-OFFSET; goes on behind that."
)


def _paths() -> Json:
    jobs, job = "/api/v1/jobs", "/api/v1/jobs/{job_id}"
    return {
        "/": {"get": _operation("root", "service", "What this is", {200: _ROOT})},
        "/health": {"get": _operation("health", "service", "Whether all is well", {200: _HEALTH}, 503)},
        "/openapi.json": {"get": _operation("openapi", "service", "This description", {200: _DESCRIPTION})},
        "/docs": {"get": _operation("docs", "service", "This description, to be read", {200: _PAGE})},
        jobs: {"post": _post_jobs(), "get": _list_jobs()},
        job: {"get": _get_job(), "delete": _cancel("cancel_job")},
        f"{job}/cancel": {"post": _cancel("post_cancel", *BODY, body=_NOTHING)},
        f"{job}/script": {"get": _get_script()},
        f"{job}/logs": {"get": _get_logs()},
        "/api/v1/nodes": {"get": _operation("list_nodes", "nodes", "Every node, by name", {200: _NODES}, 503)},
        "/api/v1/nodes/{name}": {"get": _get_node(), "patch": _patch_node(), "delete": _delete_node()},
    }


_VERSION: Final = {"service": "rowlock-api", "version": __version__}
_ROOT: Final = _answer("Where to go on.", _ref("RootDocument"), {**_VERSION, "links": {"jobs": "/api/v1/jobs"}})
_HEALTH: Final = _answer(
    "PostgreSQL answers, is safe, and the schema fits.", _ref("HealthDocument"), {"status": "ok", **_VERSION}
)
_DESCRIPTION: Final = _answer("OpenAPI 3.1.", {"type": "object"}, {"openapi": "3.1.0"})
_PAGE: Final = _answer("One page that loads nothing.", {"type": "string"}, "<!DOCTYPE html>…", media="text/html")
_NODES: Final = _answer("All of them.", _ref("NodesDocument"), {"nodes": [examples.NODE]})
_NOTHING: Final = _body({"type": "object", "maxProperties": 0}, {"nothing": {}}, required=False)


def _job(says: str, headers: Json | None = None) -> Json:
    return _answer(says, _ref("JobDocument"), examples.JOB, headers=headers)


def _post_jobs() -> Json:
    location = _header("Location", "The job; of a list there is none.", {"type": "string"})
    replay = _header(idempotency.REPLAY, "That it was there already.", {"const": "true"})
    either = {"anyOf": [_ref("JobDocument"), _ref("SubmittedDocument")]}
    stored = _answer("Stored: the job; of a list, each number.", either, examples.JOB, headers=location)
    known = _answer("Its key has it already.", either, examples.JOB, headers={**location, **replay})
    many = {"jobs": [examples.REQUEST, examples.REQUEST]}
    body = _body({"anyOf": [_ref("SubmitRequest"), _ref(_LIST)]}, {"one job": examples.REQUEST, "many jobs": many})
    for_job = {"parameters": {"job_id": "$response.body#/job_id"}}
    stored["links"] = {name: {"operationId": name, **for_job} for name in ("get_job", "get_logs", "cancel_job")}
    answers = {201: stored, 200: known}
    says = "Submit a job, or a list of them: stored after the commit, all or none"
    return _operation("submit", "jobs", says, answers, *BODY, 503, parameters=[_KEY], body=body)


def _list_jobs() -> Json:
    either = {"anyOf": [_ref("JobsDocument"), _ref("JobsPart")]}
    page = _answer("A page; with `fields`, of these alone.", either, {"jobs": [examples.JOB], "next_cursor": None})
    parameters = [_query(parameter) for parameter in listing.PAGE]
    return _operation("list_jobs", "jobs", "Jobs, page by page", {200: page}, 422, 503, parameters=parameters)


def _get_job() -> Json:
    parameters = [_JOB, *(_query(parameter) for parameter in listing.PATIENCE)]
    either = {"anyOf": [_ref("JobDocument"), _ref("JobPart")]}
    answers = {200: _answer("The job as it is; with `fields`, these alone.", either, examples.JOB)}
    says = "A job, at once or once it is over"
    return _operation("get_job", "jobs", says, answers, 404, 422, 503, parameters=parameters)


def _cancel(name: str, *refusals: int, body: Json | None = None) -> Json:
    answers = {200: _job("It is over."), 202: _job("It is being ended.")}
    says = "Cancel a job; again is fine"
    return _operation(name, "jobs", says, answers, 404, 503, *refusals, parameters=[_JOB], body=body)


def _get_script() -> Json:
    answers = {200: _answer("As submitted.", {"type": "string"}, examples.REQUEST["script"], media=TEXT)}
    return _operation("get_script", "jobs", "The script of a job", answers, 404, 503, parameters=[_JOB])


def _get_logs() -> Json:
    ranges = _header("Accept-Ranges", "bytes", {"type": "string"})
    which = _header("Content-Range", "Which bytes.", {"type": "string"})
    answers = {
        200: _answer("As written; followed, as events.", {"type": "string"}, "hello\n", media=TEXT, headers=ranges),
        206: _answer("The range asked for.", {"type": "string"}, "ell", media=TEXT, headers={**ranges, **which}),
    }
    answers[200]["content"][EVENTS] = {"schema": {"type": "string"}, "example": examples.EVENTS}
    parameters = [_JOB, *(_query(parameter) for parameter in listing.EXCERPT), _RANGE, _LAST_EVENT]
    says = "The output of a job, also while it runs"
    return _operation("get_logs", "jobs", says, answers, 404, 410, 416, 422, 503, parameters=parameters)


def _get_node() -> Json:
    answers = {200: _answer("The node.", _ref("NodeDocument"), examples.NODE)}
    return _operation("get_node", "nodes", "One node", answers, 404, 503, parameters=[_NAME])


def _patch_node() -> Json:
    answers = {200: _answer("The node as it is then.", _ref("NodeDocument"), examples.NODE)}
    body = _body(_ref("NodeRequest"), {"drain": {"state": "DRAIN", "reason": "new fan"}, "resume": {"state": "RESUME"}})
    says = "Take a node out, or back in"
    return _operation("set_node_state", "nodes", says, answers, *BODY, 404, 503, parameters=[_NAME], body=body)


def _delete_node() -> Json:
    answers = {204: {"description": "It is forgotten."}}
    says = "Forget a node that is DOWN and holds nothing"
    return _operation("delete_node", "nodes", says, answers, 404, 409, 503, parameters=[_NAME])
