"""Time from a fresh clone to the report: `make demo` in an empty environment with an empty pip cache.

    python benchmarks/from_nothing.py [--only still|busy] [--source .]

Once on a machine that is still, and once beside one busy core. Installation (`make .venv/.demo`) and the run (`make
demo`) are timed apart. Packages come from the network, or from whatever index pip is set up with; its speed counts.
Writes benchmarks/results/from_nothing.json; what is not measured anew stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timed import timed

from lighten.evaluate import machine
from lighten.store.store import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "from_nothing.json"
KEPT = ("PATH", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "PIP_CONFIG_FILE", "SSL_CERT_FILE", "https_proxy")
"""Variables of the environment that pip may need to find packages; no other is handed on."""
BUSY = "while True: pass"


def measure(source: Path, busy: bool) -> dict[str, Any]:
    """Clones, installs and runs; returns seconds, peak memory, and what the report says of each variant."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as beside:
        clone = Path(scratch, "lighten")
        subprocess.run(["git", "clone", "-q", source, clone], check=True)
        home = Path(scratch, "home")
        home.mkdir()
        env = {"HOME": str(home), **{name: os.environ[name] for name in KEPT if name in os.environ}}
        command = ["env", "-i", *(f"{name}={value}" for name, value in env.items()), "make"]
        if busy:
            beside.callback(subprocess.Popen([sys.executable, "-c", BUSY]).kill)
        steps = {}
        for name, target in (("install", ".venv/.demo"), ("run", "demo")):
            done = timed([*command, target], where=str(clone))
            if done.code:
                raise SystemExit(f"make {target} failed:\n{done.noise}")
            steps[name] = {"seconds": done.seconds, "peak_bytes": done.peak_bytes}
        results = json.loads((clone / "artifacts/quickstart/latest/results.json").read_text(encoding="utf-8"))
        revision = subprocess.run(
            ["git", "-C", source, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        return {
            **steps,
            "revision": revision,
            "variants": {row["name"]: row["status"] for row in results["variants"]},
            "stages": {stage["name"]: round(stage["actual"]["seconds"], 1) for stage in results["stages"]},
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=("still", "busy"))
    parser.add_argument("--source", type=Path, default=HERE.parent)
    asked = parser.parse_args()
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": {}}
    for name in [asked.only] if asked.only else ["still", "busy"]:
        found["rows"][name] = measure(asked.source.resolve(), name == "busy")
        found |= {"command": "python benchmarks/from_nothing.py", "machine": machine.fingerprint()}
        write_json(RESULTS, found)
    print(json.dumps(found["rows"], indent=1))


if __name__ == "__main__":
    main()
