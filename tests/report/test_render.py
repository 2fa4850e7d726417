from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lighten.errors import Failure, RequestError
from lighten.report import facts
from lighten.report.allocation import allocations, draw_allocation
from lighten.report.drawing import inline
from lighten.report.plots import draw, place, plots
from lighten.report.render import html, markdown, terminal, write_report
from lighten.report.table import table
from lighten.results.results import Results
from lighten.store import names

from .sample import raw, raw_failed, raw_overlapping, results, with_failure

NUMBERS = ["145", "8.61", "25.62", "+0.05", "[−0.03, +0.13]", "0.0012", "97.9", "861", "78.4", "2.5×", "149", "276"]


class Page(HTMLParser):
    """Tags and visible text of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "link", "br", "img", "use", "path", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += f" {data}"


def page(made: Results) -> Page:
    return Page(html(made, drawings(made)))


def drawings(made: Results) -> dict[str, bytes]:
    drawn = {plot.stem: draw(plot)[0] for plot in plots(made)}
    return drawn | {grid.stem: draw_allocation(grid)[0] for grid in allocations(made)}


def printed(made: Results, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal(made))
    return console.export_text()


def bare() -> Results:
    """As `evaluate: {}` leaves it: sizes only."""
    value = raw()
    for variant in value["variants"]:
        for name in ("perplexity", "divergence", "memory", "energy", "delta", "bits_per_weight", "runtime", "device"):
            variant[name] = None
        variant.update(accuracy=[], speed=[], loads=[], facts={}, steps=[], notes=[])
    value.update(stages=[], warnings=[], recipe_yaml="", machine={}, calibration=None)
    return Results.model_validate(value)


def test_each_rendering_has_the_numbers() -> None:
    made = results()
    for text in (markdown(made), page(made).text, printed(made, 260)):
        for number in NUMBERS:
            assert number in text


def test_the_terminal_keeps_to_its_width() -> None:
    for width in (60, 80, 100, 140):
        lines = printed(with_failure(), width).splitlines()
        assert max(len(line) for line in lines) <= width
    text = printed(with_failure(), 100)
    for number in ("gguf-q8_0", "145", "25.62", "+0.05 [−0.03, +0.13]", "78.4", "276"):
        assert number in text


def test_a_failed_variant_is_a_row_that_says_why() -> None:
    made = with_failure()
    why = "killed by signal 9"
    assert why in printed(made, 100)
    assert re.search(rf"^\| nf4 \| failed: .*{why}.*\|$", markdown(made), re.MULTILINE)
    shown = page(made)
    assert ("tr", {"class": " failed", "data-name": "nf4"}) in shown.tags
    assert why in shown.text and "lower calibration.samples" in shown.text
    assert [row.variant.name for row in table(made).rows][-1] == "nf4"


def test_a_failed_baseline_leaves_a_report() -> None:
    value = raw()
    empty = {"name": "baseline", "status": "failed", "error": "no such model"}
    value["variants"][0] = empty
    made = Results.model_validate(value)
    assert "no such model" in page(made).text and "no such model" in markdown(made)


def test_sections_that_were_not_measured() -> None:
    made = bare()
    text = page(made).text
    assert "None" not in text and "Perplexity was not measured" in text
    assert "Not measured for any variant: Runtime, Bits/weight, Perplexity" in text
    assert "Not measured for any variant" in markdown(made)
    assert "105" in printed(made, 100)
    assert [column.name for column in table(made).columns] == ["variant", "format", "size"]


def test_one_missing_number_is_a_dash() -> None:
    value = raw()
    value["variants"][2].update(perplexity=None, divergence=None, delta=None, speed=[], memory=None)
    made = Results.model_validate(value)
    row = next(line for line in markdown(made).splitlines() if line.startswith("| gguf-f16"))
    assert row.count("–") == 9
    assert "None" not in page(made).text


def test_no_variants_at_all() -> None:
    made = Results.model_validate({**raw(), "variants": [], "stages": []})
    assert "Nothing to ship" in page(made).text
    assert "Nothing to ship" in markdown(made) and "Nothing to ship" in printed(made, 80)


def evil(name: str) -> Results:
    """The name everywhere a person or a package can put text."""
    value: dict[str, Any] = raw_failed()
    value.update(recipe=name, version=name, created=name, recipe_yaml=f"name: {name}", warnings=[name])
    value["machine"] = {name: name, "versions": {name: name}}
    value["source"] = {"model": name, name: name}
    elsewhere = names.elsewhere("x", name)
    value["variants"][1].update(name=elsewhere, format=name, runtime=name, device=name, path=name, key=name)
    kept = [{"what": name, "why": name}]
    allocation = {f"model.layers.0.{name}": {"type": name, "bits": 4}, name: {"type": "x", "bits": 8}}
    value["variants"][1].update(
        facts={name: [name], "machine": {name: name}, "kept": kept, "allocation": allocation},
        steps=[{name: name}],
        notes=[name],
    )
    value["variants"][1]["perplexity"]["protocol"] = {name: name}
    value["variants"][1]["accuracy"][0]["task"] = name
    value["variants"][1]["loads"][0] |= {"loader": name, "version": name, "status": "failed", "error": name}
    value["variants"][2]["error"] = name
    value["calibration"] |= {"data": name}
    value["calibration"]["overlap"][0] |= {"with": name, "share": 0.5, "examples": [name]}
    value["stages"][0].update(name=name, kind=name, variants=[name])
    return Results.model_validate(value)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></pre></svg>"]
)
def test_text_is_escaped_in_html(name: str) -> None:
    shown = page(evil(name))
    assert [tag for tag, _ in shown.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in shown.tags)
    assert name in shown.text


def test_text_is_escaped_in_markdown() -> None:
    text = markdown(evil("<b>|`*x*[a](b)`"))
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<b>" not in outside and "](" not in outside.replace("\\](", "")
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    unescaped = {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "Perplexity" in row or "gguf-q8_0 | gguf" in row}
    assert len(unescaped) == 1


def test_a_fence_in_the_recipe_stays_inside() -> None:
    made = Results.model_validate({**raw(), "recipe_yaml": "a: |\n  ```\n  text\n  ```\n"})
    assert "````yaml\na: |" in markdown(made)


def test_mathtext_in_a_name_is_text() -> None:
    value = raw()
    value["variants"][1] |= {"name": "x @ $y_{1$", "facts": {"machine": {}}}
    svg, _ = draw(plots(Results.model_validate(value))[0])
    assert b"$y_{1$" in svg


def test_the_page_needs_no_network() -> None:
    made = html(results(), drawings(results()))
    links = [v for _, a in Page(made).tags for k, v in a.items() if k in ("src", "href", "xlink:href") and v]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)|@import", made)
    assert "default-src 'none'" in made


def test_inlined_plots_have_ids_of_their_own_and_the_colours_of_the_page() -> None:
    drawn = [inline(svg, stem) for stem, svg in drawings(results()).items()]
    ids = [name for text in drawn for name in re.findall(r'\bid="([^"]*)"', text)]
    used = {name for text in drawn for name in re.findall(r'(?:href="|url\()#([^")]*)', text)}
    assert len(ids) == len(set(ids)) and used <= set(ids)
    assert all("var(--ink)" in text and "#1b1f24" not in text for text in drawn)


def test_the_best_are_marked_beside_the_baseline() -> None:
    comparison = table(results())
    best = {
        column.name: [row.variant.name for row in comparison.rows if row.cells[i].best]
        for i, column in enumerate(comparison.columns)
    }
    assert best["size"] == ["gguf-q4_k_m"] and best["decode"] == ["gguf-q4_k_m"]
    assert best["perplexity"] == best["change"] == ["gguf-f16", "gguf-q8_0"], "their intervals overlap"
    assert best["acc_norm-0"] == [], "120 tasks do not tell these variants apart"
    assert comparison.rows[0].baseline and comparison.rows[0].variant.name == "baseline"


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        written = write_report(with_failure(), tmp_path / name)
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in written})
    assert contents[0] == contents[1]
    assert sorted(str(path) for path in contents[0]) == [
        "plots/bits-gguf-q4_k_m.png",
        "plots/bits-gguf-q4_k_m.svg",
        "plots/quality-size.png",
        "plots/quality-size.svg",
        "plots/quality-speed.png",
        "plots/quality-speed.svg",
        "report.html",
        "report.md",
    ]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["plots", "report.html", "report.md"]


def test_without_matplotlib_the_report_says_how_to_get_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"lighten\[report\]"):
        draw(plots(results())[0])
    written = write_report(results(), tmp_path)
    assert [path.name for path in written] == ["report.md", "report.html"]
    assert "lighten[report]" in (tmp_path / "report.html").read_text()


def test_a_directory_that_cannot_be_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="cannot write the report to"):
        write_report(results(), tmp_path / "file" / "v1")


def test_the_front_of_each_plot() -> None:
    size, speed = plots(results())
    """Perplexity does not tell the baseline and F16 from Q8_0, which is smaller and faster."""
    assert [size.points[i].name for i in size.front()] == ["gguf-q4_k_m", "gguf-q8_0"]
    assert [speed.points[i].name for i in speed.front()] == ["gguf-q8_0", "gguf-q4_k_m"]


def test_a_broken_variant_does_not_flatten_the_plots() -> None:
    value = raw()
    value["variants"][1]["perplexity"]["value"] = 48_211.0
    made = Results.model_validate(value)
    size = plots(made)[0]
    assert [point.name for point in size.left_out] == ["gptq-int4"]
    assert "gptq-int4 (perplexity 48,200)" in page(made).text


def test_labels_cover_neither_each_other_nor_points() -> None:
    anchors = [(60.0 + 9 * (i % 5), 60.0 + 14 * (i // 5)) for i in range(15)]
    sizes = [(50.0, 10.0)] * len(anchors)
    spots = place(anchors, sizes, (0.0, 0.0, 300.0, 200.0), range(15))
    boxes = [(x - 25, y - 5, x + 25, y + 5) for x, y in (spot for spot in spots if spot)]
    assert len(boxes) >= 3
    for i, (left, bottom, right, top) in enumerate(boxes):
        assert left >= 0 and bottom >= 0 and right <= 300 and top <= 200
        assert not any(left < x < right and bottom < y < top for x, y in anchors)
        for other in boxes[i + 1 :]:
            assert right <= other[0] or other[2] <= left or top <= other[1] or other[3] <= bottom


def test_stages_show_predicted_beside_actual() -> None:
    made = results()
    assert "| sweep | 61 s, 1.31 GB memory, 412 MB disk | 58 s, 1.29 GB memory, 410 MB disk (cached) |" in markdown(
        made
    )
    text = " ".join(page(made).text.split())
    assert "61 s 58 s cached 1.31 GB 1.29 GB" in text
    unknown = made.model_copy(
        update={"stages": [made.stages[0].model_copy(update={"actual": None, "predicted": None})]}
    )
    assert "| sweep | – | – (cached) |" in markdown(unknown)
    assert "None" not in page(unknown).text


def test_an_overlap_stands_directly_under_the_table() -> None:
    made = Results.model_validate(raw_overlapping())
    note = "Calibration overlaps perplexity wikitext2_test.txt: 12 % of its 13-grams"
    lines = markdown(made).split("### ")[0].splitlines()
    assert lines[max(i for i, line in enumerate(lines) if line.startswith("| gguf")) + 2].startswith(f"**{note}")
    text = " ".join(printed(made, 140).split())
    assert text.index("gguf-q4_k_m") < text.index(note) < text.index("Ship")
    assert note in page(made).text
    for text in (markdown(results()), page(results()).text, printed(results(), 140)):
        assert "overlaps" not in text


def test_the_calibration_section() -> None:
    for text in (markdown(results()), page(results()).text):
        assert "builtin: 35 of 64 samples of 512, 17,920 tokens, 4,211 of them distinct, 8.6 % of the vocab" in text
        assert "perplexity builtin: none of its 13-grams" in text
        assert "accuracy builtin: 0.31 % of its 13-grams: “to be or not”" in text
    for text in (markdown(bare()), page(bare()).text):
        assert "### Calibration" not in text and "vocabulary" not in text


def test_where_the_variants_load() -> None:
    made = with_failure()
    lines = markdown(made).splitlines()
    at = lines.index("### Where it loads")
    assert lines[at + 2] == "| Variant | transformers 5.23.0 | GPTQModel | llama.cpp 0.3.36 | onnxruntime 1.32.0 |"
    assert lines[at + 4 : at + 7] == [
        "| baseline | ✓ 2.3 s | – | – | – |",
        "| gptq-int4 | ✓ 2.3 s | not installed | – | – |",
        "| gguf-f16 | ✗ failed | – | ✓ 0.4 s | – |",
    ]
    shown = " ".join(page(made).text.split())
    assert "gguf-f16 ✗ failed – ✓ 0.4 s –" in shown
    for text in (shown, printed(made, 140)):
        assert "gguf-q8_0 with transformers: ValueError: <no> | such type" in text
        assert text.count("GPTQModel needs gptqmodel: pip install 'lighten[gptq]'") == 1
    assert re.search(r"^gguf-f16 +✗ failed +– +✓ 0.4 s *$", printed(made, 100), re.MULTILINE), "unused loaders go"
    assert "gguf-f16: transformers ✗ failed, llama.cpp ✓ 0.4 s" in " ".join(printed(made, 40).split())
    for text in (markdown(bare()), page(bare()).text, printed(bare(), 100)):
        assert "Where it loads" not in text


def test_what_was_left_alone_is_told_by_reason() -> None:
    text = " ".join(page(results()).text.split())
    assert "Left alone lm_head : tied to the embedding" in text and "and 3 more : ignore" in text
    assert "gptq-int4: lm_head (tied to the embedding)" in markdown(results())
    assert facts.kept({"kept": ["embedding", "norms"]}) == [("embedding, norms", "")]
    assert facts.kept({}) == facts.kept({"kept": []}) == []


def test_the_bits_of_every_tensor_are_drawn() -> None:
    (grid,) = allocations(results())
    assert grid.modules == ["q", "k", "v", "o", "gate", "up", "down"]
    assert list(grid.layers) == list(range(30)) and list(grid.beside) == ["model.embed_tokens"]
    svg, png = draw_allocation(grid)
    for text in ("gguf-q4_k_m", "gate", ">29<", "Q4_K, 4.50 bits, 164 tensors", "embed_tokens", ">8.5<"):
        assert text.encode() in svg
    assert png.startswith(b"\x89PNG")
    shown = page(results()).text
    assert "Where the bits went" in shown and "allocation" not in shown.lower()
    assert "Q8_0, 8.50 bits, 2 tensors" in markdown(results())


@pytest.mark.parametrize(
    "tensors",
    [
        {"lm_head": {"type": "16 bits", "bits": 16}},
        {f"model.layers.{i}.mlp.experts.gate_up": {"type": f"t{i}", "bits": 2 + i / 9} for i in range(0, 130, 3)},
        {"model.layers.7.mlp.a_very_long_name_of_a_module.weight": {"type": "4 bits", "bits": 4.16}},
    ],
)
def test_odd_allocations_are_drawn_too(tensors: dict[str, Any]) -> None:
    value = raw()
    value["variants"][1]["facts"]["allocation"] = tensors
    grid = allocations(Results.model_validate(value))[0]
    assert len(draw_allocation(grid)[0]) > 1000
    assert len(grid.cells) + len(grid.beside) == len(tensors)


def test_an_allocation_of_another_shape_is_a_fact() -> None:
    value = raw()
    value["variants"][4]["facts"]["allocation"] = {"down": 4}
    made = Results.model_validate(value)
    assert allocations(made) == []
    assert "down 4" in page(made).text


def test_what_tensorrt_takes_of_a_graph_stands_under_its_format() -> None:
    value = raw()
    told = {"supported": False, "lacks": ["my::Warp ×2", "Det ×1"], "checked_with": "the table of TensorRT 10"}
    value["variants"][1]["facts"] = {"tensorrt": told}
    value["variants"][2]["facts"] = {"tensorrt": told | {"supported": True, "lacks": []}}
    made = Results.model_validate(value)
    shown = html(made, drawings(made))
    for said in ("does not take my::Warp ×2, Det ×1", "knows all operators"):
        said += ", by the table of TensorRT 10; not measured here"
        assert f"<dt>TensorRT</dt><dd>{said}</dd>" in shown
