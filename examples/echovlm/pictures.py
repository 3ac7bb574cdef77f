"""General image-text pairs for the base model: shapes on plain or textured grounds, described in words.

Nothing here comes from ultrasound: the pictures teach position, size, tone, texture and edge, the
words for them in English and Chinese, and that two pictures can stand in one question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.echovlm.tasks import Example

TONES = {
    "black": ("黑色", (12, 12, 12)),
    "dark": ("深灰", (70, 70, 70)),
    "grey": ("灰色", (125, 125, 125)),
    "light": ("浅灰", (180, 180, 180)),
    "white": ("白色", (240, 240, 240)),
    "red": ("红色", (210, 40, 40)),
    "blue": ("蓝色", (45, 70, 215)),
}
KINDS = {"disc": "圆", "oval": "椭圆", "blob": "斑块", "ring": "环", "bar": "横条"}
GROUNDS = {"smooth": "平滑", "grainy": "颗粒", "striped": "条纹"}
ROWS = {"upper": "上", "middle": "中", "lower": "下"}
COLUMNS = {"left": "左", "centre": "中", "right": "右"}
BELOW = {"nothing": "无", "shade": "暗带", "glow": "亮带"}
WIDTHS = (15, 20, 30, 40, 50)  # percent of the picture's width
FLATNESS = {"oval": 0.6, "bar": 0.25}  # height over width
GREYS = ("black", "dark", "grey", "light", "white")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of a picture; each field is a word that the description uses."""

    kind: str
    tone: str
    row: str
    column: str
    width: int
    below: str

    def describe(self, language: str) -> str:
        if language == "zh":
            below = "" if self.below == "nothing" else f",下有{BELOW[self.below]}"
            place = COLUMNS[self.column] + ROWS[self.row]
            return f"{place}{TONES[self.tone][0]}{KINDS[self.kind]},宽{self.width}{below}"
        below = "" if self.below == "nothing" else f", {self.below} below"
        return f"{self.row} {self.column} {self.tone} {self.kind}, width {self.width}{below}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A ground and up to two shapes on it."""

    ground: str
    tone: str
    shapes: tuple[Shape, ...]

    def describe(self, language: str) -> str:
        if language == "zh":
            ground = f"{TONES[self.tone][0]}{GROUNDS[self.ground]}背景"
            return ";".join([ground, *(shape.describe("zh") for shape in self.shapes)]) + "。"
        ground = f"{self.tone} {self.ground} ground"
        return "; ".join([ground, *(shape.describe("en") for shape in self.shapes)]) + "."


def picture_example(index: int, side: int, seed: int) -> Example:
    """The `index`-th example of an endless, reproducible series: one or two pictures, described or asked about."""
    rng = np.random.default_rng((seed, index))
    language = "zh" if rng.random() < 1 / 3 else "en"
    scenes = [draw_scene(rng) for _ in range(2 if rng.random() < 0.5 else 1)]
    images = tuple(render(scene, side, rng) for scene in scenes)
    prompt, answer = _task(scenes, language, rng)
    return Example(prompt=prompt, answer=answer, images=images)


def _task(scenes: list[Scene], language: str, rng: np.random.Generator) -> tuple[str, str]:
    """Prompt and answer: describe every picture, or tell one property of the first shape."""
    asked = scenes[0].shapes[0] if scenes[0].shapes and rng.random() < 0.3 else None
    if asked is None:
        lines = [scene.describe(language) for scene in scenes]
        return {"en": "Describe what is shown.", "zh": "描述所示内容。"}[language], "\n".join(lines)
    if rng.random() < 0.5:
        words = {"en": f"{asked.width}", "zh": f"{asked.width}"}
        questions = {"en": "How wide is the first shape?", "zh": "第一个形状多宽?"}
    else:
        words = {"en": f"{asked.tone}", "zh": TONES[asked.tone][0]}
        questions = {"en": "Which tone has the first shape?", "zh": "第一个形状是什么颜色?"}
    return questions[language], words[language]


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene; two shapes never share a place, and a shape never has the tone of its ground."""
    tone = str(rng.choice(GREYS))
    places = sorted(rng.permutation(9)[: rng.choice(3, p=(0.1, 0.6, 0.3))])
    shapes = tuple(_draw_shape(int(place), tone, rng) for place in places)
    return Scene(ground=str(rng.choice(list(GROUNDS))), tone=tone, shapes=shapes)


def _draw_shape(place: int, ground_tone: str, rng: np.random.Generator) -> Shape:
    return Shape(
        kind=str(rng.choice(list(KINDS))),
        tone=str(rng.choice([tone for tone in TONES if tone != ground_tone])),
        row=list(ROWS)[place // 3],
        column=list(COLUMNS)[place % 3],
        width=int(rng.choice(WIDTHS)),
        below=str(rng.choice(list(BELOW), p=(0.6, 0.2, 0.2))),
    )


def render(scene: Scene, side: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB image of side × side pixels."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = TONES[scene.tone][1]
    if scene.ground == "striped":
        canvas *= 1 + 0.25 * np.sin(40 * (y * rng.uniform(0.5, 1) + x * rng.uniform(-0.5, 0.5)))[..., None]
    for shape in scene.shapes:
        _paint(canvas, shape, x, y, rng)
    if scene.ground == "grainy":
        canvas *= _grain(side, rng)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def _grain(side: int, rng: np.random.Generator) -> np.ndarray:
    """Multiplicative noise of a random coarseness, mean about 1."""
    rows, columns = (side // rng.integers(1, 5, 2)).tolist()
    noise = Image.fromarray(rng.rayleigh(0.8, (rows, columns)).astype(np.float32))
    return np.asarray(noise.resize((side, side), Image.Resampling.BILINEAR))[..., None]


def _paint(canvas: np.ndarray, shape: Shape, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> None:
    centre_x = (list(COLUMNS).index(shape.column) + rng.uniform(0.3, 0.7)) / 3
    centre_y = (list(ROWS).index(shape.row) + rng.uniform(0.3, 0.7)) / 3
    radius = shape.width / 200
    dx, dy = (x - centre_x) / radius, (y - centre_y) / (radius * FLATNESS.get(shape.kind, 1))
    cover = np.clip(-_outside(shape.kind, dx, dy, rng) / rng.uniform(0.05, 0.4) + 0.5, 0, 1)[..., None]
    if shape.below != "nothing":
        beam = (np.abs(dx) < 0.8) & (dy > 0)
        canvas[beam] *= 0.35 if shape.below == "shade" else 1.7
    canvas[:] = canvas * (1 - cover) + np.asarray(TONES[shape.tone][1], np.float32) * cover


def _outside(kind: str, dx: np.ndarray, dy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distance to the shape's outline in radii, negative inside."""
    if kind == "bar":
        return np.maximum(np.abs(dx), np.abs(dy)) - 1
    distance = np.hypot(dx, dy) - 1
    if kind == "ring":
        return np.abs(distance + 0.2) - 0.2
    if kind == "blob":
        return distance + 0.25 * np.sin(rng.integers(4, 7) * np.arctan2(dy, dx) + rng.uniform(0, 6))
    return distance
