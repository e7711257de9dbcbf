"""``rowlock migrate``: what the first role to come does, by hand and with an account that may create."""

from core.db import schema
from core.settings import Settings
from services.cli.database import connected


async def migrate(settings: Settings) -> int:
    """Apply what is missing; a newer or foreign schema raises SchemaMismatch."""
    async with connected(settings, "migrate") as connection:
        applied = await schema.migrate(connection)
    if applied:
        print(f"applied: schema {', '.join(map(str, applied))}")
    else:
        print(f"nothing to do: the database holds schema {schema.VERSION}")
    return 0
