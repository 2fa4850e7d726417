from pathlib import Path

import pytest
import yaml

from lighten.errors import RequestError
from lighten.pipeline.recipe import load, parse
from lighten.pipeline.steps import step_class

GOOD = """name: demo
model: demo:smollm2-135m
calibration: {data: builtin, samples: 4, length: 64}
variants:
  int4:
    - quantize: {method: gptq, bits: 4, group_size: 64}
  q4: [{export: {format: gguf, type: Q4_K_M, imatrix: true}}]
evaluate:
  accuracy: {task: builtin}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_a_good_recipe_and_its_defaults(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    assert [step.kind for step in recipe.steps("int4")] == ["quantize"]
    assert recipe.evaluate.accuracy[0].task == "builtin"
    assert recipe.evaluate.perplexity == []
    resolved = yaml.safe_load(recipe.dump())
    assert resolved["variants"]["int4"][0]["quantize"]["damp_percent"] == 0.05
    assert parse(resolved) == load(write(tmp_path, recipe.dump()))


def test_the_ready_recipes_load() -> None:
    for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        assert load(path.stem).name == path.stem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("samples: 4", "sample: 4"), r"recipe\.yaml:3: calibration\.sample: unknown key; did you mean 'samples'\?"),
        (("variants:", "variant:"), r"recipe\.yaml:4: variant: unknown key; did you mean 'variants'\?"),
        (
            ("bits: 4", "bit: 4"),
            r"recipe\.yaml:6: variants\.int4\.0\.quantize\.bit: unknown key; did you mean 'bits'\?",
        ),
        (("bits: 4", "bits: 5"), r"recipe\.yaml:6: .*bits: must be 2, 3, 4 or 8, not 5"),
        (("method: gptq", "method: gtpq"), r"recipe\.yaml:6: .*method: must be 'gptq', .*'nvfp4', not 'gtpq'"),
        (
            ("group_size: 64", "group_size: 48"),
            r"recipe\.yaml:6: .*group_size: must be -1, 32, 64 or 128, not 48",
        ),
        (("- quantize:", "- quantise:"), r"recipe\.yaml:6: .*unknown step 'quantise'; did you mean 'quantize'\?"),
        (("task: builtin", "tusk: builtin"), r"recipe\.yaml:9: evaluate\.accuracy.*unknown key; did you mean 'task'"),
        (("type: Q4_K_M", "type: Q4_K_X"), r"recipe\.yaml:7: .*type: must be .*'Q4_K_M'.*not 'Q4_K_X'"),
        (("model: demo:smollm2-135m\n", ""), r"recipe\.yaml: model: this key is required"),
        (("name: demo", "name: a/b"), r"recipe\.yaml:1: name"),
        (("length: 64}", "length: 64"), r"recipe\.yaml:\d+: not valid YAML"),
        (("samples: 4", "samples: many"), r"recipe\.yaml:3: calibration\.samples: must be a valid integer"),
    ],
)
def test_an_error_names_file_line_and_key(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(RequestError, match=expected):
        load(write(tmp_path, GOOD.replace(*change)))


def test_not_a_mapping(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a recipe is a mapping"):
        load(write(tmp_path, "- just a list\n"))


def test_a_missing_recipe_lists_the_ready_ones() -> None:
    with pytest.raises(RequestError, match=r"no recipe 'quickstrat': did you mean 'quickstart'"):
        load("quickstrat")


def test_unknown_step_class() -> None:
    with pytest.raises(RequestError, match="there is no step"):
        step_class("shrink")


NAMES = "name: demo\nmodel: m\nvariants:\n"


def test_of_two_equal_keys_both_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"recipe\.yaml:6: the key 'q' stands here and in line 4"):
        load(write(tmp_path, NAMES + "  q: []\n  r: []\n  'q': []\n"))
    with pytest.raises(RequestError, match=r":4: the key 'bits' stands here and in line 4"):
        load(write(tmp_path, NAMES + "  q: [{quantize: {bits: 4, bits: 8}}]\n"))


def test_keys_are_read_as_they_are_written(tmp_path: Path) -> None:
    names = ["on", "yes", "4.25", "1e3", "0x10", "2024-01-01", "null", "8"]
    recipe = load(write(tmp_path, NAMES + "".join(f"  {name}: []\n" for name in names)))
    assert list(recipe.variants) == names
    assert list(load(write(tmp_path, recipe.dump())).variants) == names


def test_a_name_that_yaml_takes_for_something_else_wants_quotes(tmp_path: Path) -> None:
    for name in ("2024", "on", "2024-01-01"):
        with pytest.raises(RequestError, match=r":1: name: .*put it in quotes"):
            load(write(tmp_path, NAMES.replace("demo", name) + "  q: []\n"))


def test_top_level_notes_hold_anchors(tmp_path: Path) -> None:
    steps = "x-common: &common {method: gptq, group_size: 32}\n"
    recipe = load(write(tmp_path, steps + NAMES + "  q: [{quantize: {<<: *common, bits: 8}}]\n"))
    assert recipe.steps("q")[0].dump()["group_size"] == 32
    assert "x-common" not in recipe.dump()
    with pytest.raises(RequestError, match="y-common: unknown key"):
        load(write(tmp_path, steps.replace("x-", "y-") + NAMES + "  q: []\n"))


def test_names_have_an_end(tmp_path: Path) -> None:
    assert parse({"name": "n" * 128, "model": "m", "variants": {"v" * 128: []}}).name
    with pytest.raises(RequestError, match=r"'v{40}…' may hold up to 128"):
        parse({"name": "n", "model": "m", "variants": {"v" * 129: []}})
    with pytest.raises(RequestError, match="name"):
        parse({"name": "n" * 129, "model": "m", "variants": {"v": []}})


@pytest.mark.parametrize(
    ("step", "key", "meant"),
    [
        ({"export": {"format": "GGUF", "type": "q4_k_m"}}, "type", "Q4_K_M"),
        ({"quantize": {"method": "GPTQ", "bits": "4"}}, "method", "gptq"),
        ({"quantize": {"method": "NF4"}}, "block_size", 64),  # its method's defaults are found too
        ({"export": {"format": "Onnx", "precision": "INT4"}}, "precision", "int4"),
        ({"export": {"format": "Bundle", "target": "RPI5"}}, "target", "rpi5-8gb"),
        ({"prune": {"what": "MLP", "ratio": 0.2}}, "what", "mlp"),
    ],
)
def test_choices_in_any_case(step: dict[str, dict[str, object]], key: str, meant: object) -> None:
    (read,) = parse({"name": "n", "model": "m", "variants": {"v": [step]}}).steps("v")
    assert read.dump()[key] == meant
    lower = {kind: {name: str(each).lower() for name, each in given.items()} for kind, given in step.items()}
    assert (
        parse({"name": "n", "model": "m", "variants": {"v": [lower]}}).steps("v")[0].key_config() == read.key_config()
    )


def test_choices_of_measurements_in_any_case() -> None:
    evaluate = {"perplexity": {"protocol": "GPTQ"}, "speed": {"attention": "SDPA", "compile": False}}
    read = parse({"name": "n", "model": "m", "variants": {"v": []}, "evaluate": evaluate}).evaluate
    assert (read.perplexity[0].protocol, read.perplexity[0].length) == ("gptq", 2048)
    assert read.speed and (read.speed.attention, read.speed.compile) == ("sdpa", "off")
