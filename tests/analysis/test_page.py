"""The page of a record, used in a real browser: what it shows, what a choice changes, and what it lets in or out."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import report as report_times
from moe_adapter import MoEAdapterError
from moe_adapter.analysis.page import write_report
from moe_adapter.analysis.resampling import Resampling
from moe_adapter.analysis.tally import count_routing

QUICK = Resampling(resamples=20, permutations=99)
EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
PROMPT, IMAGE, GENERATED = 0, 1, 4
REDS = [Image.new("RGB", (40, 30), "red")] * 2


@pytest.fixture
def opened(browser):
    """opened(path, **options): the page when it is ready; whatever it logs or asks for but itself fails the test."""
    contexts, complaints = [], []

    def open_page(path: Path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("data:", path.as_uri())) or complaints.append(request)
        )
        page.goto(path.as_uri())
        settled(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def settled(page) -> None:
    page.wait_for_selector("#charts[aria-busy=false]")


def case(*choices: tuple[int, tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Experts (T, 2, 2) and modalities (T,): a token's modality and its pair in layer 0; layer 1 has it reversed."""
    modality_T, pair_TK = (np.array(part) for part in zip(*choices, strict=True))
    return np.stack([pair_TK, 3 - pair_TK], axis=1), modality_T


CASES = {
    "a": ("liver", case((PROMPT, (0, 1)), (IMAGE, (0, 2)), (IMAGE, (0, 3)), (GENERATED, (1, 2)))),
    "b": ("liver", case((PROMPT, (0, 1)), (IMAGE, (2, 0)), (IMAGE, (3, 0)))),
    "c": ("heart", case((PROMPT, (3, 1)), (IMAGE, (3, 2)), (IMAGE, (1, 3)))),
    EVIL: (EVIL, case((PROMPT, (2, 1)), (IMAGE, (2, 3)), (IMAGE, (2, 1)))),
}


@pytest.fixture
def small(written):
    """Four cases of some tokens, to count by hand."""
    groups, routed = zip(*CASES.values(), strict=True)
    experts, modalities = zip(*routed, strict=True)
    ids = [np.arange(len(modality_T)) % 2 for modality_T in modalities]
    result = written(experts, groups=groups, modalities=modalities, cases=list(CASES), token_ids=ids)
    facts = [replace(layer, alpha=0.5 + 0.1 * i, lam=0.4) for i, layer in enumerate(result.facts.layers)]
    return replace(result, facts=replace(result.facts, layers=tuple(facts)))


@pytest.fixture
def report(small, tmp_path):
    shown = {
        name: {"frames": REDS, "grids": [(1, 1), (1, 1)], "texts": {"answer": f"{name} is fine", EVIL: "x"}}
        for name in CASES
    }
    shown["b"] |= {"frames": REDS[:1], "grids": [(2, 1)]}
    return write_report(small, tmp_path / "out" / "report.html", cases=shown, title=f"Demo {EVIL}", resampling=QUICK)


def choose(page, **choices: str) -> None:
    for name, label in choices.items():
        page.get_by_label(name.capitalize(), exact=True).select_option(label=label)


def table(page, name: str) -> list[list[str]]:
    """The rows of a chart's table, as shown."""
    section = page.locator(f"#{name}")
    if section.locator("details:not([open])").count():
        section.locator("summary").click()
    section.locator("tbody tr").first.wait_for()
    return [row.locator("td").all_text_contents() for row in section.locator("tbody tr").all()]


def counts(small, **only: object) -> dict[tuple, int]:
    """Routed tokens by group, expert and input, counted row by row."""
    found: dict[tuple, int] = {}
    for row in small.table().to_pylist():
        if all(row[name] == value for name, value in only.items()):
            key = row["group"], row["expert"], "image" if row["modality"] == "image" else "text"
            found[key] = found.get(key, 0) + 1
    return found


def shown_counts(page) -> dict[tuple, int]:
    rows = table(page, "load")
    return {(group, int(expert), kind): int(count) for group, expert, kind, count, _ in rows if int(count)}


