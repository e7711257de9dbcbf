"""Every error answer is a problem document (RFC 9457)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from core.documents import FaultDocument, ProblemDocument
from core.errors import RowlockError, Unavailable

CONTENT_TYPE = "application/problem+json"
RETRY_SECONDS = 2
MAX_FAULTS = 100


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: `pointer` (RFC 6901) says where in the body, `parameter` in the query."""

    detail: str
    pointer: str | None = None
    parameter: str | None = None

    def document(self) -> FaultDocument:
        """The fault as a member of ``errors``."""
        found: FaultDocument = {"detail": self.detail}
        if self.pointer is not None:
            found = {"pointer": self.pointer, **found}
        if self.parameter is not None:
            found = {"parameter": self.parameter, **found}
        return found


class Problem(RowlockError):
    """Raised anywhere in a request; it becomes the answer. `closes` says that the connection ends with it."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.faults = tuple(faults)
        self.headers = dict(headers or {})
        self.closes = closes

    def response(self) -> web.Response:
        """The answer."""
        document: ProblemDocument = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.faults:
            document["errors"] = [fault.document() for fault in self.faults[:MAX_FAULTS]]
        body = json.dumps(document).encode()
        response = web.Response(status=self.status, body=body, content_type=CONTENT_TYPE, headers=self.headers)
        if self.closes:
            response.force_close()
        return response


def within(number: int, faults: Iterable[Fault]) -> list[Fault]:
    """Faults of one job, as faults of the list that it stands in."""
    return [replace(fault, pointer=f"/jobs/{number}{fault.pointer}") for fault in faults]


def unprocessable(faults: Sequence[Fault]) -> Problem:
    """422 with all faults at once."""
    count = len(faults)
    more = f", the first {MAX_FAULTS} of them here" if count > MAX_FAULTS else ""
    return Problem(422, f"{count} fault{'s' if count > 1 else ''}{more}", faults=faults)


def unavailable(detail: str) -> Problem:
    """503: the client may try again soon."""
    return Problem(503, detail, headers={"Retry-After": str(RETRY_SECONDS)})


def from_http_exception(error: web.HTTPException) -> Problem:
    """What aiohttp itself refuses: no such path, no such method, too large."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    match error:
        case web.HTTPNotFound():
            detail = "there is nothing at this path"
        case web.HTTPMethodNotAllowed():
            detail = f"{error.method} is not possible here, but {error.headers.get('Allow', 'nothing')} is"
        case web.HTTPExpectationFailed():
            detail = "the only expectation that can be met is 100-continue"
        case _:
            detail = error.reason
    return Problem(error.status, detail, headers=headers)


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what is raised into its answer; a crash is logged, and told without its traceback."""
    try:
        return await handler(request)
    except Problem as problem:
        return problem.response()
    except Unavailable as error:
        return unavailable(str(error)).response()
    except web.HTTPException as error:
        return from_http_exception(error).response()
    except Exception as error:  # noqa: BLE001 - the last resort: logged with its traceback, answered without
        structlog.get_logger().error("request_crashed", path=request.rel_url.raw_path, exc_info=error)
        return Problem(500, "an error of Rowlock's own; its log has the details").response()
