"""Writes the README's table and picture from a results.json of the quickstart.

lighten run quickstart && python benchmarks/readme.py artifacts/quickstart/latest
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from lighten.report.markdown import markdown_table
from lighten.report.table import table
from lighten.results.file import load, save
from lighten.results.results import Results

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "quickstart.json"
PICTURE = ROOT / "docs" / "quickstart.png"
BEGIN = "<!-- quickstart: written by benchmarks/readme.py from benchmarks/results/quickstart.json -->"
END = "<!-- end of quickstart -->"


def section(results: Results) -> str:
    """Returns the Markdown between the marks."""
    machine = results.machine
    made = f"`lighten run quickstart` on {machine['cores']} cores ({machine['cpu']}), {results.created[:10]}."
    picture = "![Perplexity against size of the five variants](docs/quickstart.png)"
    return f"{BEGIN}\n{markdown_table(table(results))}\n\n{made}\n\n{picture}\n{END}"


def main() -> None:
    if len(sys.argv) > 1:
        version = Path(sys.argv[1])
        save(load(version), KEPT)
        shutil.copyfile(next((version / "plots").glob("*size*.png")), PICTURE)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    readme.write_text(pattern.sub(lambda _: section(load(KEPT)), text), encoding="utf-8")


if __name__ == "__main__":
    main()
