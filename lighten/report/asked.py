"""The recipe in a results.json. The text came with the results, so it is read with care and never trusted."""

from __future__ import annotations

from typing import Any

from lighten.data.reading import parse_yaml
from lighten.results.results import Results


def asked(results: Results) -> dict[str, Any]:
    """Returns the recipe in the results, unchecked; empty if there is none.

    Raises:
        RequestError: what stands there is no YAML.
    """
    value = parse_yaml(results.recipe_yaml, f"the recipe in the results of {results.title}")
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else {}
