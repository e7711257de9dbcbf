"""Jobs over HTTP: submit, read, list."""

import asyncio
import re

import structlog
from aiohttp import web

from core.db import jobs
from core.documents import SubmittedDocument
from core.records import Job
from services.api import guard, idempotency, listing, lists, models, rendering, state, strict_json
from services.api.problems import Problem

_log = structlog.get_logger()  # once: to make one costs as much as to write a line
_JOB_ID = re.compile(r"[1-9][0-9]{0,18}", re.ASCII)


def job_id_of(request: web.Request) -> int:
    """The job that the path names; 404 for what can be none."""
    text = request.match_info["job_id"]
    if not _JOB_ID.fullmatch(text) or int(text) >= 2**63:
        raise Problem(404, "there is no such job")
    return int(text)


def found(job: Job | None, job_id: int) -> Job:
    """The job, or 404."""
    if job is None:
        raise Problem(404, f"there is no job {job_id}")
    return job


async def post_jobs(request: web.Request) -> web.Response:
    """``POST /jobs``: 201 with what is stored, after the commit; 200 with what has the key already."""
    guard.check_json(request)
    key = idempotency.key_of(request)
    if (request.content_length or 0) > guard.MAX_BODY:
        return await _post_large(request, key)
    document = strict_json.parse(await guard.body_of(request))
    return await (_post_list if lists.is_list(document) else _post_one)(state.of(request), document, key)


async def _post_large(request: web.Request, key: str | None) -> web.Response:
    """A list that is larger than a job may be."""
    api = state.of(request)
    async with lists.turn(api.large, "other large lists of jobs"):
        document = await asyncio.to_thread(strict_json.parse, await guard.body_of(request, guard.MAX_LIST_BODY))
        if not lists.is_list(document):
            raise Problem(413, guard.TOO_LARGE)
        return await _post_list(api, document, key)


async def _post_list(api: state.State, document: object, key: str | None) -> web.Response:
    accepted = await api.submitter.submit_all(await lists.new_jobs(document, api.site, key))
    ids = accepted.job_ids
    event = "submission_repeated" if accepted.replayed else "jobs_submitted"
    _log.info(event, jobs=len(ids), first=ids[0], last=ids[-1])
    headers = {idempotency.REPLAY: "true"} if accepted.replayed else {}
    stored: SubmittedDocument = {"jobs": [{"job_id": job_id} for job_id in ids]}
    return rendering.answer(stored, 200 if accepted.replayed else 201, headers)


async def _post_one(api: state.State, document: object, key: str | None) -> web.Response:
    accepted = await api.submitter.submit(models.new_job(document, api.site, key))
    job = accepted.job
    event = "submission_repeated" if accepted.replayed else "job_submitted"
    _log.info(event, job_id=job.job_id, account=job.account, cpus=job.cpus)
    headers = {"Location": f"/api/v1/jobs/{job.job_id}"}
    if accepted.replayed:
        headers[idempotency.REPLAY] = "true"
    return rendering.answer(rendering.job_document(job), 200 if accepted.replayed else 201, headers)


async def get_job(request: web.Request) -> web.Response:
    """``GET /jobs/{job_id}``: at once, or with ``wait`` once the job is in a state, or the time is over."""
    api, job_id = state.of(request), job_id_of(request)
    patience = listing.read_patience(request.query)
    if patience.seconds:
        job = await api.watch.job(job_id, patience.until, patience.seconds, lambda: guard.is_there(request))
    else:
        async with api.database.connection() as connection:
            job = await jobs.get(connection, job_id)
    return rendering.answer(rendering.part(rendering.job_document(found(job, job_id)), patience.fields))


async def get_script(request: web.Request) -> web.Response:
    """``GET /jobs/{job_id}/script``: as submitted."""
    api, job_id = state.of(request), job_id_of(request)
    async with api.database.connection() as connection:
        text = await jobs.script(connection, job_id)
    if text is None:
        raise Problem(404, f"there is no job {job_id}")
    return web.Response(body=text.encode(), content_type="text/plain", charset="utf-8")


async def list_jobs(request: web.Request) -> web.Response:
    """``GET /jobs``: a page, in the order of submission or against it."""
    api, asked = state.of(request), listing.read(request.query)
    async with api.database.connection() as connection:
        page = await jobs.page(
            connection,
            asked.wanted,
            newest_first=asked.newest_first,
            after=asked.after,
            limit=asked.limit + 1,  # one more, to know whether there is another page
        )
    shown = page[: asked.limit]
    document = {
        "jobs": [rendering.part(rendering.job_document(job), asked.fields) for job in shown],
        "next_cursor": asked.cursor_behind(shown[-1]) if len(page) > asked.limit else None,
    }
    return rendering.answer(document)
