"""The paper's Figures 1 to 4 and 6 to 13, drawn from real cases, manifests, answers and models."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from echovlm.recipe_parts import collator, example, small_config, tokenizer
from PIL import Image

from examples.echovlm import evaluation
from examples.echovlm.account import Account
from examples.echovlm.cases import Case, Question, read_cases, write_cases
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.data import Data
from examples.echovlm.families import build_model
from examples.echovlm.figures import architecture as architecture_file
from examples.echovlm.figures import generic as generic_file
from examples.echovlm.figures import gradcam as gradcam_file
from examples.echovlm.figures import save
from examples.echovlm.figures.__main__ import main
from examples.echovlm.figures.architecture import architecture, parameters_by_part
from examples.echovlm.figures.case_pages import choose, page
from examples.echovlm.figures.generic import generic
from examples.echovlm.figures.gradcam import read_boxes
from examples.echovlm.figures.marks import marks
from examples.echovlm.figures.overview import counts, overview
from examples.echovlm.figures.pipeline import pipeline, read_manifest
from examples.echovlm.figures.runs import Run
from examples.echovlm.finding_scores import truth_of
from examples.echovlm.methods import choose_trained, inject
from examples.echovlm.phantom import generate_cases
from examples.echovlm.stages import add_lora
from moe_adapter import MoEAdapterError, dual_path_layers, save_adapter
from moe_adapter.analysis.lines import wrapped

EVIL = "</td><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
CYST = "The left thyroid lobe contains a round anechoic cyst of 14 mm."


def case(id: str = "a", organ: str = "thyroid", **more) -> Case:
    values = dict(patient=id, hospital="hill", language="en", images=("a.png",), findings=CYST, split="test")
    return Case(id=id, organ=organ, **{**values, **more})


def write_run(folder: Path, cases: list[Case], answers: dict[str, dict[str, list[str]]], **asked) -> Run:
    """A run's folder as far as its answers go: model → task → answers."""
    write_cases(folder / "cases" / "cases.jsonl", cases)
    for image in {image for each in cases for image in each.images}:
        Image.new("RGB", (40, 30), "red").save(folder / "cases" / image)
    started = {"cases_file": None, "base_folder": None, "seed": 0, "evaluation": asked}
    (folder / "account.json").write_text(json.dumps({"run": started}))
    for model, tasks in answers.items():
        (folder / "evaluation" / model).mkdir(parents=True)
        for task, said in tasks.items():
            (folder / "evaluation" / model / f"{task}.json").write_text(json.dumps({"answers": said, "sums": {}}))
    return Run(folder)


