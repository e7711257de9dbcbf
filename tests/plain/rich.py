"""First on the path of the tests' roles: a plain installation has no rich, which structlog would import."""

raise ImportError("the tests' roles run as in a plain installation: rich is the developers' alone")
