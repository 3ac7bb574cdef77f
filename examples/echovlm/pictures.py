"""General image-text pairs for the base model: a shape on a grainy ground, seen in one or two pictures.

Nothing here comes from ultrasound: the pictures teach position, size, tone, outline and what lies below a shape, the
words for them in English and Chinese, and that two pictures can show the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.echovlm.tasks import Example

TONES = {
    "black": ("黑", (15, 15, 15)),
    "grey": ("灰", (110, 110, 110)),
    "white": ("白", (235, 235, 235)),
    "red": ("红", (210, 40, 40)),
    "blue": ("蓝", (45, 70, 215)),
}
KINDS = {"disc": "圆", "oval": "椭圆", "blob": "斑块"}
ROWS = {"upper": "上", "lower": "下"}
COLUMNS = {"left": "左", "centre": "中", "right": "右"}
BELOW = {"nothing": ("无", 1.0), "shade": ("暗", 0.35), "glow": ("亮", 1.7)}  # factor on the ground's brightness
WIDTHS = (15, 30, 50)  # per cent of the picture's width
GROUNDS = (60, 110, 170)  # grey levels
CELL = 28  # pixels a side of what one visual token sees: 2 × 2 patches of 14
# What a cell is told apart by: its own place, and the properties of what covers it (0: nothing does).
LABEL_CLASSES = {
    "row": 16,
    "column": 16,
    "tone": 1 + len(TONES),
    "kind": 1 + len(KINDS),
    "width": 1 + len(WIDTHS),
    "below": 1 + len(BELOW),
}
EMPTY_SHARE, QUESTION_SHARE, CHINESE_SHARE, PAIR_SHARE = 0.12, 0.2, 1 / 3, 0.7


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the pictures of an example show; each field is a word of the description."""

    kind: str
    tone: str
    row: str
    column: str
    width: int
    below: str

    def describe(self, language: str) -> str:
        if language == "zh":
            place = COLUMNS[self.column] + ROWS[self.row]
            return f"{place}{TONES[self.tone][0]}{KINDS[self.kind]}，宽{self.width}，下{BELOW[self.below][0]}。"
        return f"{self.column} {self.row} {self.tone} {self.kind}, width {self.width}, {self.below} below."


def picture_example(index: int, side: int, seed: int) -> Example:
    """The `index`-th example of an endless, reproducible series: one or two pictures, described or asked about."""
    rng = np.random.default_rng((seed, index))
    language = "zh" if rng.random() < CHINESE_SHARE else "en"
    shape, ground = _draw_scene(rng)
    pictures = 2 if rng.random() < PAIR_SHARE else 1
    images = tuple(_render(shape, ground, side, rng)[0] for _ in range(pictures))
    prompt, answer = _task(shape, language, rng)
    return Example(prompt=prompt, answer=answer, images=images)


def labelled_picture(index: int, side: int, seed: int) -> tuple[Image.Image, np.ndarray]:
    """The `index`-th picture of another such series, and its cells' labels (C, L), cells row by row, LABEL_CLASSES."""
    rng = np.random.default_rng((seed, 1, index))
    shape, ground = _draw_scene(rng)
    image, cover, beam = _render(shape, ground, side, rng)
    cells = side // CELL
    labels = np.zeros((cells, cells, len(LABEL_CLASSES)), np.int64)
    labels[..., 0], labels[..., 1] = np.mgrid[0:cells, 0:cells]
    if shape is not None:
        covered = _share_of_cells(cover, cells)
        values = (list(TONES).index(shape.tone), list(KINDS).index(shape.kind), WIDTHS.index(shape.width))
        labels[(covered > 0.12) | (covered == covered.max()), 2:5] = np.array(values) + 1
        labels[_share_of_cells(beam & (cover < 0.5), cells) > 0.2, 5] = list(BELOW).index(shape.below) + 1
    return image, labels.reshape(cells * cells, -1)