def words(figure) -> str:
    """All text of a figure, its parts' too."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


# Figure 2


def test_overview_counts_every_case_and_image(tmp_path):
    cases = read_cases(generate_cases(tmp_path, cases_per_organ=3, test_share=0.4, frames=2, size=56))
    figure = overview(cases)
    panels = {ax.get_title(loc="left")[4:]: ax for ax in figure.axes}
    for title, name, each in (
        ("cases by organ", "organ", 1),
        ("images by organ", "organ", 2),
        ("cases by hospital", "hospital", 1),
        ("cases by language", "language", 1),
    ):
        drawn = sum(bar.get_width() for bar in panels[title].patches)
        assert drawn == each * len(cases)
        shown = [label.get_text() for label in panels[title].get_yticklabels()]
        assert sorted(shown) == sorted({getattr(each, name) for each in cases})
    lengths = [ax for title, ax in panels.items() if title.startswith("length of reports")]
    assert sum(bar.get_height() for ax in lengths for bar in ax.patches) == len(cases)


def test_rare_names_are_summed_up():
    found = counts([(f"hospital {n}", "train") for n in range(20) for _ in range(n + 1)])
    assert [*found][:2] == ["hospital 19", "hospital 18"] and [*found][11:] == ["9 others"]
    assert sum(counter.total() for counter in found.values()) == 210


# Figure 3


def write_manifest(folder: Path, step: str, kept: int, drops: dict[str, int]) -> Path:
    folder.mkdir()
    manifest = Manifest(step=step, given=kept + sum(drops.values()))
    manifest.keep(kept)
    for reason, count in drops.items():
        for number in range(count):
            manifest.drop(f"{reason} {number}", reason)
    return manifest.write(folder)


def test_pipeline_shows_what_the_manifests_say(tmp_path):
    write_manifest(tmp_path / "images", "filter-images", 6, {"several display regions": 2})
    drops = {"a": 5, "b": 4, "c": 3, "d": 2, "e": 1}
    write_manifest(tmp_path / "unique", "deduplicate", 1000, drops)
    figure = pipeline([read_manifest(tmp_path / "images"), read_manifest(tmp_path / "unique" / "manifest.json")])
    widths = [round(bar.get_width(), 6) for bar in figure.axes[0].patches]
    assert widths == [0.75, 0.25, *(round(count / 1015, 6) for count in (1000, 5, 4, 3, 2, 1))]
    said = words(figure)
    assert "filter-images\n8 images\n6 kept" in said and "2  several display regions" in said
    assert "deduplicate\n1,015 instances\n1,000 kept" in said
    assert "5  a\n4  b\n3  c\n3  for 2 other reasons" in said


def test_manifests_that_do_not_add_up_are_refused(tmp_path):
    file = write_manifest(tmp_path / "a", "judge", 3, {"low": 1})
    file.write_text(file.read_text().replace('"kept": 3', '"kept": 4'))
    with pytest.raises(MoEAdapterError, match="given 4, kept 4 and dropped 1, which don't add up"):
        read_manifest(tmp_path / "a")
    with pytest.raises(MoEAdapterError, match="got no account of a step"):
        read_manifest(tmp_path)


# Figure 4


@pytest.fixture(scope="module")
def model():
    config = small_config()
    torch.manual_seed(0)
    built = build_model(config, tokenizer())
    inject(built, config)
    tuned = add_lora(built, config)
    choose_trained(tuned, 2, config)
    return tuned


def test_architecture_counts_and_dims_are_the_models(model):
    parts = parameters_by_part(model)
    assert sum(frozen + trained for frozen, trained in parts.values()) == sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(count for _, count in parts.values()) == trained
    assert parts["static experts"] == (3 * 32 * 48, 0) and parts["routed experts"] == (0, 4 * 3 * 32 * 16)
    assert parts["shared experts"] == (0, 3 * 32 * 16) and parts["routers, α and λ"] == (0, 4 * 32 + 2)
    assert parts["LoRA"][0] == 0 < parts["LoRA"][1]
    layer = next(iter(dual_path_layers(model).values()))
    with torch.no_grad():
        layer.alpha_logit.fill_(1.0)  # sigmoid: 0.731
    said = words(architecture(model))
    for text in ("32 → 48 → 32", "32 → 16 → 32", "32 → 4, top-2", "α = 0.731, times the constant 2", "λ = 0.500"):
        assert text in said
    assert "4.61 k parameters\nfrozen" in said and "6.14 k parameters\ntrained" in said
    with pytest.raises(MoEAdapterError, match="the model has 1 dual-path layers"):
        architecture(model, layer=1)


@pytest.mark.parametrize(
    ("moe", "there", "absent"),
    [
        ({"mixing": "token"}, "each token has its own", "α ="),
        ({"shared_expert_dim": 0}, "router", "shared expert:"),
        ({"num_experts": 0}, "shared expert:", "router, float32"),
    ],
)
def test_architecture_shows_the_paths_there_are(moe, there, absent):
    config = small_config(moe={"expert_dim": 16, "shared_expert_dim": 16, **moe})
    built = build_model(config, tokenizer())
    inject(built, config)
    said = words(architecture(built))
    assert there in said and absent not in said


# Figures 7 to 13


def test_findings_are_right_wrong_missed_or_added():
    truth = {"lesion": "cyst", "side": "left", "size_mm": "14", "shape": "round"}
    said = "The right thyroid lobe contains a round hypoechoic nodule of 15 mm."
    found = {mark.name: mark.kind for mark in marks(said, truth, case())}
    assert found == {"lesion": "wrong", "side": "wrong", "size_mm": "right", "shape": "right", "echogenicity": "added"}
    assert {mark.kind for mark in marks("", truth, case())} == {"missed"}
    denied = {mark.name: mark.kind for mark in marks("No lesion. No cyst.", truth, case())}
    assert denied["lesion"] == "wrong" and denied["side"] == "missed"
    far = {mark.name: mark.kind for mark in marks("A cyst of 20 mm.", truth, case())}
    assert far["size_mm"] == "wrong"


def test_the_truth_is_the_cases_attributes_where_it_has_some():
    known = case(attributes={"lesion": "nodule"})
    assert truth_of("report", CYST, known) == {"lesion": "nodule"}
    assert truth_of("diagnosis", CYST, known)["lesion"] == truth_of("report", CYST, case())["lesion"] == "cyst"


@pytest.fixture
def run(tmp_path):
    """Two held-out cases of the same organ and one of another, with something to escape everywhere."""
    cases = [
        case("t", split="train"),
        case("a", impression="Thyroid cyst.", questions=(Question(question="Q?", answer="Yes."),)),
        case(EVIL, organ=EVIL, hospital=EVIL, findings=EVIL),
        case("b", language="zh", findings="甲状腺左叶可见一圆形无回声囊肿。"),
    ]
    answers = {
        "base": {"report": ["", EVIL, ""], "diagnosis": ["Nodule."]},
        "stage II": {"report": [CYST.replace("left", "right"), "x", "甲状腺右叶可见囊肿。"], "diagnosis": ["Cyst."]},
        "stage II, images shuffled": {"report": ["shuffled"] * 3},
    }
    return write_run(tmp_path / "run", cases, answers)


def test_answers_stand_beside_their_own_questions(run, tmp_path):
    text = page([run], choose(run.cases, organs=["thyroid"], per_organ=2, ids=None), "told")
    assert "shuffled" not in text and text.count("<section>") == 2
    first, second = text.split("<section>")[1:]
    assert CYST.replace("left", "right") in first and "甲状腺右叶可见囊肿。" in second
    assert re.search(r'<li class="wrong">.{0,90}✗</b> side: right \(truth: left\)', first)
    assert re.search(r'<li class="right">.{0,90}✓</b> size mm: 14', first)
    assert first.count('<li class="missed">') == 5 and "diagnosis: " in first and "diagnosis: " not in second
    assert second.count('lang="zh"') == 4
    chosen = choose(run.cases, organs=None, per_organ=1, ids=None)
    assert [each.id for each in chosen] == [EVIL, "a"]
    with pytest.raises(MoEAdapterError, match="--case t: none is held out"):
        choose(run.cases, organs=None, per_organ=1, ids=["t"])


def test_of_several_runs_the_last_model_of_each(run, tmp_path):
    shutil.copytree(run.folder, other := tmp_path / "other")
    shutil.rmtree(other / "evaluation" / "stage II")
    text = page([run, Run(other)], choose(run.cases, organs=None, per_organ=1, ids=["a"]), "")
    assert re.findall(r"<tr><th scope=row>(.*?)</th>", text) == ["run", "other"] * 2
    assert "Case studies: run, other" in text and "(nothing)" in text.split("scope=row>other")[1]
    stranger = write_run(tmp_path / "stranger", [case("z"), case("y"), case("x")], {"base": {"report": ["", "", ""]}})
    with pytest.raises(MoEAdapterError, match="other questions"):
        page([run, stranger], [], "")


def test_answers_of_other_cases_are_refused(run, tmp_path):
    write_cases(run.cases_file, [each for each in run.cases if each.id != "b"])
    with pytest.raises(MoEAdapterError, match="got 3 answers, expected one to each of the 2 questions"):
        _ = Run(run.folder).answers
    with pytest.raises(MoEAdapterError, match="got no run"):
        _ = Run(tmp_path).cases


def test_questions_are_those_that_the_evaluation_draws(tmp_path, monkeypatch):
    """Of a case with more questions than are asked: the evaluator's own."""
    monkeypatch.setattr(evaluation, "general_text", lambda: ("", "general text " * 100))
    questions = tuple(Question(question=f"Q{n}?", answer=f"A{n}.") for n in range(6))
    run = write_run(
        tmp_path, [case("a", questions=questions), case("b", questions=questions)], {}, questions_per_case=2
    )
    config = small_config()
    config = replace(config, evaluation=replace(config.evaluation, tasks=("vqa",), questions_per_case=2))
    data = Data(folder=run.cases_file.parent, train=(), test=tuple(run.cases), shown=())
    evaluator = evaluation.Evaluator(data, collator(), config, tmp_path / "evaluation", Account())
    asked = [(each.case_id, each.prompt) for each in evaluator.held_out["vqa"].examples]
    assert [(each.case_id, each.prompt) for each in run.held_out("vqa")] == asked and len(asked) == 4


