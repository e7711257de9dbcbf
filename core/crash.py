"""Named points, between every two effects of the roles, at which a test ends the process as `kill -9` does.

No signal from outside finds the instant between two system calls. ROWLOCK_CRASH=NAME, or NAME:NTH, is read at the
start; unset, as always but in tests, a point is a call that returns at once.
"""

import itertools
import os
import signal
from typing import Final

_NAME, _, _NTH = os.environ.get("ROWLOCK_CRASH", "").partition(":")
_LAST: Final = int(_NTH or 1)
_passings = itertools.count(1)


def here(name: str) -> None:
    """Die, when this is the NTH passing of the point that is named."""
    if name == _NAME and next(_passings) == _LAST:
        os.kill(os.getpid(), signal.SIGKILL)
