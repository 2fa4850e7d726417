"""Memory that parity takes: the peak of its largest process, for every export of the demo model that can be checked.

    python benchmarks/parity.py

Writes benchmarks/results/parity.json. Peaks are of resident memory, mapped files included (`VmHWM`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lighten.evaluate import machine
from lighten.evaluate.parity.check import check
from lighten.step import silent
from lighten.store.store import Store, write_json

RESULTS = Path(__file__).parent / "results" / "parity.json"
MODEL = "demo:smollm2-135m"
EXPORTS = {
    "GGUF F16": ("gguf", "--type", "F16"),
    "GGUF Q8_0": ("gguf", "--type", "Q8_0"),
    "GGUF Q4_K_M": ("gguf", "--type", "Q4_K_M"),
    "ONNX int4": ("onnx",),
    "ONNX float32": ("onnx", "--precision", "fp32"),
}


def measure(flags: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Exports the model without a check, then checks it; returns the peak of the check alone."""
    out = folder / "-".join(flags)
    command = [sys.executable, "-m", "lighten", "export", MODEL, "--format", *flags, "--parity", "tokens=0"]
    subprocess.run([*command, "-o", str(out), "--artifacts", str(folder / "artifacts")], check=True)
    made = next(out.glob("*.gguf"), out)
    store = Store(folder / "artifacts")
    source = next(each for each in map(store.find, store.finished()) if each and each.manifest["kind"] == "source")
    payload = {"source": str(source.path), "made": str(made), "limits": {}, "tokens": 1024}
    found = check(payload, silent)
    size = sum(file.stat().st_size for file in ([made] if made.is_file() else made.iterdir()) if file.is_file())
    return {
        "peak_bytes": found.peak_rss_bytes,
        "bytes": size,
        "top1": found.value["parity"]["top1_agreement"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: measure(flags, Path(folder)) for name, flags in EXPORTS.items()}
    found = {"command": "python benchmarks/parity.py", "machine": machine.fingerprint(), "rows": rows}
    write_json(RESULTS, found)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
