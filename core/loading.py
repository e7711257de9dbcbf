"""Loading a role's modules without the garbage collector.

Hundreds of modules are made and nothing of them is garbage, but it would look through them again and again: a seventh
of the CPU that a role's start takes.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """A block of imports."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