def test_filters_change_the_numbers(small, report, opened):
    page = opened(report)
    everything = {key: count for key, count in shown_counts(page).items() if key[0] != "all groups"}
    assert everything == counts(small)
    # liver, layer 0, image: tokens (0, 2), (0, 3), (2, 0), (3, 0).
    choose(page, group="liver", layer="0: layers.0", modality="image")
    assert shown_counts(page) == {("liver", 0, "image"): 4, ("liver", 2, "image"): 2, ("liver", 3, "image"): 2}
    entropy = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)) / np.log(4)
    status = page.locator("#status").text_content()
    assert status.startswith("8 routed tokens: liver, 0: layers.0, image. Expert 0 got most, 50.0 %")
    assert f"evenness {entropy:.3f}" in status
    choose(page, modality="all modalities")
    assert shown_counts(page) == counts(small, group="liver", layer=0)
    # Of layer 0's tokens with expert 0 (six of case a and b), two have expert 1, whichever the group.
    pairs = {(row[0], row[1]): row[2:] for row in table(page, "coactivation")}
    assert pairs["0", "1"] == ["2", "33.3 %"] and pairs["1", "0"] == ["2", "28.6 %"]
    page.get_by_role("button", name="Show all").click()
    page.locator("#status", has_text="all groups").wait_for()
    assert {key: count for key, count in shown_counts(page).items() if key[0] != "all groups"} == counts(small)


def test_charts_draw_what_the_tables_say(small, report, opened):
    page = opened(report)
    choose(page, group="heart", layer="1: layers.1")
    settled(page)
    bars = page.locator("#load .chart .mark-rect path")
    expected = counts(small, group="heart", layer=1)
    heights = bars.evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height - 0.7)")
    unit = sum(heights) / sum(expected.values())
    assert sorted(round(height / unit) for height in heights if height > 1) == sorted(expected.values())
    page.locator("#layers .chart svg").wait_for()
    specialised = table(page, "specialisation")
    assert [row[0] for row in specialised] == ["0", "1"] and all(0 < float(row[4]) <= 1 for row in specialised)
    assert [row[2] for row in table(page, "paths")] == ["0.5", "0.6"]


def test_a_click_on_a_mark_filters_and_a_second_one_takes_it_back(report, opened):
    page = opened(report)

    def says(text: str) -> None:
        page.locator("#status", has_text=text).wait_for()
        settled(page)

    says("routed tokens: all groups, all layers")
    page.locator("#layers .chart .mark-rect path").first.click()
    says("routed tokens: all groups, 0: layers.0")
    page.locator("#specialisation .chart .mark-symbol path").first.click()
    says("routed tokens: all groups, all layers")
    page.locator("#load .chart .mark-rect path").last.click()  # of the panel of all groups: nothing to choose
    says("routed tokens: all groups, all layers")
    panel = page.locator("#load .chart .cell > g").nth(sorted({group for group, _ in CASES.values()}).index("liver"))
    panel.locator(".mark-rect path").first.click()
    says("routed tokens: liver, all layers")


def test_cases_show_frames_experts_and_answers(report, opened):
    page = opened(report)
    assert page.get_by_label("Case", exact=True).locator("option").all_text_contents() == list(CASES)
    view = page.locator("#case-view")
    assert view.locator("figcaption").all_text_contents() == ["expert 0: 100.0 %"] * 2  # layer 0: (0, 2), (0, 3)
    assert "a is fine" in view.inner_text()
    assert view.locator("img").first.evaluate("image => image.naturalWidth") == 40
    choose(page, layer="1: layers.1")
    assert view.locator("figcaption").all_text_contents() == ["expert 3: 100.0 %"] * 2
    pixel = view.locator("canvas").first.evaluate("c => [...c.getContext('2d').getImageData(0, 0, 1, 1).data]")
    assert pixel == [0x56, 0xB4, 0xE9, 255]  # style.CATEGORIES[3]
    page.get_by_role("button", name="Next").click()
    assert "b is fine" in view.inner_text()
    choose(page, layer="0: layers.0")  # (2, 0) above (3, 0)
    pixels = view.locator("canvas").evaluate("c => [...c.getContext('2d').getImageData(0, 0, 1, 2).data]")
    assert pixels == [0xD5, 0x5E, 0x00, 255, 0x56, 0xB4, 0xE9, 255]
    choose(page, group="heart")
    assert page.get_by_label("Case", exact=True).locator("option").all_text_contents() == ["c"]
    page.get_by_label("Overlay strength").fill("0")
    assert view.locator("canvas").first.evaluate("canvas => getComputedStyle(canvas).opacity") == "0"


def test_text_of_the_data_stays_text(report, opened):
    page = opened(report)
    choose(page, group=EVIL)
    page.get_by_label("Table", exact=True).select_option(label="load")
    assert EVIL in page.inner_text("#case-view") and EVIL in page.inner_text("#table-view")
    page.locator("#load .chart .mark-rect path").first.hover()
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    assert EVIL in tooltip.inner_text() and "routed tokens" in tooltip.inner_text()
    assert page.title() == f"Demo {EVIL}" == page.inner_text("h1")
    assert page.evaluate("window.evil") is None
    assert page.locator("img[src=x]").count() == 0


