"""Bodies as they must look: pydantic here, at the edge, and a NewJob for everybody behind it."""

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from core import patterns
from core.records import NewJob
from core.units import CLOCK, DAYS, MAX_MEMORY, MAX_TIME_LIMIT, MEMORY, parse_memory, parse_time_limit
from services.api.idempotency import digest
from services.api.problems import Fault, Problem, unprocessable

MAX_CPUS: Final = 1_000_000
"""The largest TOTAL_CPUS that a node may say."""
MAX_SCRIPT: Final = 1024 * 1024
MAX_COMMENT: Final = 4096
MAX_FIELDS: Final = 200
# The kernel starts nothing with a longer variable (MAX_ARG_STRLEN), nor with many more bytes in all.
MAX_VARIABLE: Final = 128 * 1024
MAX_ENVIRONMENT: Final = 1024 * 1024
MAX_VARIABLES: Final = 10_000

NULL_DEVICE: Final = "/dev/null"
TASK_FIELDS: Final = ("tasks", "tasks_per_node", "ntasks_per_node")

# Patterns as JSON Schema has them. They stand in the API's document; what is refused is told more precisely below.
NO_CONTROLS: Final = r"^[^\x00-\x1f\x7f-\x9f]*$"
NO_CONTROLS_BUT_LINES: Final = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
NO_NUL: Final = r"^[^\x00]*$"
SCRIPT: Final = r"^#!([^\x00\n]*[^\x00\n\r])?(\n[^\x00]*)?$"
VARIABLE: Final = r"^(?!SLURM_)[A-Za-z_][A-Za-z0-9_]*$"
ENTRY: Final = r"^(?!SLURM_)[A-Za-z_][A-Za-z0-9_]*=[^\x00]*$"

_SIZES: Final = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": MAX_MEMORY},
        {"type": "string", "pattern": f"^{MEMORY.pattern}$"},
        {"type": "null"},
    ]
}
_LIMITS: Final = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": MAX_TIME_LIMIT // 60},
        {"type": "string", "pattern": f"^({DAYS.pattern}|{CLOCK.pattern}|UNLIMITED|INFINITE)$"},
        {"type": "null"},
    ]
}
UNBUILT: Final = "Slurm's, not supported yet: only what asks for nothing"

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Site:
    """What of the settings a submission is held against."""

    roots: tuple[PurePosixPath, ...]
    default_partition: str
    user: str


def _whole(text: str) -> str:
    """Half a surrogate pair is no text: neither UTF-8 nor PostgreSQL can hold it."""
    if _SURROGATE.search(text):
        raise ValueError("should be text: it holds half a surrogate pair")
    return text


def _without_controls(text: str, allowed: str = "") -> str:
    if any(unicodedata.category(c) == "Cc" and c not in allowed for c in text):
        raise ValueError("should not hold control characters")
    return text


def _comment(text: str) -> str:
    return _without_controls(text, "\n\t")


def _script(text: str) -> str:
    if not text.startswith("#!"):
        raise ValueError("should begin with '#!' and the interpreter, such as #!/bin/bash")
    if text.partition("\n")[0].endswith("\r"):
        raise ValueError("the first line ends in a carriage return: save the script with Unix line ends")
    if "\0" in text:
        raise ValueError("should not hold NUL")
    return _whole(text)


