"""The ``rowlock`` command: only migrate, audit, doctor and health use PostgreSQL directly."""
