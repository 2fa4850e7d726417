"""Measures the gain by a draft model."""

from __future__ import annotations

from lighten.errors import Failure
from lighten.evaluate.request import Request
from lighten.evaluate.request_model import facts, for_speed
from lighten.evaluate.speculative import drafting
from lighten.evaluate.speculative.settings import Speculative
from lighten.evaluate.stored_result import SpeculativeResult
from lighten.model import vocabulary
from lighten.model.template import renderer
from lighten.step import Report


def measure(request: Request[Speculative], report: Report) -> SpeculativeResult:
    """Returns acceptance, and speeds with and without the draft.

    Raises:
        Failure: the two have different vocabularies.
    """
    settings, model, draft = request.settings, request.file, request.draft
    assert draft
    if other := vocabulary.differing(model, draft):
        raise Failure(f"target and draft have different vocabularies ({other}): take a draft with the same tokenizer")
    target, helper = (for_speed(request, path, dtype=settings.dtype) for path in (model, draft))
    return drafting.measure(target, helper, settings, report, renderer(model)).having(**facts(target))
