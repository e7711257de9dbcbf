"""Where a client on this machine finds a server that listens here."""

_UNSPECIFIED = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (to be reached, not to be bound)


def http_address(host: str, port: int) -> str:
    """The URL, without a path, of what listens on `host`; one that listens everywhere is asked on the loopback."""
    reachable = _UNSPECIFIED.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
