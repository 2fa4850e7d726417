"""Writes a model directory in the shape of a known model, with random weights: for speed and memory, not for quality.

    python benchmarks/shaped.py OUT [--shape llama-3.1-8b]

Its tokenizer knows bytes. llama-3.1-8b takes 16 GB of disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memory import TINYLLAMA, Shape, make_random

SHAPES = {
    "llama-3.1-8b": Shape(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocab=128256, tied=False),
    "tinyllama-1.1b": TINYLLAMA,
    "tiny": Shape(hidden=256, inner=512, layers=2, heads=4, kv_heads=2, vocab=512, tied=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    asked = parser.parse_args()
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists already: choose another directory or remove it")
    asked.out.mkdir(parents=True)
    make_random(asked.out, SHAPES[asked.shape])


if __name__ == "__main__":
    main()
