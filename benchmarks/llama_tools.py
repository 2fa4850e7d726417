"""llama.cpp's own tools, built from the source package of llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

from lighten.export.bundle.bundle import TRIED

VERSION = TRIED["llama-cpp-python"]
SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_CCACHE": "OFF",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def fetch(work: Path, number: str = VERSION) -> Path:
    """Returns llama.cpp's source, from the source package of llama-cpp-python."""
    source = work / f"llama_cpp_python-{number}" / "vendor" / "llama.cpp"
    if not source.is_dir():
        package = f"llama-cpp-python=={number}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*command, "-d", str(work), package], check=True, stdout=sys.stderr)
        with tarfile.open(work / f"llama_cpp_python-{number}.tar.gz") as tar:
            tar.extractall(work, filter="data")
    return source


def build(work: Path, *tools: str, jobs: int = 2) -> list[Path]:
    """Returns tools such as `llama-quantize`, built with cmake for this processor in `work`."""
    source, folder = fetch(work), work / "build"
    given = [f"-D{name}={value}" for name, value in SETTINGS.items()]
    nice = ["nice", "-n", "10", "cmake"]
    subprocess.run([*nice, "-S", str(source), "-B", str(folder), *given], check=True, stdout=sys.stderr)
    command = [*nice, "--build", str(folder), "--target", *tools, "-j", str(jobs)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return [folder / "bin" / tool for tool in tools]