def _variable_name(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("the name of a variable should be [A-Za-z_][A-Za-z0-9_]*")
    if name.startswith("SLURM_"):
        raise ValueError("names that begin with SLURM_ are Rowlock's own")
    return name


def _variable_value(value: str) -> str:
    if "\0" in value:
        raise ValueError("should not hold NUL")
    return _whole(value)


def _entry(entry: str) -> str:
    name, equals, value = entry.partition("=")
    if not equals:
        raise ValueError("should be NAME=VALUE")
    _variable_name(name)
    _variable_value(value)
    return entry


def _kind_of_environment(value: object) -> str | None:
    return "map" if isinstance(value, dict) else "list" if isinstance(value, list) else None


def _nothing_is_empty(value: object) -> object:
    return {} if value is None else value


def _environment(value: dict[str, str] | list[str]) -> dict[str, str]:
    pairs = list(value.items()) if isinstance(value, dict) else [_pair(entry) for entry in value]
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a variable is given twice")
    sizes = [len(name) + len(text.encode()) + 2 for name, text in pairs]
    if max(sizes, default=0) > MAX_VARIABLE:
        raise ValueError("a variable is too large: less than 128 KiB")
    if sum(sizes) > MAX_ENVIRONMENT:
        raise ValueError("the environment is too large: at most 1 MiB in all")
    return found


def _pair(entry: str) -> tuple[str, str]:
    name, _, value = entry.partition("=")
    return name, value


def _time_limit(value: Any) -> int | None:
    return None if value is None else parse_time_limit(value)


def _memory(value: Any) -> int | None:
    return None if value is None else parse_memory(value)


def _site(info: ValidationInfo) -> Site:
    assert isinstance(info.context, Site)
    return info.context


def _folder(text: str, info: ValidationInfo) -> str:
    _check_length(text)
    _without_controls(_whole(text))
    path = PurePosixPath(text)
    if not text:
        raise ValueError("should not be empty; leave it out for the job's own directory")
    if ".." in path.parts:
        raise ValueError("should not hold '..'")
    if len(text.encode()) > patterns.MAX_PATH or any(len(p.encode()) > patterns.MAX_COMPONENT for p in path.parts):
        raise ValueError("is too long for a path")
    return _allowed(text, _site(info))


def _check_length(text: str) -> None:
    """Before anything looks at each character of what may be millions."""
    if len(text) > patterns.MAX_PATH:
        raise ValueError("is too long for a path")


def _output(text: str, info: ValidationInfo) -> str:
    _check_length(text)
    patterns.validate(text)
    return text if text == NULL_DEVICE else _allowed(text, _site(info))


def _allowed(text: str, site: Site) -> str:
    """Lexically below an allowed folder; that no symbolic link leads out of it is the worker's to see."""
    path = PurePosixPath(os.path.normpath(text))
    if path.is_absolute() and not any(path.is_relative_to(root) for root in site.roots):
        roots = ", ".join(map(str, site.roots))
        raise ValueError(f"should lie under an allowed folder ({roots}); ALLOWED_ROOTS adds to them")
    return text


# Values beside null, "", [], {}, false and 0 that ask for no more than a job gets anyway.
_ALSO_NOTHING: Final[Mapping[str, tuple[object, ...]]] = {
    "nodes": (1, "1", "1-1"),
    "minimum_nodes": (1,),
    "maximum_nodes": (1,),
    "qos": ("normal",),
    "open_mode": ("truncate",),
    "standard_input": (NULL_DEVICE,),
    "begin_time": ("now",),
    "mail_type": ("NONE", ["NONE"]),
    "kill_on_node_fail": (True,),
}
# Here nought is a wish of its own: priority 0 holds a job, and nodes 0 cannot be.
_NOUGHT_ASKS: Final = frozenset({"priority", "nodes"})


def _nothing(field: str) -> list[object]:
    """Values of a field of Slurm's that ask for nothing."""
    nought = () if field in _NOUGHT_ASKS else (0,)
    return [None, False, "", [], {}, *nought, *_ALSO_NOTHING.get(field, ())]


def _unbuilt(value: object, info: ValidationInfo) -> None:
    asked = 0 if type(value) is float and value == 0 else value
    if not any(type(asked) is type(nothing) and asked == nothing for nothing in _nothing(info.field_name or "")):
        raise ValueError("not supported yet")


def _shown(**schema: Any) -> Any:
    """What the API's document says beside what pydantic knows."""
    return Field(json_schema_extra=schema)


Label = Annotated[
    str, Field(min_length=1, max_length=255), _shown(pattern=NO_CONTROLS), AfterValidator(_without_controls)
]
Count = Annotated[int, Field(ge=1, le=MAX_CPUS)]
Script = Annotated[str, _shown(pattern=SCRIPT, maxLength=MAX_SCRIPT), AfterValidator(_script)]
Folder = Annotated[str, _shown(minLength=1, maxLength=patterns.MAX_PATH, pattern=NO_CONTROLS), AfterValidator(_folder)]
Output = Annotated[str, _shown(minLength=1, maxLength=patterns.MAX_PATH, pattern=NO_CONTROLS), AfterValidator(_output)]
Comment = Annotated[str, Field(max_length=MAX_COMMENT), _shown(pattern=NO_CONTROLS_BUT_LINES), AfterValidator(_comment)]
VariableName = Annotated[str, _shown(pattern=VARIABLE), AfterValidator(_variable_name)]
VariableValue = Annotated[str, _shown(pattern=NO_NUL), AfterValidator(_variable_value)]
Entry = Annotated[str, _shown(pattern=ENTRY), AfterValidator(_entry)]
Environment = Annotated[
    Annotated[dict[VariableName, VariableValue], Tag("map"), _shown(maxProperties=MAX_VARIABLES)]
    | Annotated[list[Entry], Tag("list"), _shown(maxItems=MAX_VARIABLES)],
    Discriminator(
        _kind_of_environment,
        custom_error_type="environment",
        custom_error_message="Input should be an object of texts, or a list of NAME=VALUE",
    ),
    BeforeValidator(_nothing_is_empty),
    AfterValidator(_environment),
]
Memory = Annotated[int | None, PlainValidator(_memory), WithJsonSchema(_SIZES)]
TimeLimit = Annotated[int | None, PlainValidator(_time_limit), WithJsonSchema(_LIMITS)]
_UNBUILT: Final = PlainValidator(_unbuilt)
Unbuilt = Annotated[None, _UNBUILT]


def _complete(schema: dict[str, Any]) -> None:
    """What pydantic does not see: which names a variable may have, null for none, and values that ask for nothing."""
    fields, alike = schema["properties"], schema.setdefault("patternProperties", {})
    fields["environment"]["oneOf"][0]["additionalProperties"] = False
    fields["environment"]["oneOf"].append({"type": "null"})
    unbuilt = [name for name, field in JobRequest.model_fields.items() if _UNBUILT in field.metadata]
    plain = [name for name in unbuilt if _nothing(name) == _nothing("")]
    for name in unbuilt:
        del fields[name]
        names = "|".join(plain) if name in plain else name
        alike[f"^({names})$"] = {"enum": _nothing(name), "description": UNBUILT}


class JobRequest(BaseModel):
    """What a job is and needs."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_complete)

    account: Label = Field(description="Whom the job is for")
    name: Label = Field("job", description="What the job is called")
    partition: Label | None = Field(None, description="Where it runs; the first of the setting PARTITIONS by default")
    comment: Comment | None = Field(None, description="Kept and shown")
    script: Script | None = Field(None, description="The script, when it does not stand beside `job`")
    tasks: Count = Field(1, description="The job takes tasks × cpus_per_task CPUs of one node")
    cpus_per_task: Count = Field(1, description="CPUs of each task")
    tasks_per_node: Count = Field(1, description="Another name of `tasks`")
    ntasks_per_node: Count = Field(1, description="Another name of `tasks`")
    memory_per_node: Memory = Field(None, description="MiB, or text such as 4G; stored, not scheduled yet")
    time_limit: TimeLimit = Field(None, description="Minutes, or Slurm's text, such as 1-12:30:00; 0 is none")
    requeue: bool = Field(False, description="May be started again when its node is lost")
    environment: Environment = Field({}, description="Its variables: an object, or a list of NAME=VALUE")
    current_working_directory: Folder | None = Field(None, description="Below an allowed folder; its own by default")
    standard_output: Output | None = Field(
        None, description=f"A file; with the patterns of sbatch, such as %j; {patterns.DEFAULT} by default"
    )
    standard_error: Output | None = Field(None, description="Another file for stderr; the same one by default")

    qos: Unbuilt = None
    argv: Unbuilt = None
    standard_input: Unbuilt = None
    open_mode: Unbuilt = None
    nodes: Unbuilt = None
    minimum_nodes: Unbuilt = None
    maximum_nodes: Unbuilt = None
    memory_per_cpu: Unbuilt = None
    tres_per_job: Unbuilt = None
    tres_per_node: Unbuilt = None
    time_minimum: Unbuilt = None
    begin_time: Unbuilt = None
    deadline: Unbuilt = None
    dependency: Unbuilt = None
    array: Unbuilt = None
    hold: Unbuilt = None
    priority: Unbuilt = None
    nice: Unbuilt = None
    constraints: Unbuilt = None
    licenses: Unbuilt = None
    required_nodes: Unbuilt = None
    excluded_nodes: Unbuilt = None
    exclusive: Unbuilt = None
    kill_warning_signal: Unbuilt = None
    kill_warning_delay: Unbuilt = None
    mail_type: Unbuilt = None
    mail_user: Unbuilt = None
    kill_on_node_fail: Unbuilt = None
    wckey: Unbuilt = None


_WITH_SCRIPT: Final[dict[str, Any]] = {"required": ["script"], "properties": {"script": {"type": "string"}}}


class SubmitRequest(BaseModel):
    """A job and its script, which stands in one of two places."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"anyOf": [_WITH_SCRIPT, {"properties": {"job": _WITH_SCRIPT}}]},
    )

    job: JobRequest
    script: Script | None = Field(None, description="Begins with #! and its interpreter")


