"""Grad-CAM points where the answer comes from, on a model that is built to answer from one white patch."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers as tf
import zoo
from torch import nn
from transformers.image_utils import SizeDict

from examples.echovlm.tokenizer import train_tokenizer
from moe_adapter import MoEAdapterError, inject_dual_path_moe
from moe_adapter.analysis import style
from moe_adapter.analysis.gradcam import find_phrase, grad_cam, gradcam_figure
from moe_adapter.analysis.intervene import StaticOnly, intervene

IMAGE, VIDEO = zoo.TOKENS["image_token_id"], zoo.TOKENS["video_token_id"]
YES, NO = 50, 51
PATCH = 14
BLACK = 4.2  # four black patches sum to its negative
LAYERS = ["merger", "vision.-1", "vision.0", 0]
MERGED = {"merger", 0}
SIDES = SizeDict(shortest_edge=PATCH**2, longest_edge=2**20)  # no frame of these tests is resized


def white_reader(**text) -> tf.PreTrainedModel:
    """A Qwen2-VL whose logit of YES grows with the white patches that it sees, black ones being ignored.

    Channel 0 carries the brightness of a patch through the residual stream, to channel 1 of the token that attends.
    Everything else is faint random weights, and constants that keep the norms from dividing by the brightness.
    """
    model = zoo.build("qwen2_vl", **text)
    vision, decoder = model.model.visual, model.model.language_model
    background = torch.linspace(-2, 2, 31)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1 if parameter.dim() > 1 else 1)
        vision.patch_embed.proj.weight[0] += 1 / vision.patch_embed.proj.weight[0].numel()
        vision.blocks[0].mlp.fc2.bias[1:] += background
        first, _, last = vision.merger.mlp
        first.weight[0, ::32] += 1  # channel 0 of each patch that is merged
        first.bias[0] += BLACK
        last.weight[0, 0] += 1
        last.bias[1:] += background
        decoder.embed_tokens.weight[:, 1:] += background
        for block in decoder.layers:
            block.self_attn.v_proj.weight[0, 0] += 1
            block.self_attn.o_proj.weight[1, 0] += 1
        model.lm_head.weight[YES, 1] += 1
        model.lm_head.weight[NO, 1] -= 1
    return model.eval().requires_grad_(False)


def frame(rows: int, columns: int, *white: tuple[int, int]) -> np.ndarray:
    """A black frame of so many patches, of which those named are white."""
    image = np.zeros((rows * PATCH, columns * PATCH, 3), np.uint8)
    for row, column in white:
        image[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 255
    return image


def prompt(*frames: np.ndarray, video: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """What the processor gives for a prompt with these images, then a video, and a question."""
    ids, inputs = [5], {}
    if frames:
        inputs |= tf.Qwen2VLImageProcessor(size=SIDES)(list(frames), return_tensors="pt")
    if video is not None:
        process = tf.Qwen2VLVideoProcessor(size=SIDES, cap_pixels_per_frame=False)
        inputs |= process([video], return_tensors="pt", do_sample_frames=False)
    for token, name in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
        for grid in inputs.get(name, []):
            ids += [122, *[token] * (int(grid.prod()) // 4), 123]
    ids_BT = torch.tensor([[*ids, 7, 8]])
    types_BT = (ids_BT == IMAGE).int() + 2 * (ids_BT == VIDEO).int()
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "mm_token_type_ids": types_BT, **inputs}


def at(layer: str | int, *patch: int) -> tuple[int, ...]:
    return tuple(index // 2 if layer in MERGED else index for index in patch)


def peak(heat: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.unravel_index(heat.argmax(), heat.shape))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_peak_is_the_patch_that_the_answer_reads(layer):
    model, shape = white_reader(), at(layer, 4, 6)
    for patch in np.ndindex(4, 6):
        (heat,) = grad_cam(model, prompt(frame(4, 6, patch)), [YES], layer=layer)
        assert heat.shape == shape and heat.dtype == np.float32 and (heat >= 0).all()
        assert peak(heat) == at(layer, *patch)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_peak_is_the_patch_whose_change_changes_the_logit_most(layer):
    model, white = white_reader(), [(0, 5), (3, 0), (3, 1)]

    def logit(image: np.ndarray) -> float:
        return float(model(**prompt(image)).logits[0, -1, YES])

    whole = logit(frame(4, 6, *white))
    drop = np.zeros((4, 6))
    for patch in np.ndindex(4, 6):
        image = frame(4, 6, *white)
        image[patch[0] * PATCH : (patch[0] + 1) * PATCH, patch[1] * PATCH : (patch[1] + 1) * PATCH] = 0
        drop[patch] = whole - logit(image)
    (heat,) = grad_cam(model, prompt(frame(4, 6, *white)), [YES], layer=layer)
    if layer in MERGED:
        drop = drop.reshape(2, 2, 3, 2).sum((1, 3))
    hottest = {tuple(at(layer, *patch)) for patch in white}
    assert set(zip(*np.nonzero(drop > 0.1 * drop.max()), strict=True)) == hottest
    order = np.argsort(-heat.ravel())[: len(hottest)]
    assert set(zip(*np.unravel_index(order, heat.shape), strict=True)) == hottest


@pytest.mark.parametrize("layer", LAYERS)
def test_several_images_and_a_video_have_their_maps_in_order(layer):
    video = np.stack([frame(4, 4)] * 4)
    video[2:] = frame(4, 4, (3, 1))
    inputs = prompt(frame(4, 6), frame(6, 4, (4, 3)), video=video)
    maps = grad_cam(white_reader(), inputs, [YES], layer=layer)
    assert [heat.shape for heat in maps] == [at(layer, *grid) for grid in ((4, 6), (6, 4), (4, 4), (4, 4))]
    assert (peak(maps[1]), peak(maps[3])) == (at(layer, 4, 3), at(layer, 3, 1))
    assert max(maps[0].max(), maps[2].max()) < 0.1 * min(maps[1].max(), maps[3].max())


@pytest.mark.parametrize(("family", "layer"), [(name, layer) for name in ("qwen2_vl", "qwen3_vl") for layer in LAYERS])
@pytest.mark.parametrize("positions", [None, [2], [0, 2]])
def test_maps_are_those_of_a_plain_backward_in_float64(family, layer, positions):
    """Through unfrozen weights and full logits, with the processor's order of patches written out."""
    model, answer = zoo.build(family).double().eval(), torch.tensor([31, YES, 77])
    inputs = prompt(noise(4, 6), noise(6, 4))
    kept = []
    handle = module_of(model, layer).register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(**with_answer(inputs, answer)).logits[0, inputs["input_ids"].shape[1] - 1 :]
    handle.remove()
    score = sum(logits[j, answer[j]] for j in (positions or range(3)))
    (grad,) = torch.autograd.grad(score, kept)
    act, grad = (
        each[0, inputs["input_ids"][0].eq(IMAGE).nonzero()[:, 0]] if layer == 0 else each for each in (kept[0], grad)
    )
    cams = [(a * g.mean(0)).sum(-1).detach().numpy() for a, g in zip(act.chunk(2), grad.chunk(2), strict=True)]
    if max(cam.max() for cam in cams) <= 0:  # maps of noughts prove nothing
        cams, model.lm_head.weight = [-cam for cam in cams], nn.Parameter(-model.lm_head.weight)
    maps = grad_cam(model.requires_grad_(False), inputs, answer, positions, layer=layer)
    for heat, cam, (rows, columns) in zip(maps, cams, [(4, 6), (6, 4)], strict=True):
        corners = [(row, column) for row in range(0, rows, 2) for column in range(0, columns, 2)]
        inner = [(0, 0)] if layer in MERGED else [(0, 0), (0, 1), (1, 0), (1, 1)]
        order = [at(layer, row + i, column + j) for row, column in corners for i, j in inner]
        found = [heat[patch] for patch in order]
        np.testing.assert_allclose(found, np.maximum(cam, 0), rtol=1e-4, atol=1e-6 * np.abs(cam).max())
    assert max(heat.max() for heat in maps) > 0


