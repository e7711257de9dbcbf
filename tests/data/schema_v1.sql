-- Rowlock's whole schema: what an empty database gets. Existing databases follow through core/db/migrations/.
--
-- Lock order, kept by every transaction (core/db keeps it, this is the one place where it is written):
--   idempotency_keys by account and key  ->  jobs by job_id  ->  pending  ->  allocations  ->  node_leases  ->  nodes;
--   of the last two at most one row.
-- The allocator alone takes several nodes, by name; jobs before them without waiting (SKIP LOCKED), and after them
-- only rows that go with its jobs. Who turns a node over takes more jobs, and what goes with them, once it holds it:
-- without waiting as well. So whoever holds a node waits for nothing but later nodes: no cycle can form.
-- Whoever writes to outputs holds nothing else, and takes its rows by job_id.

CREATE TABLE rowlock_schema (
    application text NOT NULL DEFAULT 'rowlock' CHECK (application = 'rowlock'),
    version     integer NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (version)
);

-- Domains for what holds of a value alone: PostgreSQL parses all CHECKs of a table for each statement that writes to it,
-- and a domain's once. (They were a fifth of what a change of state costs.)
CREATE DOMAIN count_from_0 AS integer CHECK (VALUE >= 0);
CREATE DOMAIN count_from_1 AS integer CHECK (VALUE > 0);
CREATE DOMAIN size_from_1 AS bigint CHECK (VALUE > 0);
CREATE DOMAIN exit_code AS integer CHECK (VALUE BETWEEN 0 AND 255);
CREATE DOMAIN job_state AS text CHECK (VALUE IN ('PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETED', 'FAILED',
    'CANCELLED', 'TIMEOUT', 'OUT_OF_MEMORY', 'NODE_FAIL', 'DEADLINE', 'PREEMPTED'));
CREATE DOMAIN admin_state AS text CHECK (VALUE IN ('RESUME', 'DRAIN', 'DOWN'));

CREATE TABLE nodes (
    name              text PRIMARY KEY,
    partitions        text[] NOT NULL CHECK (cardinality(partitions) > 0),
    declared_cpus     count_from_1 NOT NULL,
    -- What may be allocated: declared_cpus, or what is still allocated on a node that came back smaller.
    cpus              count_from_1 NOT NULL,
    alloc_cpus        integer NOT NULL DEFAULT 0,
    memory_mib        bigint NOT NULL CHECK (memory_mib >= 0),
    work_base_dir     text NOT NULL,
    job_user          text NOT NULL,
    admin_state       admin_state NOT NULL DEFAULT 'RESUME',
    admin_reason      text,
    admin_by          text,
    admin_time        timestamptz,
    registered_time   timestamptz NOT NULL DEFAULT now(),
    -- Over-allocation is impossible even when the code is wrong.
    CONSTRAINT capacity CHECK (0 <= alloc_cpus AND alloc_cpus <= cpus),
    CONSTRAINT shrinking CHECK (cpus = greatest(declared_cpus, alloc_cpus))
) WITH (fillfactor = 50);

-- A table of its own: a heartbeat neither waits for the allocator nor rewrites a node.
CREATE TABLE node_leases (
    node              text PRIMARY KEY REFERENCES nodes ON DELETE CASCADE,
    incarnation       bigint NOT NULL,
    spool_id          text NOT NULL,
    -- The first incarnation of this spool in a row: of what an earlier one started this spool knows nothing.
    spool_since       bigint NOT NULL,
    hostname          text NOT NULL,
    heartbeat_time    timestamptz NOT NULL,
    lease_until       timestamptz NOT NULL,
    draining          boolean NOT NULL DEFAULT false,
    address           text NOT NULL,
    secret            text NOT NULL,
    version           text NOT NULL,
    cpu_load          real,
    stale_writes_refused bigint NOT NULL DEFAULT 0,  -- to this incarnation
    -- What its worker grants: seconds between SIGTERM and SIGKILL, and of silence before it ends what may be requeued.
    grace_seconds     double precision NOT NULL,
    requeue_after_seconds double precision NOT NULL
) WITH (fillfactor = 50);

