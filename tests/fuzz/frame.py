"""What every fuzz test is made with: how many inputs are tried, within which bounds, and what counts as a crash.

In the test suite each test tries the few inputs it names, always the same ones. `make fuzz` (or FUZZ_EXAMPLES=20000)
tries many, new ones every time, and prints how many there were and what broke; hypothesis keeps what broke in
.hypothesis and tries it first next time. An input that broke something once stays in its test as an `@example`.
"""

import os
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from lighten.errors import LightenError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Inputs per test in a long run; 0 in the test suite."""
SECONDS = 10
"""An input may take so long."""
ROOM = 1 << 30
"""Bytes of address space that an input may take beyond what the process has."""
LONGEST = 2000
"""Characters of a message that is still one message."""

running = ""
"""The name of the test that runs."""
tried: Counter[str] = Counter()
"""Inputs by the name of the test."""
crashes: dict[str, set[str]] = {}
"""Distinct errors that are no message, by the name of the test."""


def fuzz(examples: int) -> settings:
    """Returns the settings of a fuzz test: so many inputs in the test suite, many more in a long run."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=list(Phase) if EXAMPLES else [Phase.explicit, Phase.generate, Phase.shrink],
        print_blob=True,
    )


def answers(read: Callable[..., Any], *given: Any) -> Any:
    """Calls a reader with a file that may be anything; returns what it made of it, or the message it refused it with.

    Raises:
        AssertionError: the message is none: it is empty, endless, or shows a traceback.
        Exception: whatever else the reader raised: a crash. So are too much memory and too much time.
    """
    tried[running] += 1
    try:
        with _bounded():
            return read(*given)
    except LightenError as error:
        assert 0 < len(text := str(error)) <= LONGEST, f"a message of {len(text)} characters"
        assert "Traceback" not in text, text
        return error
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        crashes.setdefault(running, set()).add(
            f"{type(error).__name__} in {last.filename}:{last.lineno}: {error}"[:300]
        )
        raise


@contextmanager
def _bounded() -> Iterator[None]:
    """Ends what takes too long, and lets allocations fail that would take too much."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes longer than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as status:
        held = int(status.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
