"""The table of model types in docs/families.md."""

from __future__ import annotations

from typing import Any

from tables import rows

TITLES = ("type", "kind", "layers", "kinds", "experts", "GPTQ covers", "AWQ covers", "of linears", "verdict")


def families(found: dict[str, Any]) -> str:
    """Returns how many types are ok, those that are, and the reason of each that is not."""
    every = found["families"]
    told = []
    for kind in ("causal", "image-text"):
        of = [row for row in every if row["kind"] == kind]
        told.append(f"{sum(row['verdict'] == 'ok' for row in of)} of {len(of)} {kind} types")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    good = [row for row in every if row["verdict"] == "ok"]
    bad = [row for row in every if row["verdict"] != "ok"]
    lines = [
        [
            f"`{row['family']}`",
            row["kind"],
            str(row["layers"]),
            str(row["kinds"]),
            str(row["experts"] or ""),
            *(f"{row['methods'][name]['coverage']:.0%}" for name in ("gptq", "awq")),
            f"{row['promised']:.0%}",
            "ok",
        ]
        for row in good
    ]
    reasons = [[f"`{row['family']}`", row["kind"], _plain(row["verdict"])] for row in bad]
    return (
        f"{' and '.join(told)} of {versions} are ok. Coverage is the share of all weights of these small models, in "
        "which embeddings are large.\n\n"
        f"{rows(TITLES, lines)}\n\nThose that are not, and why:\n\n{rows(('type', 'kind', 'reason'), reasons)}"
    )


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())[:160]
