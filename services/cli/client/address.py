"""Where the API is: what was said, the environment, a file of the user's own, this machine."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from core.errors import SettingsError
from services.cli.client.arguments import DEFAULT_URL, URL
from services.cli.client.terminal import shown

KEYS = ("url",)
LARGEST_FILE = 64 * 1024


def address_of(said: str | None) -> str:
    """The address; SettingsError, in one line, for what is none."""
    if said is not None:
        return _checked("--url", said)
    if found := os.environ.get(URL):
        return _checked(URL, found)
    file = _file()
    found = _read(file).get("url")
    return DEFAULT_URL if found is None else _checked(f"{file}: url", found)


def _file() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME", "")
    # Relative ones are to be ignored, says the specification.
    return (Path(folder) if os.path.isabs(folder) else Path("~/.config").expanduser()) / "rowlock"


def _read(file: Path) -> dict[str, str]:
    """Lines of ``key = value``; what begins with # is a comment."""
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST_FILE).decode()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise SettingsError(f"{file} is not UTF-8 text") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key not in KEYS or key in found:
            # Not what stands there: it may be a secret that lost its name.
            raise SettingsError(f"{file}, line {number}: should be `url = http://HOST:PORT`, once")
        found[key] = value
    return found


def _checked(where: str, url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    said = url.isprintable() and not any(c.isspace() for c in url) and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or not said:
        shows = "" if "@" in url else f"={shown(url)}"
        raise SettingsError(f"{where}{shows}: should be http://HOST:PORT, or https://")
    return url