-- What is hot of a job. No index on a column that a change of state touches, partial ones included:
-- every such index makes each change of state a non-HOT update.
CREATE TABLE jobs (
    job_id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    state                 job_state NOT NULL DEFAULT 'PENDING',
    state_reason          text NOT NULL DEFAULT 'None',
    state_description     text,
    attempt               count_from_0 NOT NULL DEFAULT 0,
    restart_cnt           count_from_0 NOT NULL DEFAULT 0,
    name                  text NOT NULL,
    account               text NOT NULL,
    partition             text NOT NULL,
    tasks                 count_from_1 NOT NULL,
    cpus_per_task         count_from_1 NOT NULL,
    cpus                  count_from_1 NOT NULL,
    memory_mib            size_from_1,
    time_limit_seconds    size_from_1,
    requeue               boolean NOT NULL,
    node                  text,
    incarnation           bigint,        -- of the worker that started the current attempt
    submit_time           timestamptz NOT NULL DEFAULT now(),
    allocate_time         timestamptz,
    start_time            timestamptz,
    end_time              timestamptz,
    cancel_requested_time timestamptz,
    exit_code             exit_code,
    signal                text,
    -- The final states are all the others.
    CONSTRAINT ended CHECK ((end_time IS NULL) = (state = 'PENDING' OR state = 'CONFIGURING' OR state = 'RUNNING')),
    CONSTRAINT placed CHECK ((state <> 'CONFIGURING' AND state <> 'RUNNING') OR (node IS NOT NULL AND attempt > 0)),
    CONSTRAINT waiting CHECK (state <> 'PENDING' OR (node IS NULL AND start_time IS NULL)),
    CONSTRAINT started CHECK (start_time IS NOT NULL
                              OR (state <> 'RUNNING' AND state <> 'COMPLETED' AND state <> 'TIMEOUT')),
    CONSTRAINT one_exit CHECK (exit_code IS NULL OR signal IS NULL),
    CONSTRAINT exit_after_end CHECK (end_time IS NOT NULL OR (exit_code IS NULL AND signal IS NULL)),
    CONSTRAINT completed CHECK (state <> 'COMPLETED' OR exit_code = 0)
) WITH (fillfactor = 70);

CREATE INDEX jobs_by_account ON jobs (account, job_id);
CREATE INDEX jobs_by_name ON jobs (name, job_id);

-- What never changes of a job, and is large: insert-only, so that a change of state never rewrites a script.
CREATE TABLE job_specs (
    job_id                    bigint PRIMARY KEY,
    script                    text NOT NULL,
    environment               text NOT NULL,   -- a JSON object of text; read only as a whole
    current_working_directory text,            -- NULL: the job's own directory
    standard_output           text NOT NULL,
    standard_error            text,            -- NULL: joins standard output
    comment                   text,
    cpus_per_task_given       boolean NOT NULL,
    tasks_per_node_given      boolean NOT NULL,
    submission                bigint NOT NULL   -- a random number of its statement, and its place in it: to be found by
);

-- What clients call their submissions, so that one sent twice is one job; kept as long as the job.
CREATE TABLE idempotency_keys (
    account text NOT NULL,
    key     text NOT NULL,
    job_id  bigint NOT NULL,
    digest  bytea NOT NULL,   -- of the job as it was asked for
    PRIMARY KEY (account, key)
);

-- What waits, in its own narrow table: a pass walks the shapes that fit, in the order of submission.
CREATE TABLE pending (
    partition text NOT NULL,
    cpus      integer NOT NULL,
    job_id    bigint NOT NULL,
    PRIMARY KEY (partition, cpus, job_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE UNIQUE INDEX pending_by_job ON pending (job_id);

-- The ledger: who holds how many CPUs of which node. Written by place, release and turn_over alone.
CREATE TABLE allocations (
    job_id  bigint PRIMARY KEY,
    node    text NOT NULL REFERENCES nodes,
    attempt integer NOT NULL,
    cpus    count_from_1 NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX allocations_by_node ON allocations (node);

-- Where the output of a restart begins in its files: stored before its script starts. What ran first has no row.
CREATE TABLE outputs (
    job_id       bigint NOT NULL,
    attempt      integer NOT NULL,
    restart_cnt  count_from_1 NOT NULL,   -- of this attempt: the names of its files may hold it
    stdout_begin bigint,                  -- NULL: there was no such file yet
    stderr_begin bigint,
    PRIMARY KEY (job_id, attempt)
);

-- Every committed transition. A sequence is not the order of commits: readers go by (xact, seq) and stop
-- below pg_snapshot_xmin(pg_current_snapshot()).
CREATE TABLE job_events (
    xact       xid8 NOT NULL DEFAULT pg_current_xact_id(),
    seq        bigint GENERATED ALWAYS AS IDENTITY,
    job_id     bigint NOT NULL,
    attempt    integer NOT NULL,
    from_state text,
    to_state   text NOT NULL,
    reason     text NOT NULL,
    node       text,
    time       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (xact, seq)
);
CREATE INDEX job_events_by_job ON job_events (job_id, xact, seq);
-- What is over, by how it ended: lists ask here, as jobs has no index on its state. A job ends once.
CREATE INDEX job_events_by_end ON job_events (to_state, job_id)
WHERE to_state <> ALL ('{PENDING,CONFIGURING,RUNNING}');

INSERT INTO rowlock_schema (version) VALUES (1);