def module_of(model: nn.Module, layer: str | int) -> nn.Module:
    parts = {"merger": "visual.merger", 0: "language_model.layers.0"}
    return model.get_submodule(
        f"model.{parts.get(layer) or str(layer).replace('vision', 'visual.blocks').replace('-1', '1')}"
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_captum_agrees(layer):
    attr = pytest.importorskip("captum.attr")
    model, inputs = zoo.build("qwen2_vl").eval(), prompt(noise(4, 6))
    (heat,) = grad_cam(model, inputs, [YES], layer=layer)
    module = module_of(model, layer)
    probe = Probe(module, slice(2, 8) if layer == 0 else None)
    model.set_submodule(next(name for name, other in model.named_modules() if other is module), probe)

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return model(**{**inputs, "pixel_values": pixels}).logits[:, -1]

    found = attr.LayerGradCam(logits, probe.channels).attribute(inputs["pixel_values"], YES, relu_attributions=True)
    found = found.detach().numpy().ravel()
    if layer not in MERGED:
        found = found.reshape(2, 3, 2, 2).swapaxes(1, 2)
    np.testing.assert_allclose(heat, found.reshape(heat.shape), rtol=1e-3, atol=1e-4 * heat.max())


class Channels(nn.Module):
    """(N, D) to (1, D, N): captum wants the channels second."""

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        return rows_ND.T[None]


class Probe(nn.Module):
    """A module whose output passes `channels` on its way."""

    def __init__(self, inner: nn.Module, tokens: slice | None):
        super().__init__()
        self.inner, self.tokens, self.channels = inner, tokens, Channels()

    def forward(self, *args, **kwargs) -> torch.Tensor:
        output = self.inner(*args, **kwargs)
        if self.tokens is None:
            return self.channels(output)[0].T
        before, after = output[:, : self.tokens.start], output[:, self.tokens.stop :]
        return torch.cat([before, self.channels(output[0, self.tokens]).mT, after], dim=1)


def injected(model: nn.Module) -> nn.Module:
    return inject_dual_path_moe(model, num_experts=4, top_k=2, expert_dim=8, shared_expert_dim=8)


def wrapped(model: nn.Module, **options) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("layer", [*LAYERS, "layers.0.post_attention_layernorm", "visual.merger.ln_q"])
@pytest.mark.parametrize("change", [injected, wrapped, lambda model: wrapped(injected(model)), nn.Module.bfloat16])
def test_injected_wrapped_frozen_and_half_models(change, layer):
    inputs = prompt(frame(4, 6, (2, 5)))
    (expected,) = grad_cam(white_reader(), inputs, [YES], layer=layer)
    model = change(white_reader()).requires_grad_(False).train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch.inference_mode():
        (heat,) = grad_cam(model, inputs, [YES], layer=layer)
    half = next(model.parameters()).dtype == torch.bfloat16
    np.testing.assert_allclose(heat, expected, atol=(0.1 if half else 1e-5) * expected.max())
    assert peak(heat) == peak(expected) and expected.max() > 0
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off():
    model = wrapped(white_reader(), lora_dropout=0.9, init_lora_weights=False)
    maps = [grad_cam(model.train(mode), prompt(frame(4, 6, (2, 5))), [YES])[0] for mode in (False, True)]
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize("layer", LAYERS)
def test_generate_and_grad_cam_leave_each_other_alone(layer):
    model, inputs = white_reader(), prompt(frame(4, 6, (1, 2)))
    (before,) = grad_cam(model, inputs, [YES, NO], layer=layer)
    answers = []
    for _ in range(2):
        answers.append(model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist())
        np.testing.assert_array_equal(grad_cam(model, inputs, [YES, NO], layer=layer)[0], before)
    assert answers[0] == answers[1]


def test_experts_and_routers_carry_the_gradient(vlm, image_batch):
    """Trained dual-path layers: their maps differ from those of the static path alone."""
    batch = image_batch("right")
    inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    inputs |= {"image_grid_thw": batch["image_grid_thw"][:2], "pixel_values": batch["pixel_values"][:40]}
    maps = grad_cam(vlm, inputs, [YES])
    assert [heat.shape for heat in maps] == [(2, 2), (2, 3)]
    with intervene(vlm, StaticOnly()):
        static = grad_cam(vlm, inputs, [YES])
    largest = max(heat.max() for heat in maps)
    assert max(np.abs(heat - other).max() for heat, other in zip(maps, static, strict=True)) > 0.01 * largest > 0


ERRORS = {
    "no such block": (dict(layer=2), "language model has blocks 0 to 1, not block 2"),
    "no such vision block": (dict(layer="vision.5"), "vision tower has blocks 0 to 1, not block 5"),
    "no such module": (dict(layer="visual.mergr"), "no module; the nearest names are model.visual.merger"),
    "many modules": (dict(layer="mlp"), r"5 modules, model\.visual\.blocks\.0\.mlp, .*name one"),
    "the last block": (dict(layer=-1), r"layers\.1 reaches the chosen tokens: name an earlier layer"),
    "no tensor": (dict(layer="model.visual"), "gives no tensor; name a module inside it"),
    "no grid": (dict(layer="lm_head"), "lm_head gave 1 vectors for 24 patches, which make 6 tokens"),
    "no call": (dict(layer="model.language_model.layers"), "gave 0 vectors for 24 patches"),
    "past the answer": (dict(positions=[1]), r"positions \[1\] of an answer of 1 tokens"),
    "before the answer": (dict(positions=[-1]), r"positions \[-1\] of an answer of 1 tokens"),
    "no position": (dict(positions=[]), r"positions \[\] of an answer of 1 tokens"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, message = ERRORS[name]
    with pytest.raises(MoEAdapterError, match=message):
        grad_cam(white_reader(), prompt(frame(4, 6)), [YES], **options)


def test_inputs_that_have_no_map(image_batch):
    text = {name: value for name, value in prompt(frame(4, 6)).items() if "_" not in name or name == "input_ids"}
    with pytest.raises(MoEAdapterError, match="no image: got input_ids, expected image_grid_thw"):
        grad_cam(white_reader(), text, [YES])
    with pytest.raises(MoEAdapterError, match="a batch of 2 cases; give one at a time"):
        grad_cam(white_reader(), image_batch("left"), [YES])
    with pytest.raises(MoEAdapterError, match="LlamaForCausalLM has no vision tower"):
        grad_cam(zoo.build("llama"), prompt(frame(4, 6)), [YES])
    windows = zoo.build("qwen2_5_vl")
    with pytest.raises(MoEAdapterError, match="sorts patches by window"):
        grad_cam(windows, prompt(frame(4, 6)), [YES])
    assert grad_cam(windows, prompt(frame(4, 6)), [YES], layer=0)[0].shape == (2, 3)


ANSWER = "甲状腺左叶见低回声结节，a hypoechoic nodule with a smooth margin; nodule benign."


@pytest.mark.parametrize("phrase", ["低回声", "hypoechoic nodule", "smooth", "结节，a", ANSWER, "甲", "."])
@pytest.mark.parametrize("vocab_size", [280, 400])
def test_a_phrase_is_found_in_any_script(phrase, vocab_size):
    tokenizer = train_tokenizer([ANSWER] * 20, vocab_size)
    ids = tokenizer(ANSWER)["input_ids"]
    positions = find_phrase(tokenizer, torch.tensor(ids), phrase)
    assert positions == list(range(positions[0], positions[-1] + 1))
    assert phrase in tokenizer.decode(ids[positions[0] : positions[-1] + 1])
    assert phrase not in tokenizer.decode(ids[positions[0] + 1 : positions[-1] + 1])
    assert phrase not in tokenizer.decode(ids[: positions[-1]])


@pytest.mark.parametrize("phrase", ["a long answer with many words " * 12, "甲状腺左叶可见一圆形无回声囊肿，" * 12])
@pytest.mark.filterwarnings("ignore:no installed font", "ignore:Glyph")
def test_a_long_phrase_stays_within_the_figure(phrase):
    figure = gradcam_figure([np.zeros((8, 8, 3))], [np.ones((2, 2))], phrase=phrase)
    figure.draw_without_rendering()
    [below] = [text for text in figure.texts if text.get_text()]
    box = below.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and len(below.get_text().splitlines()) > 2
    assert below.get_text().replace("\n", "").replace(" ", "") == f"for“{phrase}”".replace(" ", "")


@pytest.mark.parametrize("phrase", ["cyst", ""])
def test_a_phrase_that_the_answer_lacks(phrase):
    tokenizer = train_tokenizer([ANSWER] * 20, 400)
    with pytest.raises(MoEAdapterError, match=f"no phrase '{phrase}'.*written there: '甲状腺.*benign"):
        find_phrase(tokenizer, tokenizer(ANSWER)["input_ids"], phrase)


@pytest.mark.filterwarnings("ignore:no installed font", "ignore:Glyph")
def test_the_figure_shows_maps_on_one_scale_and_boxes():
    frames = [frame(4, 6, (0, 1)), frame(6, 4)]
    maps = [np.array([[4.0, 1, 0], [0, 0, 0]], np.float32), np.full((3, 2), 2, np.float32)]
    boxes = {"病灶": [[(10, 5, 40, 25)], []], "model": [[(12, 6, 42, 28)], [(1, 2, 3, 5)]]}
    figure = gradcam_figure(frames, maps, phrase="nodule", boxes=boxes)
    titles = ["(a) frame 1", "(b) frame 1, Grad-CAM", "(c) frame 2", "(d) frame 2, Grad-CAM"]
    assert [ax.get_title("left") for ax in figure.axes[:4]] == titles
    assert figure.get_supxlabel() == "for “nodule”"
    heats = [figure.axes[index].images[1] for index in (1, 3)]
    for heat, given, shown in zip(heats, maps, frames, strict=True):
        np.testing.assert_allclose(heat.get_array(), given / 4)
        assert heat.get_clim() == (0, 1) and tuple(heat.get_extent()) == (0, shown.shape[1], shown.shape[0], 0)
    assert [len(ax.images) for ax in figure.axes[:4]] == [1, 2, 1, 2]
    drawn = [[patch.get_bbox().extents.tolist() for patch in ax.patches] for ax in figure.axes[:4]]
    assert drawn == [[[10, 5, 40, 25], [12, 6, 42, 28]]] * 2 + [[[1, 2, 3, 5]]] * 2
    red, blue = figure.axes[0].patches
    assert red.get_edgecolor()[0] > 0.8 > 0.4 > red.get_edgecolor()[2] and blue.get_edgecolor()[2] > 0.8
    assert red.get_linestyle() != blue.get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(boxes)


def test_a_figure_of_maps_that_are_nought(tmp_path):
    figure = gradcam_figure([frame(4, 4)], [np.zeros((2, 2), np.float32)], width_mm=style.SINGLE_COLUMN_MM)
    (png,) = style.save_figure(figure, tmp_path / "figure", ["png"])
    assert png.stat().st_size > 1000 and not figure.legends


@pytest.mark.parametrize(
    ("maps", "boxes", "message"),
    [
        (2, {}, "got 1 frames, 2 maps"),
        (1, {"lesion": []}, "got 1 frames, 1 maps, 0 lists of boxes 'lesion'"),
        (1, {kind: [[]] for kind in "abc"}, "boxes of 3 kinds, a, b, c; give two at most"),
    ],
)
def test_a_figure_of_unlike_numbers(maps, boxes, message):
    with pytest.raises(MoEAdapterError, match=message):
        gradcam_figure([frame(4, 4)], [np.zeros((2, 2))] * maps, boxes=boxes)


def noise(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows * PATCH, columns * PATCH, 3), np.uint8)


def with_answer(inputs: dict[str, torch.Tensor], answer: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.cat([inputs["input_ids"], answer[None]], dim=1)
    types = (ids == IMAGE).int()
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
