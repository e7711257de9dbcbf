"""JSON as RFC 8259 has it, and nothing that Python's reader lets through beside it."""

import json
from typing import Any

from services.api.problems import Problem

# Longer ones are outside of every limit, and reading their digits costs quadratic time.
MAX_DIGITS = 40
MAX_DEPTH = 1000
_TOO_MANY_DIGITS: int = 10**MAX_DIGITS


def parse(body: bytes) -> object:
    """The document, or Problem 400: no JSON, not UTF-8, duplicate keys, NaN, nested too deeply."""
    try:
        text = body.decode("utf-8")
        document: object = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise Problem(400, f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Problem(400, f"the body is no JSON: {error}") from None
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None
    # Python 3.14 reads as deeply as its stack goes. Few bodies have so many brackets that they need be looked at.
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(document, MAX_DEPTH):
        raise Problem(400, "the body is nested too deeply")
    return document


def _is_deeper(document: object, limit: int) -> bool:
    """Whether more than `limit` containers lie within each other; level by level, without recursion."""
    level = [document]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Problem(400, f"the key {json.dumps(twice[:100])} stands twice in one object")
    return found


def _constant(word: str) -> float:
    raise Problem(400, f"the body is no JSON: {word} is no number there")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        return _TOO_MANY_DIGITS if digits[0] != "-" else -_TOO_MANY_DIGITS
    return int(digits)