def test_the_page_in_a_browser(run, tmp_path):
    """Text of the data stays text, nothing is asked for, frames are shown, and marks differ in more than colour."""
    playwright = pytest.importorskip("playwright.sync_api")
    assert main(["cases", str(run.folder), "-o", str(tmp_path / "out" / "cases.html")]) == 0
    with playwright.sync_playwright() as started:
        found = [path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path]
        found += [path for path in [started.chromium.executable_path] if Path(path).exists()]
        if not found:
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        browser = started.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        asked, complaints, papers = [], [], {}
        for scheme in ("light", "dark"):
            shown = browser.new_context(color_scheme=scheme, viewport={"width": 420, "height": 800}).new_page()
            shown.on("request", lambda request: asked.append(request.url))
            shown.on("console", lambda message: complaints.append(message.text))
            shown.goto((tmp_path / "out" / "cases.html").as_uri())
            papers[scheme] = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert papers["light"] != papers["dark"] and complaints == []
        assert all(url.startswith(("data:", "file:")) for url in asked)
        assert shown.evaluate("window.evil") is None and shown.locator("img[src=x], script").count() == 0
        assert EVIL in shown.locator("main").inner_text()
        assert shown.evaluate("document.documentElement.scrollWidth") == 420
        images = shown.locator("section img")
        assert images.evaluate_all("all => all.every(i => i.naturalWidth == 40)") and images.count() == 2
        borders = shown.locator(".key li").evaluate_all("all => all.map(li => getComputedStyle(li).borderStyle)")
        symbols = shown.locator(".key li b").all_text_contents()
        assert len(set(symbols)) == 4 and borders == ["solid", "solid", "dashed", "dotted"]
        browser.close()


