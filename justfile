# Rowlock: `just` alone lists what there is. Works as `uv run just …` and, where uv is there, as plain `just …`.

set dotenv-load

# `uv run` has put the environment in front already; otherwise uv is asked for it, whatever way it is installed.
uv := env("UV", `command -v uv || echo "python3 -m uv"`)
run := if path_exists(env("VIRTUAL_ENV", "/nonexistent") / "bin/rowlock") == "true" { "" } else { uv + " run" }

# Whatever the environment says: else each of the many processes of the tests compiles what it imports anew.
kept := "PYTHONDONTWRITEBYTECODE="

data := ".rowlock"
# Written by `rowlock infra` and `rowlock up`: the addresses of their servers, for as long as they run.
servers := data / "servers.properties"
# They go into the environment, not into --config: a settings file of one's own still counts.
addressed := "set -a; [ ! -f " + servers + " ] || . ./" + servers + "; set +a;"
docker := "docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1"

_list:
    @just --justfile '{{justfile()}}' --list --unsorted

# Watch one job go its way on real servers; nothing is left behind
demo:
    {{run}} rowlock demo

# Run everything on this machine until Ctrl-C; takes the options of `rowlock up`
[positional-arguments]
up *options:
    {{run}} rowlock up "$@"

# Start PostgreSQL and Redis, in containers where there is Docker, else embedded; until Ctrl-C
dev-infra:
    if {{docker}}; then exec docker compose up postgres redis; else exec {{run}} rowlock infra; fi

# Run the scheduler against the servers of `dev-infra`
dev-scheduler:
    @{{addressed}} exec {{run}} rowlock scheduler

# Run the worker against the servers of `dev-infra`
dev-worker:
    @{{addressed}} exec {{run}} rowlock worker

# Run the API against the servers of `dev-infra`
dev-api:
    @{{addressed}} exec {{run}} rowlock api

# Check, then run the tests on every CPU; takes the arguments of pytest
[positional-arguments]
test *arguments: check
    {{kept}} {{run}} pytest --numprocesses=auto --dist=worksteal "$@"

# Faults at random for some minutes under load, then a table: `just chaos --minutes 20 --seed 7`
[positional-arguments]
chaos *arguments:
    {{run}} python -m tests.faults.chaos "$@"

# Lint, format, types, and the direction of imports; changes nothing
check:
    {{run}} ruff check
    {{run}} ruff format --check
    {{run}} mypy
    {{run}} lint-imports

# Format the code, and mend what can be mended
fmt:
    {{run}} ruff check --fix
    {{run}} ruff format

# Measure latency and throughput on this machine; takes the options of `python -m bench`
[positional-arguments]
bench *options:
    {{run}} python -m bench "$@"

# Measure Rowlock beside its peers, as far as they are installed: `just bench-peers install` gets what PyPI has of them
[positional-arguments]
bench-peers *options:
    {{run}} python -m bench.peers "$@"

# Measure at scale, which takes long; only some of it: `just bench-scale backlog history width watchers`
bench-scale *workloads:
    for workload in {{ if workloads == "" { "backlog history width watchers" } else { workloads } }}; do \
        {{run}} python -m bench.$workload || exit; done

# Look for broken invariants in the live database; fails when there are any
[positional-arguments]
audit *options:
    @{{addressed}} exec {{run}} rowlock audit "$@"

# Tell what this node and its servers are fit for; fails when something is at fault
[positional-arguments]
doctor *options:
    @{{addressed}} exec {{run}} rowlock doctor "$@"

# Remove the data of `up` and `dev-infra`: the database, the jobs, their outputs
[confirm("Remove .rowlock with its database, its jobs and their outputs? [y/N]")]
reset:
    #!/bin/sh
    [ -e '{{data}}' ] || { echo "there is no {{data}}"; exit 0; }
    touch '{{data}}/lock'
    flock --nonblock '{{data}}/lock' rm -rf '{{data}}' || { echo "{{data}} is in use: stop what runs there first" >&2; exit 1; }

# Follow a role's log: api, scheduler or worker
logs role:
    tail -n 50 -F "${LOG_DIR:-logs}/{{role}}.log"

# Run N workers, each a node of its own: containers where compose runs, else local ones until Ctrl-C
scale n:
    #!/usr/bin/env bash
    set -euo pipefail
    [[ '{{n}}' =~ ^[1-9][0-9]*$ ]] || { echo "scale N: N should be a number from 1 on, not {{n}}" >&2; exit 2; }
    if [ ! -f '{{servers}}' ] && {{docker}}; then
        exec docker compose up --detach --no-recreate --scale worker={{n}} worker
    fi
    {{addressed}}
    stop() {
        trap '' INT TERM
        kill -TERM "${workers[@]}" 2>/dev/null || true
        wait
    }
    workers=()
    trap stop EXIT
    trap 'exit 0' INT TERM
    for number in $(seq -f %02g {{n}}); do
        NODE_NAME=node-$number DATA_DIR={{data}}/nodes/node-$number LOG_DIR=${LOG_DIR:-logs}/node-$number \
            {{run}} rowlock worker &
        workers+=($!)
    done
    wait

# Renew the exact versions in pyproject.toml: all packages, for every platform and Python
pins:
    UV='{{uv}}' {{run}} python config/pins.py
