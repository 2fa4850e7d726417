"""Asks every loader to open an artifact, as a measurement."""

from __future__ import annotations

import time

from lighten.errors import Failure, RequestError
from lighten.evaluate.loaders.settings import Loaders
from lighten.evaluate.loaders.survey import survey
from lighten.evaluate.request import Request
from lighten.process.isolate import Outcome
from lighten.step import Report


def measure(request: Request[Loaders], report: Report) -> Outcome:
    """Returns the answers of all loaders, and the largest peak memory of their processes.

    Raises:
        Failure: there is nothing that any loader would open.
    """
    begin = time.monotonic()
    try:
        found = survey(
            request.file,
            vocab=request.vocab,
            device=request.device,
            trust_remote_code=request.trust_remote_code,
            report=report,
        )
    except RequestError as error:  # what no loader reads is a row that says so, and no end of the run
        raise Failure(str(error)) from error
    return Outcome({"loads": found.loads}, time.monotonic() - begin, found.peak_rss_bytes)
