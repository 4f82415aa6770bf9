"""A small detection set made from nothing: shapes on cluttered backgrounds, in the YOLO folder format.

It serves the quickstart and the tests, where there is neither data nor a network. It is meant to be learnt
in minutes but not by a trick: shapes are more colourful than what is behind them, and only the outline
tells the class. Colour, fill, size, place, rotation and background are drawn independently of it, shapes
overlap and leave the frame, and lines, arcs and dots without a label lie between. Knows the file format and
nothing of the training that reads it.
"""

from __future__ import annotations

import colorsys
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("disc", "rectangle", "triangle", "ring", "cross")
#: Share of a shape that must be in view. A placement that would leave less of any shape is not made, so that
#: no image holds a recognisable piece without a label.
MIN_SHOWN = 0.3
FORMAT_VERSION = 1

_Array = NDArray[np.float32]
_SPLITS = ("train", "val")


def make_detection_set(folder: Path, *, images_train: int, images_val: int, imgsz: int, seed: int) -> Path:
    """Write a detection set and return the path of its `data.yaml`.

    The layout is `images/{train,val}/NNNNN.jpg` with `labels/{train,val}/NNNNN.txt`; a label line is
    `class x y width height`, the visible extent relative to the image. Image i of a split depends on the
    seed, the split and i alone, so a larger set begins with the smaller one, and the splits share no random
    numbers. The set appears at once, when it is complete; the same call again finds it and does nothing.

    Args:
        folder: to be made; may be there when empty, or when it holds the very set asked for.
        images_train, images_val: number of images, at least 1.
        imgsz: width and height in pixels, at least 32.
        seed: at least 0.

    Raises:
        ValueError: a number is out of range, or `folder` holds something else.
    """
    numbers = {"images_train": images_train, "images_val": images_val, "imgsz": imgsz, "seed": seed}
    for name, value in numbers.items():
        least = {"imgsz": 32, "seed": 0}.get(name, 1)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    folder = Path(folder)
    recipe = {"format_version": FORMAT_VERSION, **numbers}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if _recipe_of(folder) == recipe:
            return folder / "data.yaml"
        raise ValueError(
            f"{folder} must be absent, empty or hold the same synthetic set, but holds something else; "
            "name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for stream, (split, images) in enumerate(zip(_SPLITS, (images_train, images_val), strict=True)):
            for kind in ("images", "labels"):
                (scratch / kind / split).mkdir(parents=True)
            for index in range(images):
                pixels, labels = draw_image(imgsz, np.random.default_rng([seed, stream, index]))
                Image.fromarray(pixels).save(scratch / "images" / split / f"{index:05d}.jpg", quality=92)
                lines = (f"{int(c)} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in labels)
                (scratch / "labels" / split / f"{index:05d}.txt").write_text("".join(lines))
        (scratch / "synthetic.json").write_text(json.dumps(recipe, indent=1) + "\n")
        (scratch / "data.yaml").write_text(_yaml())
        # mkdtemp makes a folder that only its owner reads.
        scratch.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder / "data.yaml"


def draw_image(imgsz: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """One image with its labels.

    Returns:
        Pixels `(imgsz, imgsz, 3)` RGB, and labels `(shapes, 5)`: class, centre x, centre y, width, height,
        the last four relative to the image.
    """
    canvas = _clutter(_background(imgsz, rng), rng)
    owner = np.full((imgsz, imgsz), -1, dtype=np.int16)
    areas: list[int] = []
    kinds: list[int] = []
    for _ in range(int(rng.integers(1, 7))):
        kind = int(rng.integers(len(CLASSES)))
        for _attempt in range(8):
            alpha, top, left = _shape(CLASSES[kind], imgsz, rng)
            if _place(owner, alpha > 0.5, top, left, areas):
                _paint(canvas, alpha, top, left, rng)
                kinds.append(kind)
                break
    pixels = _camera(canvas, rng)
    return pixels, _labels(owner, kinds)


def _yaml() -> str:
    # No `path:` key: Ultralytics takes it relative to a global folder; without it, paths are relative to this
    # file.
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    return f"# Made as synthetic.json says.\ntrain: images/train\nval: images/val\nnames:\n{names}"


def _recipe_of(folder: Path) -> object:
    try:
        return json.loads((folder / "synthetic.json").read_text())
    except (OSError, ValueError):
        return None


def _muted(rng: np.random.Generator) -> _Array:
    """A colour for backgrounds: near grey, so that a shape is something to find and not one patch of many."""
    return (rng.uniform(40, 200) + rng.uniform(-25, 25, 3)).astype(np.float32)


def _vivid(rng: np.random.Generator) -> _Array:
    """A colour for shapes, of any hue."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.6, 1.0), rng.uniform(0.6, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255


def _colour(rng: np.random.Generator) -> _Array:
    """Any colour, for what is neither."""
    return rng.uniform(10, 245, 3).astype(np.float32)


def _smooth_noise(size: int, cells: int, rng: np.random.Generator) -> _Array:
    """Random values `(size, size)` in about [-1, 1] that change over `size / cells` pixels."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _background(size: int, rng: np.random.Generator) -> _Array:
    """`(size, size, 3)`, one of gradient, clouds, stripes, checks, with some texture over it."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    frequency = rng.uniform(2, 12)
    kind = int(rng.integers(4))
    if kind == 0:
        mix = along
    elif kind == 1:
        octaves = [_smooth_noise(size, 2**octave + 1, rng) / octave for octave in range(1, 5)]
        mix = np.sum(octaves, axis=0)
    elif kind == 2:
        mix = 0.5 + 0.35 * np.sin(2 * np.pi * frequency * along)
    else:
        mix = 0.5 + 0.3 * np.sign(np.sin(np.pi * frequency * along) * np.sin(np.pi * frequency * across))
    first = _muted(rng)
    # A limited distance keeps the pattern a background: shapes have to be findable on most of it.
    second = np.clip(first + rng.uniform(-60, 60) + rng.uniform(-15, 15, 3), 0, 255).astype(np.float32)
    canvas = first + np.clip(mix, -0.5, 1.5)[..., None] * (second - first)
    grain = _smooth_noise(size, max(4, size // int(rng.integers(3, 12))), rng)
    return np.asarray(canvas + rng.uniform(0, 14) * grain[..., None], dtype=np.float32)


def _clutter(canvas: _Array, rng: np.random.Generator) -> _Array:
    """Lines, arcs and dots that carry no label. They are thin or tiny, never a shape of a class."""
    size = len(canvas)
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 7))):
        ink = tuple(int(v) for v in _colour(rng))
        ends = [float(v) for v in rng.uniform(-0.2, 1.2, 4) * size]
        pen.line(ends, fill=ink, width=int(rng.integers(1, max(2, size // 50) + 1)))
    for _ in range(int(rng.integers(0, 3))):
        ink = tuple(int(v) for v in _colour(rng))
        cx, cy = rng.uniform(0, size, 2)
        radius, start = rng.uniform(0.1, 0.5) * size, rng.uniform(0, 360)
        box = [float(v) for v in (cx - radius, cy - radius, cx + radius, cy + radius)]
        width = int(rng.integers(1, max(2, size // 60) + 1))
        pen.arc(box, start, start + rng.uniform(20, 100), fill=ink, width=width)
    for x, y in rng.uniform(0, size, (int(rng.integers(0, 25)), 2)):
        ink = tuple(int(v) for v in _colour(rng))
        pen.point([float(x), float(y)], fill=ink)
    return np.asarray(picture, dtype=np.float32).copy()


def _shape(name: str, imgsz: int, rng: np.random.Generator) -> tuple[_Array, int, int]:
    """A whole shape: coverage `(window, window)` in [0, 1], and its window's first row and column."""
    radius = imgsz * float(np.exp(rng.uniform(np.log(0.07), np.log(0.26))))
    centre_x, centre_y = rng.uniform(0.02, 0.98, 2) * imgsz
    half = int(np.ceil(radius * 1.1)) + 1
    left, top = int(np.floor(centre_x)) - half, int(np.floor(centre_y)) - half
    rows, columns = np.mgrid[0 : 2 * half + 1, 0 : 2 * half + 1].astype(np.float32)
    x, y = columns + left - centre_x, rows + top - centre_y
    angle = rng.uniform(0, 2 * np.pi)
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    aspect = rng.uniform(0.45, 0.95) if name == "rectangle" else rng.uniform(0.8, 1.0)
    y = y / aspect
    # Below, `distance` is about the distance to the outline in pixels, negative inside.
    if name == "disc":
        distance = np.hypot(x, y) - radius
    elif name == "ring":
        outer = np.hypot(x, y)
        distance = np.maximum(outer - radius, radius * rng.uniform(0.5, 0.7) - outer)
    elif name == "rectangle":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius * 0.75
    elif name == "triangle":
        sides = [x * np.cos(turn) + y * np.sin(turn) for turn in np.pi / 3 * np.array([1, 3, 5])]
        distance = np.maximum.reduce(sides) - radius * 0.55
    elif name == "cross":
        arm = radius * rng.uniform(0.22, 0.36)
        across = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        along = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        distance = np.minimum(across, along)
    else:
        raise ValueError(f"shape must be one of {', '.join(CLASSES)}, got {name!r}")
    return np.clip(0.5 - distance, 0, 1).astype(np.float32), top, left


def _place(owner: NDArray[np.int16], mask: NDArray[np.bool_], top: int, left: int, areas: list[int]) -> bool:
    """Lay a shape over `owner`, unless that hides too much of any; says whether it did.

    `owner` holds the index of the shape that shows at each pixel, -1 for none; `areas` the whole area of each
    shape.
    """
    window = owner[max(top, 0) : top + len(mask), max(left, 0) : left + len(mask)]
    inside = mask[max(-top, 0) :, max(-left, 0) :][: window.shape[0], : window.shape[1]]
    area = int(mask.sum())
    if inside.sum() < MIN_SHOWN * area:
        return False
    now = np.bincount(owner[owner >= 0], minlength=len(areas))
    covered = window[inside]
    after = now - np.bincount(covered[covered >= 0], minlength=len(areas))
    if np.any(after < MIN_SHOWN * np.array(areas)):
        return False
    window[inside] = len(areas)
    areas.append(area)
    return True


def _paint(canvas: _Array, alpha: _Array, top: int, left: int, rng: np.random.Generator) -> None:
    """Blend the shape into `canvas`: plain, shaded, striped or mottled, in a colour that stands out."""
    rows, columns = slice(max(top, 0), top + len(alpha)), slice(max(left, 0), left + len(alpha))
    window = canvas[rows, columns]
    height, width = window.shape[:2]
    cover = alpha[max(-top, 0) :, max(-left, 0) :][:height, :width, None]
    behind = (window * cover).sum((0, 1)) / max(float(cover.sum()), 1.0)
    colour = _vivid(rng)
    while np.abs(colour - behind).max() < 60:
        colour = _vivid(rng)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / len(alpha)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = int(rng.integers(4))
    if kind == 0:
        shade = np.zeros_like(x)
    elif kind == 1:
        shade = along - 0.5
    elif kind == 2:
        shade = 0.5 * np.sign(np.sin(2 * np.pi * rng.uniform(2, 5) * along))
    else:
        shade = _smooth_noise(len(alpha), 6, rng)[:height, :width]
    window += cover * (colour + rng.uniform(10, 45) * shade[..., None] - window)


def _camera(canvas: _Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Exposure, slight blur and sensor noise; `(imgsz, imgsz, 3)`."""
    picture = Image.fromarray(np.clip(canvas * rng.uniform(0.7, 1.15), 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.8))))
    noise = rng.normal(0, rng.uniform(1, 9), canvas.shape)
    return np.clip(np.asarray(picture, dtype=np.float32) + noise, 0, 255).astype(np.uint8)


def _labels(owner: NDArray[np.int16], kinds: list[int]) -> NDArray[np.float64]:
    """`(shapes, 5)`: class and visible extent of each shape."""
    size = len(owner)
    labels = np.zeros((len(kinds), 5))
    for index, kind in enumerate(kinds):
        rows, columns = np.nonzero(owner == index)
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        labels[index] = kind, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    labels[:, 1:] /= size
    return labels
