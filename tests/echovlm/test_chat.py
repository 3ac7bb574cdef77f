"""The chat page of a tiny trained checkpoint: the real server, used in a real browser, and what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from echovlm.recipe_parts import SIDE, small_config, tokenizer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.echovlm.chat.__main__ import _launch, main
from examples.echovlm.collator import Collator
from examples.echovlm.families import build_model
from examples.echovlm.processor import build_processor
from examples.echovlm.tasks import Example
from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe, load_adapter, save_adapter
from moe_adapter.integrations import pretrained

ALPHAS, LAMS = (0.3, 0.8), (0.6, 0.25)
TOKENS, CONTEXT = 12, 256  # of an answer, and in all
QUESTION, CHINESE = "What is seen <b>here</b>?", "甲状腺左叶可见囊肿吗？"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Path]:
    """A base and an adapter that has left its start: the folders of both."""
    folder = tmp_path_factory.mktemp("checkpoint")
    base, adapter = folder / "base", folder / "stage2"
    settings = small_config()
    settings.base.text.update(num_hidden_layers=2, max_position_embeddings=CONTEXT)
    torch.manual_seed(0)
    model = build_model(settings, tokenizer())
    model.save_pretrained(base)
    build_processor(tokenizer(), SIDE).save_pretrained(base)
    inject_dual_path_moe(model, num_experts=4, expert_dim=16, shared_expert_dim=16)
    for layer, alpha, lam in zip(dual_path_layers(model).values(), ALPHAS, LAMS, strict=True):
        for parameter in layer.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        torch.nn.init.normal_(layer.router.weight, std=1.0)
        layer.alpha_logit.data.fill_(torch.tensor(alpha).logit())
        layer.lam_logit.data.fill_(torch.tensor(lam).logit())
    save_adapter(model, adapter)
    return base, adapter


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[Path]:
    """Two pictures that differ, one of them wide, and a file that is none."""
    folder = tmp_path_factory.mktemp("frames")
    paths = [folder / "one.png", folder / "two.png", folder / "broken.png"]
    torch.manual_seed(1)
    for path, size in zip(paths, [(40, 40), (90, 30)], strict=False):
        Image.effect_noise(size, 80).convert("RGB").save(path)
    paths[2].write_bytes(b"no image")
    return paths


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    """(address, assistant, folder of the uploads)."""
    pytest.importorskip("gradio", reason='no gradio: pip install "moe-adapter[chat]"')
    from examples.echovlm.chat.assistant import Assistant
    from examples.echovlm.chat.page import build_page

    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        assistant = Assistant(*map(str, checkpoint), max_new_tokens=TOKENS)
        page, port = build_page(assistant, "stage2"), free_port()
        _launch(page, port)
        with pytest.raises(MoEAdapterError, match=f"port {port}: it is taken"):
            _launch(build_page(assistant, "again"), port)
        yield f"http://127.0.0.1:{port}/", assistant, uploads
        page.close(verbose=False)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def page(served, browser):
    """The page, ready; an error in it, or a request to another server, fails the test."""
    complaints = []
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    own = (served[0], "data:", "blob:" + served[0])
    opened.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
    opened.goto(served[0])
    opened.get_by_label("Question").wait_for()
    yield opened
    context.close()
    assert complaints == []


def upload(page, paths: list[Path]) -> None:
    page.locator("input[type=file]").first.set_input_files(paths)
    page.locator(".thumbnail-lg, .thumbnail-item").nth(len(paths) - 1).wait_for()


def ask(page, question: str) -> None:
    box = page.get_by_label("Question")
    box.fill(question)
    box.press("Enter")


def said(page, turns: int) -> list[str]:
    """What the chat holds once it has so many answers."""
    page.locator("[data-testid=bot]").nth(turns - 1).wait_for()
    return [text.strip() for text in page.locator("[data-testid=user], [data-testid=bot]").all_inner_texts()]


def alert(page) -> str:
    page.locator("p[role=alert]").wait_for()
    return page.inner_text("p[role=alert]")


@torch.inference_mode()
def reference(checkpoint, frames: list[Path], turns: list[str]) -> str:
    """The greedy answer to the last of the turns, by transformers and `load_adapter` alone."""
    base, adapter = checkpoint
    processor = AutoProcessor.from_pretrained(base)
    model = load_adapter(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    images = [Image.open(path).convert("RGB") for path in frames]
    text = "".join("<|vision_start|><|image_pad|><|vision_end|>" for _ in images) + turns[0]
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n"
    for number, turn in enumerate(turns[1:], 1):
        prompt += f"<|im_start|>{('user', 'assistant')[number % 2]}\n{turn}<|im_end|>\n"
    inputs = processor(text=[prompt + "<|im_start|>assistant\n"], images=images, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def words(text: str) -> str:
    return " ".join(text.split())


def test_frames_and_questions_in_answers_and_experts_out(page, served, checkpoint, frames):
    assert "Research software, not a medical device." in page.inner_text("body")
    upload(page, frames[:2])
    ask(page, QUESTION)
    first = said(page, 1)
    expected = reference(checkpoint, frames[:2], [QUESTION])
    assert expected and list(map(words, first)) == [QUESTION, words(expected)]
    assert page.get_by_label("Question").input_value() == ""

    shown = page.locator("[data-testid=matplotlib] img")
    shown.wait_for()
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
    before = shown.get_attribute("src")
    page.get_by_label("Layer").click()
    page.get_by_role("option", name="1").click()
    page.wait_for_function("before => ![...document.images].some(image => image.src == before)", arg=before)

    ask(page, CHINESE)
    again = said(page, 2)
    follow_up = reference(checkpoint, frames[:2], [QUESTION, expected, CHINESE])
    assert list(map(words, again)) == [*map(words, first), CHINESE, words(follow_up)]

    with page.expect_response(lambda response: "/queue/join" in response.url):
        page.get_by_label("Clear").last.click()
    page.locator("[data-testid=bot]").first.wait_for(state="detached")
    ask(page, QUESTION)
    assert said(page, 1) == first


def test_a_question_is_put_as_in_training(served, frames):
    from examples.echovlm.chat.assistant import Conversation

    _, assistant, _ = served
    images = [Image.open(path).convert("RGB") for path in frames[:2]]
    collator = Collator(assistant.processor, CONTEXT)
    expected = collator.prompts([Example(prompt=QUESTION, answer="", images=tuple(images))])
    messages = Conversation(frames=images).messages(QUESTION)
    found = pretrained.encode(assistant.model, assistant.processor, [messages], answered=False)
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(found[name], expected[name])


def test_other_frames_begin_a_new_conversation(frames):
    pytest.importorskip("gradio", reason='no gradio: pip install "moe-adapter[chat]"')
    from examples.echovlm.chat.page import Sessions

    one, two, broken = map(str, frames)
    sessions = Sessions()
    first = sessions.conversation("tab", [one])
    first.turns.append(("Why?", "So."))
    assert sessions.conversation("tab", [one]) is first
    assert sessions.conversation("another tab", [one]).turns == []
    with pytest.raises(MoEAdapterError, match=r"broken\.png is not an image"):
        sessions.conversation("tab", [one, broken])
    assert sessions.current("tab") is first, "what cannot be asked ends nothing"
    second = sessions.conversation("tab", [one, two])
    assert second.turns == [] and len(second.frames) == 2
    assert not Path(first.folder.name).exists() and Path(second.folder.name).exists()


def test_the_weights_of_the_paths_by_layer(page):
    rows = [row.locator("td").all_inner_texts() for row in page.locator("table tbody tr").all()]
    expected = [[layer, *weights] for layer, weights in enumerate(zip(ALPHAS, LAMS, strict=True))]
    assert [list(map(float, row)) for row in rows] == [pytest.approx(row, abs=1e-4) for row in expected]


def test_what_the_page_cannot_answer(page, frames):
    ask(page, QUESTION)
    assert alert(page) == "Add frames first."
    upload(page, frames[:1])
    ask(page, "  ")
    page.locator("p[role=alert]", has_text="Ask a question.").wait_for()
    ask(page, "Describe. " * 120)
    page.locator("p[role=alert]", has_text=f"more than the model's {CONTEXT}").wait_for()
    assert page.get_by_label("Question").input_value().startswith("Describe.")  # it isn't lost
    ask(page, "Describe.")
    assert said(page, 1)[0] == "Describe." and page.locator("p[role=alert]").count() == 0


def test_a_file_that_is_no_image(page, frames):
    upload(page, frames[2:])
    ask(page, "Describe.")
    assert alert(page) == "broken.png is not an image that Pillow reads: remove it."


def test_nothing_of_a_tab_is_kept(served, browser, frames, capfd, tmp_path, monkeypatch):
    address, _, uploads = served
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    upload(page, frames[:2])
    ask(page, "secret question")
    said(page, 1)
    assert files(uploads) and files(tmp_path)
    context.close()
    deadline = time.monotonic() + 15
    while (files(uploads) or files(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert files(uploads) == [] and files(tmp_path) == []
    told = "".join(capfd.readouterr())
    assert "secret" not in told and "one.png" not in told


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_the_command_refuses(checkpoint, tmp_path, capsys):
    base, adapter = map(str, checkpoint)
    for arguments, told in [
        (["--base", str(tmp_path), "--adapter", adapter], f"--base {tmp_path}: got no checkpoint directory"),
        (["--base", base, "--adapter", base], f"--adapter {base}: got no adapter"),
        (["--base", base, "--adapter", adapter, "--max-new-tokens", "0"], "--max-new-tokens 0: expected"),
        (["--base", base, "--adapter", adapter, "--port", "70000"], "--port 70000: expected a number from 0 to 65535"),
    ]:
        assert main(arguments) == 2
        got = capsys.readouterr().err
        assert got.startswith(f"error: {told}") and got.count("\n") == 1


@pytest.mark.slow  # a process of its own imports everything anew
def test_the_command_serves_until_it_is_interrupted(checkpoint, tmp_path):
    pytest.importorskip("gradio")
    base, adapter = map(str, checkpoint)
    port = free_port()
    command = [sys.executable, "-m", "examples.echovlm.chat", "--base", base, "--adapter", adapter, "--port", str(port)]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == f"http://127.0.0.1:{port}/ (Ctrl+C ends it)\n"
        served = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read().decode()
        assert "EchoVLM: stage2" in served
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err and "Warning" not in err
    assert list(tmp_path.iterdir()) == []
