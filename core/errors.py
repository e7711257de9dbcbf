"""Every error that Rowlock raises on purpose.

::

    RowlockError
    ├── SettingsError       a setting is wrong: one line, exit 2
    ├── SchemaMismatch      the database holds a newer or foreign schema
    ├── NodeNameTaken       another worker is this node's
    ├── Unavailable         PostgreSQL or Redis cannot be reached now; try again
    └── UnsafeServer        PostgreSQL may lose what it has committed, or can commit nothing
"""


class RowlockError(Exception):
    """The root: its text is one line that a person can act on. `exit_code` is that of a process it ends."""

    exit_code = 1


class SettingsError(RowlockError):
    """A setting is wrong."""

    exit_code = 2


class SchemaMismatch(RowlockError):
    """The database holds a newer or foreign schema."""


class NodeNameTaken(RowlockError):
    """Another worker is this node's: starting this one again would be a quarrel."""

    exit_code = 3


class Unavailable(RowlockError):
    """A server cannot be reached now."""


class UnsafeServer(RowlockError):
    """PostgreSQL may lose what it has committed, or can commit nothing."""
