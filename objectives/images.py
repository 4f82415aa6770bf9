"""Images with one class each, read from an `.npz` file or a folder of class folders.

Knows files and pixels; nothing of models, normalisation or training.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from .digest import files_digest

#: Decoded images of a split are kept up to this size; a larger split is decoded anew each time.
CACHE_BYTES = 2**30
_FOLDER_SIZE = 224
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """One split of a data set, at one size.

    Attributes:
        labels: `(images,)` int64 class indices.
        size: (height, width) in pixels of every image.
        read: indices `(n,)` to uint8 RGB pixels `(n, 3, height, width)`.
    """

    labels: NDArray[np.int64]
    size: tuple[int, int]
    read: Callable[[NDArray[np.int64]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: a split to train on and one to judge by.

    Attributes:
        train, val: the splits, of one size.
        classes: names, by class index.
        key: sha256 digest of what was read and at which size.
        resize: how an image of another size is brought to this one: "scale" as a whole, or "crop", scaled on
            its shorter side and cut in the centre.
        sources: the files, and folders of files, that were read.
    """

    train: LabelledImages
    val: LabelledImages
    classes: tuple[str, ...]
    key: str
    resize: str
    sources: tuple[Path, ...]


def open_images(path: Path, imgsz: int | None = None) -> ImageData:
    """Open a data set.

    Args:
        path: an `.npz` with `x_train (images, height, width, 3) uint8`, `y_train (images,)`, `x_test` and
            `y_test`, or a folder
            with `train/<class>/*` and `val/<class>/*`.
        imgsz: side in pixels that images are brought to. None: as they are in an `.npz`, 224 for a folder. A
            folder's images are
            scaled on their shorter side, then cut in the centre; an `.npz`'s are scaled as a whole.

    Raises:
        ValueError: neither of the two, or the content breaks these rules.
    """
    if imgsz is not None and imgsz < 1:
        raise ValueError(f"imgsz must be at least 1 pixel, got {imgsz}")
    if path.is_dir():
        return _open_folder(path, imgsz or _FOLDER_SIZE)
    if path.is_file() and path.suffix == ".npz":
        return _open_npz(path, imgsz)
    raise ValueError(
        f"data must be an .npz file or a folder of train/<class>/ and val/<class>/ image folders, got {path}"
        + ("" if path.exists() else ", which does not exist")
    )


def _open_npz(path: Path, imgsz: int | None) -> ImageData:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(
                    f"it lacks {', '.join(missing)}; it has {', '.join(sorted(file)) or 'nothing'}"
                )
            arrays = {name: file[name] for name in names}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data {path} must be an .npz with {', '.join(names)}: {error}") from error
    splits = []
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8 or not x.size:
            raise ValueError(
                f"data {path}: x_{split} must be (images, height, width, 3) uint8, not empty, "
                f"got {x.shape} {x.dtype}"
            )
        if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise ValueError(
                f"data {path}: y_{split} must be ({len(x)},) integers >= 0, got {y.shape} {y.dtype}"
                + (f", smallest {y.min()}" if y.size else "")
            )
        height, width = x.shape[1:3] if imgsz is None else (imgsz, imgsz)
        splits.append(
            LabelledImages(y.astype(np.int64), (int(height), int(width)), _array_reader(x, (height, width)))
        )
    train, val = splits
    if train.size != val.size:
        raise ValueError(
            f"data {path}: x_train and x_test must be one size, got {train.size} and {val.size}; give imgsz"
        )
    digest = hashlib.sha256(repr([train.size, *(arrays[n].shape for n in names)]).encode())
    for name in names:
        digest.update(np.ascontiguousarray(arrays[name]).data)
    count = int(max(train.labels.max(), val.labels.max())) + 1
    classes = tuple(str(i) for i in range(count))
    return ImageData(train, val, classes, digest.hexdigest(), "scale", (path,))


def _array_reader(x: NDArray[np.uint8], size: tuple[int, int]) -> Callable[[NDArray[np.int64]], Tensor]:
    def read(indices: NDArray[np.int64]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(x[indices].transpose(0, 3, 1, 2)))
        if tuple(pixels.shape[2:]) != size:
            scaled = interpolate(
                pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False
            )
            pixels = scaled.round().clamp(0, 255).to(torch.uint8)
        return pixels

    return read


def _open_folder(path: Path, imgsz: int) -> ImageData:
    found: dict[str, list[tuple[Path, int]]] = {}
    classes: list[str] = []
    for split in ("train", "val"):
        folders = sorted(p for p in (path / split).glob("*") if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise ValueError(f"data {path}: {split}/ must hold one folder of images per class, got none")
        if split == "train":
            classes = [p.name for p in folders]
        unknown = sorted({p.name for p in folders} - set(classes))
        if unknown:
            raise ValueError(f"data {path}: val/ has classes that train/ lacks: {', '.join(unknown[:5])}")
        # The numbering is train's: a class that val lacks must not shift the others.
        found[split] = [
            (file, classes.index(folder.name))
            for folder in folders
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in _SUFFIXES
        ]
        if not found[split]:
            raise ValueError(
                f"data {path}: {split}/ must hold images ({', '.join(_SUFFIXES)}) in its class folders, "
                "got none"
            )
    splits = {
        split: LabelledImages(
            np.array([label for _, label in samples], dtype=np.int64),
            (imgsz, imgsz),
            _FileReader([file for file, _ in samples], imgsz),
        )
        for split, samples in found.items()
    }
    files = [file for samples in found.values() for file, _ in samples]
    key = f"{files_digest(files, path)}-{imgsz}"
    folders = [path / "train", path / "val"]  # a class more shows in them, an image more in its class's own
    folders += sorted(p for split in tuple(folders) for p in split.rglob("*") if p.is_dir())
    return ImageData(splits["train"], splits["val"], tuple(classes), key, "crop", tuple(folders))


@dataclass(eq=False)
class _FileReader:
    """Decodes image files; keeps what it decoded where a whole split fits into `CACHE_BYTES`."""

    files: list[Path]
    imgsz: int
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, indices: NDArray[np.int64]) -> Tensor:
        keep = len(self.files) * 3 * self.imgsz**2 <= CACHE_BYTES
        pixels = []
        for index in indices.tolist():
            image = self._kept.get(index)
            if image is None:
                image = self._decode(self.files[index])
                if keep:
                    self._kept[index] = image
            pixels.append(image)
        return torch.stack(pixels)

    def _decode(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as picture:
                rgb = picture.convert("RGB")
        except (OSError, UnidentifiedImageError, ImportError) as error:
            # ImportError: a plugin for a rarer format that another library hooked in and that is not here
            raise ValueError(f"image {file} cannot be read: {error}; remove it or replace it") from error
        scale = self.imgsz / min(rgb.size)
        width, height = (max(self.imgsz, round(side * scale)) for side in rgb.size)
        left, top = (width - self.imgsz) // 2, (height - self.imgsz) // 2
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        rgb = rgb.crop((left, top, left + self.imgsz, top + self.imgsz))
        return torch.from_numpy(np.array(rgb).transpose(2, 0, 1).copy())