def test_only_the_pages_own_script_runs(report, browser, tmp_path):
    """Were text of the data to slip in as HTML after all, it could neither run nor reach the network."""
    text = report.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("<main>", f"<main>{EVIL}<img src='http://127.0.0.1:9/'>", 1), encoding="utf-8")
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(broken.as_uri())
    settled(page)
    assert page.evaluate("window.evil") is None
    assert len([text for text in said if "Content Security Policy" in text]) >= 3  # script, handler, image
    page.close()


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_light_and_dark(report, opened, scheme, dark):
    """Ink on paper at a contrast of 7 (WCAG AAA), in charts too."""
    page = opened(report, color_scheme=scheme)

    def luminance(selector: str, name: str) -> float:
        colour = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")
        channels = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    paper, panel = luminance("body", "backgroundColor"), luminance("section", "backgroundColor")
    assert (paper < 0.5) == dark
    for ground, ink in ((paper, luminance("h1", "color")), (panel, luminance(".chart svg text", "fill"))):
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 7


def test_keyboard_and_screen_reader(report, opened):
    page = opened(report)
    for control in page.locator("select, button, input").all():
        assert control.evaluate("c => c.labels?.length || c.textContent.trim().length")
    seen = []
    for _ in range(6):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert outline == "3px"
    assert seen == ["group", "layer", "modality", "unit", "Show all", "Table"]
    page.keyboard.press("Enter")  # opens the table behind the first chart
    assert page.locator("#load details[open] caption").inner_text().startswith("Expert load by group: ")
    page.get_by_label("Layer", exact=True).focus()
    page.keyboard.press("ArrowDown")
    page.locator("#status", has_text="layers.0").wait_for()
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    for chart in page.locator(".chart").all():
        assert "the same numbers are in the table" in chart.locator("svg, [aria-label]").first.evaluate(
            "element => element.closest('[aria-label]').getAttribute('aria-label')"
        )


def test_many_experts_are_drawn_on_a_canvas(written, drawn, opened, tmp_path):
    """In the page's colours, light and dark, and clicked as the others are; the charts below are drawn unasked."""
    rng = np.random.default_rng(0)
    experts = [drawn(rng, rng.normal(0, 0.5, 64), (40, 40), 4) for _ in range(4)]
    record = written(experts, groups=["liver", "heart"] * 2, modalities=[np.repeat([1, 0], 20)] * 4, num_experts=64)
    path = write_report(record, tmp_path / "many.html", resampling=QUICK)
    page = opened(path, viewport={"width": 900, "height": 500})
    canvas = page.locator("#layers .chart canvas")
    canvas.wait_for()
    words = """shown => {
        const pen = new OffscreenCanvas(14, 100).getContext("2d", { willReadFrequently: true });
        pen.drawImage(shown, 0, -20);
        return [...pen.getImageData(0, 0, 14, 100).data];
    }"""  # the axis' title and labels

    def brightest() -> int:
        pixels = np.array(canvas.evaluate(words)).reshape(-1, 4)
        return int(pixels[pixels[:, 3] > 250, :3].max(initial=0))

    assert brightest() < 80
    page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 5
    while brightest() < 200:
        assert time.monotonic() < deadline
    canvas.click(position={"x": 120, "y": 100})
    page.locator("#status", has_text=re.compile("all groups, [0-9]+: layers")).wait_for()
    layer = int(re.search(r"(\d+): layers", page.locator("#status").text_content())[1])
    choose(page, group="liver")
    assert shown_counts(page) == counts(record, group="liver", layer=layer)
    page.locator("#coactivation .chart canvas").wait_for()


def test_tokens_are_words_not_placeholders(written, opened, tmp_path):
    experts = [np.tile([0, 1], (60, 1, 1))] * 2
    modalities, ids = [np.repeat([IMAGE, PROMPT, GENERATED], 20)] * 2, [np.repeat([99, 7, 8], 20)] * 2
    record = written(experts, modalities=modalities, token_ids=ids)
    page = opened(write_report(record, tmp_path / "tokens.html", resampling=QUICK))
    rows = [row.locator("td").all_text_contents() for row in page.locator("#tokens tbody tr").all()]
    assert [(expert, id) for expert, _, id, *_ in rows] == [("0", "7"), ("0", "8"), ("1", "7"), ("1", "8")]