class NodeRequest(BaseModel):
    """What a node is to be: drained, in service again, or down."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "anyOf": [
                {"required": ["reason"], "properties": {"reason": {"type": "string"}}},
                {"properties": {"state": {"const": "RESUME"}}},
            ]
        },
    )

    state: Literal["DRAIN", "RESUME", "DOWN"] = Field(description="No new work; work again; end what runs there, too")
    reason: Label | None = Field(None, description="Required but for RESUME")


def node_request(document: object) -> NodeRequest:
    """What is asked for, or Problem 422 with all that is wrong with it."""
    fields = document if isinstance(document, dict) else {}
    check_count(fields, "")
    unsaid = fields.get("state") in ("DRAIN", "DOWN") and fields.get("reason") is None
    faults = [Fault("required: it is shown to whoever wonders about the node", "/reason")] if unsaid else []
    try:
        request = NodeRequest.model_validate(document)
    except ValidationError as error:
        raise unprocessable([*_faults(error), *faults]) from None
    if faults:
        raise unprocessable(faults)
    return request


def new_job(document: object, site: Site, key: str | None = None) -> NewJob:
    """The submission, or Problem 422 with all that is wrong with it (413: a script that is too large)."""
    job = _part(document, "job")
    _check_sizes(document, job)
    try:
        request = SubmitRequest.model_validate(document, context=site)
    except ValidationError as error:
        raise unprocessable([*_faults(error), *_faults_between(document, job)]) from None
    if faults := [*_faults_between(document, job), *_name_faults(request.job, site)]:
        raise unprocessable(faults)
    new = _new_job(request, site.default_partition)
    return new if key is None else replace(new, key=key, digest=digest(_new_job(request, "")))


def _new_job(request: SubmitRequest, default_partition: str) -> NewJob:
    job = request.job
    given = job.model_fields_set
    tasks = next((getattr(job, field) for field in TASK_FIELDS if field in given), 1)
    return NewJob(
        name=job.name,
        account=job.account,
        partition=job.partition or default_partition,
        tasks=tasks,
        cpus_per_task=job.cpus_per_task,
        memory_mib=job.memory_per_node,
        time_limit_seconds=job.time_limit,
        requeue=job.requeue,
        script=request.script or job.script or "",
        environment=_environment(job.environment),
        current_working_directory=job.current_working_directory,
        standard_output=job.standard_output or patterns.DEFAULT,
        standard_error=job.standard_error,
        comment=job.comment,
        cpus_per_task_given="cpus_per_task" in given,
        tasks_per_node_given=not given.isdisjoint(TASK_FIELDS[1:]),
    )


def _part(document: object, key: str) -> dict[str, object]:
    part = document.get(key) if isinstance(document, dict) else None
    return part if isinstance(part, dict) else {}


def _check_sizes(document: object, job: Mapping[str, object]) -> None:
    """What would cost much to look at, before anything looks at it."""
    whole = document if isinstance(document, dict) else {}
    for pointer, script in (("/script", whole.get("script")), ("/job/script", job.get("script"))):
        if isinstance(script, str) and len(script.encode(errors="surrogatepass")) > MAX_SCRIPT:
            fault = Fault("a script is at most 1 MiB of UTF-8", pointer)
            raise Problem(413, "the script is too large: at most 1 MiB of UTF-8", faults=[fault])
    for pointer, fields in (("", whole), ("/job", job)):
        check_count(fields, pointer)
    environment = job.get("environment")
    if isinstance(environment, dict | list) and len(environment) > MAX_VARIABLES:
        raise unprocessable([Fault(f"should hold at most {MAX_VARIABLES} variables", "/job/environment")])


def check_count(fields: Mapping[str, object], pointer: str) -> None:
    """Problem when an object has more fields than anything here."""
    if len(fields) > MAX_FIELDS:
        raise unprocessable([Fault(f"has {len(fields)} fields; there are not that many", pointer)])


def _faults_between(document: object, job: Mapping[str, object]) -> list[Fault]:
    """What is wrong between fields, each of which may be right: looked at whether or not others are wrong."""
    return [*_script_faults(document, job), *_task_faults(job)]


def _script_faults(document: object, job: Mapping[str, object]) -> list[Fault]:
    if not isinstance(document, dict):
        return []
    outer, inner = document.get("script"), job.get("script")
    if outer is None and inner is None:
        return [Fault("required", "/script")]
    if isinstance(outer, str) and isinstance(inner, str) and outer != inner:
        return [Fault("differs from /job/script; give it once", "/script")]
    return []


def _task_faults(job: Mapping[str, object]) -> list[Fault]:
    given = [(field, job[field]) for field in TASK_FIELDS if type(job.get(field)) is int]
    faults = [
        Fault(f"differs from {given[0][0]}: a job runs on one node, so they are one number", f"/job/{field}")
        for field, value in given[1:]
        if value != given[0][1]
    ]
    tasks, each = given[0][1] if given else 1, job.get("cpus_per_task", 1)
    if isinstance(tasks, int) and isinstance(each, int) and 0 < tasks <= MAX_CPUS and each <= MAX_CPUS < tasks * each:
        faults.append(Fault(f"tasks × cpus_per_task should be at most {MAX_CPUS}", "/job/cpus_per_task"))
    return faults


def _name_faults(job: JobRequest, site: Site) -> Iterable[Fault]:
    """Names of files that only become too long when the pattern is filled in."""
    for field in ("standard_output", "standard_error"):
        pattern: str | None = getattr(job, field)
        if pattern is None or "%" not in pattern:
            continue
        filled = patterns.expand(pattern, job_id=1, name=job.name, user=site.user, node="", restart_cnt=0)
        if any(len(part.encode()) > patterns.MAX_COMPONENT for part in filled.split("/")):
            longest = patterns.MAX_COMPONENT
            yield Fault(f"is longer than {longest} bytes when it is filled in", f"/job/{field}")


def _faults(error: ValidationError) -> list[Fault]:
    return [
        Fault(_detail(fault), pointer(fault["loc"])) for fault in error.errors(include_url=False, include_input=False)
    ]


def _detail(fault: Any) -> str:
    match fault["type"]:
        case "missing":
            return "required"
        case "extra_forbidden":
            return "unknown field"
        case "value_error":
            return str(fault["ctx"]["error"])
        case "model_type":
            return "Input should be an object"
        case "string_unicode":
            return "should be text: it holds half a surrogate pair"
    return str(fault["msg"])


def pointer(location: tuple[int | str, ...]) -> str:
    """The JSON pointer (RFC 6901) of pydantic's location, without its own marks of a map or a list."""
    words = [str(word) for word in location]
    if words[:2] == ["job", "environment"] and len(words) > 2:
        del words[2]
        if words[-1] == "[key]":
            del words[-1]
    return "".join(f"/{_escaped(word)}" for word in words)


def _escaped(word: str) -> str:
    text = word[:100].encode(errors="replace").decode()
    return text.replace("~", "~0").replace("/", "~1")