def _share_of_cells(mask: np.ndarray, cells: int) -> np.ndarray:
    return mask.reshape(cells, CELL, cells, CELL).mean(axis=(1, 3))


def _task(shape: Shape | None, language: str, rng: np.random.Generator) -> tuple[str, str]:
    """Prompt and answer: describe what is shown, or tell one property of the shape."""
    zh = language == "zh"
    if shape is None:
        return ("描述图像。", "无。") if zh else ("Describe the picture.", "nothing.")
    questions = {
        "How wide is it?": (f"{shape.width}", "多宽？", f"{shape.width}"),
        "Which tone has it?": (shape.tone, "什么颜色？", TONES[shape.tone][0]),
        "On which side is it?": (shape.column, "在哪一侧？", COLUMNS[shape.column]),
    }
    if rng.random() < QUESTION_SHARE:
        question = str(rng.choice(list(questions)))
        answer, question_zh, answer_zh = questions[question]
        return (question_zh, answer_zh) if zh else (question, answer)
    return "描述图像。" if zh else "Describe the picture.", shape.describe(language)


def _draw_scene(rng: np.random.Generator) -> tuple[Shape | None, int]:
    """A shape, or none, and a ground of another grey."""
    shape = None if rng.random() < EMPTY_SHARE else _draw_shape(rng)
    levels = [level for level in GROUNDS if shape is None or level != TONES[shape.tone][1][0]]
    return shape, int(rng.choice(levels))


def _draw_shape(rng: np.random.Generator) -> Shape:
    return Shape(
        kind=str(rng.choice(list(KINDS))),
        tone=str(rng.choice(list(TONES))),
        row=str(rng.choice(list(ROWS))),
        column=str(rng.choice(list(COLUMNS))),
        width=int(rng.choice(WIDTHS)),
        below=str(rng.choice(list(BELOW))),
    )


def _render(
    shape: Shape | None, ground: int, side: int, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """The shape on its ground as an RGB image, side × side pixels; what it covers (0 to 1), and what lies below it."""
    canvas = np.full((side, side, 3), ground, np.float32)
    cover, beam = np.zeros((side, side), np.float32), np.zeros((side, side), bool)
    if shape is not None:
        cover, beam = _place(shape, side, rng)
        canvas[beam] *= BELOW[shape.below][1]
        canvas += cover[..., None] * (np.asarray(TONES[shape.tone][1], np.float32) - canvas)
    canvas *= _grain(side, rng)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), cover, beam


def _grain(side: int, rng: np.random.Generator) -> np.ndarray:
    """Multiplicative noise of a random coarseness, mean about 1."""
    rows, columns = (side // rng.integers(1, 5, 2)).tolist()
    noise = Image.fromarray(rng.rayleigh(0.8, (rows, columns)).astype(np.float32))
    return np.asarray(noise.resize((side, side), Image.Resampling.BILINEAR))[..., None]


def _place(shape: Shape, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cover and beam of the shape at a random place within its cell of the rows and columns."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    centre_x = (list(COLUMNS).index(shape.column) + rng.uniform(0.35, 0.65)) / len(COLUMNS)
    centre_y = (list(ROWS).index(shape.row) + rng.uniform(0.3, 0.7)) / len(ROWS)
    dx, dy = ((axis - centre) * 200 / shape.width for axis, centre in ((x, centre_x), (y, centre_y)))
    cover = np.clip(-_outside(shape.kind, dx, dy, rng) / 0.1 + 0.5, 0, 1)
    return cover, (np.abs(dx) < 0.8) & (dy > 0)


def _outside(kind: str, dx: np.ndarray, dy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distance to the shape's outline in radii, negative inside."""
    distance = np.hypot(dx, dy / 0.6 if kind == "oval" else dy) - 1
    if kind == "blob":
        return distance + 0.25 * np.sin(rng.integers(4, 7) * np.arctan2(dy, dx) + rng.uniform(0, 6))
    return distance
