"""The ``rowlock`` command: only migrate, audit and health use PostgreSQL directly."""
