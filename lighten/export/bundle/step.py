"""Writing a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lighten.errors import Failure, RequestError

if TYPE_CHECKING:
    pass


@contextmanager
def _late() -> Iterator[None]:
    """Makes a refusal that could not be known before a failure: of this variant, and of no other."""
    try:
        yield
    except RequestError as error:
        raise Failure(str(error)) from error