@pytest.mark.slow
def test_the_page_of_many_experts(written, drawn, opened, tmp_path):
    """48 layers of 128 experts, top-8, five groups: 92,160 counts of load and 390,144 pairs of experts."""
    rng = np.random.default_rng(0)
    experts = [drawn(rng, rng.normal(0, 0.5, 128), (260, 48), 8) for _ in range(10)]
    modalities = [np.repeat([IMAGE, PROMPT, GENERATED], [156, 78, 26])] * 10
    groups = [f"group {n % 5}" for n in range(10)]
    record = written(experts, groups=groups, modalities=modalities, num_experts=128)
    draws_all(opened(write_report(record, tmp_path / "many.html", resampling=QUICK)))


def draws_all(page) -> None:
    """The charts in view when the page is ready, then the others; `opened` fails where one throws."""
    missing = """() => [...document.querySelectorAll(".chart")].filter((chart) => {
        const { top, bottom } = chart.getBoundingClientRect();
        return top < innerHeight && bottom > 0 && !chart.querySelector("svg, canvas");
    }).length"""
    assert page.locator(".chart").count() >= 4 and page.evaluate(missing) == 0
    for chart in page.locator(".chart").all():
        chart.locator("svg, canvas").first.wait_for()


def test_the_page_of_a_million_rows(written, drawn, opened, tmp_path):
    """28 layers of 4 experts, eight groups, three modalities: the page holds 672 cells of 4 counts."""
    rng = np.random.default_rng(0)
    experts = [drawn(rng, rng.normal(0, 0.5, 4), (1120, 28)) for _ in range(16)]
    modalities = [np.repeat([IMAGE, PROMPT, GENERATED], [800, 200, 120])] * 16
    record = written(experts, groups=[f"group {n % 8}" for n in range(16)], modalities=modalities)
    assert record.dataset.count_rows() >= 10**6
    path = write_report(record, tmp_path / "large.html", resampling=QUICK)
    assert path.stat().st_size < 3e6
    draws_all(opened(path))


def test_its_benchmark(browser):
    text = report_times.run(browser, [report_times.SMALL], seconds=0.01)
    assert re.search(r"\| 320 \| [\d.]+ MB \| [\d.]+ s \| 1\.00 ± ", text)


def test_a_record_of_counts_and_one_of_top_1(vlm, text_batch, written, opened, tmp_path):
    with count_routing(vlm) as counted:
        vlm(**text_batch("left"))
    page = opened(write_report(counted.record(), tmp_path / "counts.html"))
    assert page.locator("#charts h2").all_text_contents() == [
        "Expert load by group",
        "Load by layer",
        "Weights of the paths",
    ]
    assert page.locator("#cases").is_hidden()
    single = written([np.zeros((5, 1, 1), int)] * 2, token_ids=[np.full(5, -1)] * 2)
    page = opened(write_report(single, tmp_path / "single.html", resampling=QUICK))
    assert page.locator("#charts h2").all_text_contents() == ["Expert load by group", "Load by layer"]


def test_the_data_cannot_end_its_element(report):
    text = report.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert "<" not in data and json.loads(data)["cases"][3]["id"] == EVIL
    assert not re.search(r"""(?:src|href)=["']?https?:""", text)


def test_refusals(small, tmp_path, vlm, text_batch):
    def write(**cases):
        write_report(small, tmp_path / "none.html", cases=cases, resampling=QUICK)

    with pytest.raises(MoEAdapterError, match="no case 'z'"):
        write(z={})
    with pytest.raises(MoEAdapterError, match=r"2 frames, 1 grids"):
        write(a={"frames": REDS, "grids": [(1, 1)]})
    with pytest.raises(MoEAdapterError, match=r"keys among"):
        write(a={"answer": "fine"})
    with pytest.raises(MoEAdapterError, match=r"'a' has 2 image tokens .* have 5"):
        write(a={"frames": REDS, "grids": [(1, 1), (2, 2)]})
    with pytest.raises(MoEAdapterError, match="not an image"):
        write(a={"frames": [tmp_path / "absent.png"], "grids": [(1, 2)]})
    with count_routing(vlm) as counted:
        vlm(**text_batch("left"))
    with pytest.raises(MoEAdapterError, match="record of tokens"):
        write_report(counted.record(), tmp_path / "none.html", cases={"a": {}})
    assert not (tmp_path / "none.html").exists()
