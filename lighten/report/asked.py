"""What results say was asked for: a text that came with them, so it is read with care and trusted with nothing."""

from __future__ import annotations

from typing import Any

from lighten.data.reading import parse_yaml
from lighten.results.results import Results


def asked(results: Results) -> dict[str, Any]:
    """Returns the recipe that stands in results, unchecked; empty if there is none.

    Raises:
        RequestError: what stands there is no YAML.
    """
    value = parse_yaml(results.recipe_yaml, f"the recipe in the results of {results.title}")
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else {}