# Figures 1 and 6


def test_generic_beside_specialised():
    figure = generic(example(answer=CYST), case(), {"base": "", "stage II": CYST.replace("14", "40")})
    said = words(figure)
    assert "generic model (base)" in said and "specialised model (stage II)" in said and f"truth: {CYST}" in said
    assert "○ missed: side left" in said and "✗ wrong: size mm 40 (truth: 14)" in said
    unknown = words(generic(example(answer=""), case(findings="", split="show"), {"base": "a", "stage II": CYST}))
    assert "There is no report of this case." in unknown and "missed" not in unknown


@pytest.mark.parametrize(
    "text", [CYST * 3, "甲状腺左叶可见一圆形无回声囊肿，大小约14mm，后方增强。" * 3, "a" * 70 + " b", ""]
)
def test_lines_fit_and_lose_nothing(text):
    lines = wrapped(text, 30)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(sum(1 if c.isascii() else 2 for c in line) <= 30 for line in lines if " " in line or not line.isascii())


def test_boxes_name_a_frame_and_corners():
    assert read_boxes(["1,2,3,4", "2:5,6,7.5,8", "2:0,0,1,1"], 2) == [
        [(1, 2, 3, 4)],
        [(5, 6, 7.5, 8), (0, 0, 1, 1)],
    ]
    for wrong in ("1,2,3", "3:1,2,3,4", "0:1,2,3,4", "3,2,1,4", "a,b,c,d", "x:1,2,3,4"):
        with pytest.raises(MoEAdapterError, match="expected left,top,right,bottom"):
            read_boxes([wrong], 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model):
    """A run's folder with a base and an adapter of stage II, and a show case."""
    config = small_config(image_side=56)
    shown = [case("a"), case("s", split="show", findings="")]
    run = write_run(tmp_path_factory.mktemp("trained"), shown, {"base": {"report": ["x"]}})
    file = run.folder / "account.json"
    started = json.loads(file.read_text())["run"]
    file.write_text(json.dumps({"run": {**started, **asdict(config)}}))
    torch.manual_seed(0)
    base = build_model(config, tokenizer())
    base.save_pretrained(run.folder / "base")
    collator().processor.save_pretrained(run.folder / "base")
    inject(base, config)
    tuned = add_lora(base, config)
    with torch.no_grad():
        next(iter(dual_path_layers(tuned).values())).alpha_logit.fill_(1.0)
    save_adapter(tuned, run.folder / "stage2")
    return run


def test_figures_of_a_trained_model(trained, tmp_path, monkeypatch):
    """The commands that load the run's own model; the show case is asked about now, of the base and of stage II."""
    drawn = []
    for module in (architecture_file, generic_file, gradcam_file):
        monkeypatch.setattr(module, "save", lambda figure, output: drawn.append(words(figure)) or save(figure, output))
    folder, out = str(trained.folder), str(tmp_path / "figure.png")
    assert main(["architecture", folder, "-o", out]) == 0
    assert "α = 0.731" in drawn[-1]
    assert main(["generic", folder, "--case", "s", "-o", out]) == 0
    assert "specialised model (trained)" in drawn[-1] and "There is no report of this case." in drawn[-1]
    boxes = ["--red", "2,2,20,20", "--blue", "5,5,30,25", "--names", "lesion", "shadow"]
    assert main(["gradcam", folder, "--answer", CYST, "--phrase", "cyst", *boxes, "-o", out]) == 0
    assert "for “cyst”" in drawn[-1] and "lesion" in drawn[-1] and "shadow" in drawn[-1]
    assert main(["generic", folder, "--case", "a", "-o", out]) == 2  # its evaluation has got to the base only
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    for colour in ([0xE8, 0x00, 0x0B], [0x4D, 0x9D, 0xFF]):
        assert (abs(pixels - colour).max(axis=2) < 8).any()


def test_command_says_what_is_wrong(run, tmp_path, capsys):
    assert main(["overview", str(run.cases_file), "-o", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n" and Image.open(tmp_path / "a.png").width == 2161
    for arguments, reason in (
        (["overview", str(run.cases_file), "-o", str(tmp_path / "a.doc")], "expected a name in .pdf, .png, .svg"),
        (["architecture", str(tmp_path), "-o", "a.png"], "got no run's folder"),
        (["generic", str(run.folder), "--case", "t", "-o", "a.png"], "expected a held-out or a show case: a"),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
