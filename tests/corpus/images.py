"""Faulty and unusual image files."""

import os
import struct
import zlib

import numpy as np
from PIL import Image

from .case import HANDLED, OWN, REFUSED, SIZE, Case, World

W, H = SIZE
ORIENTATION = 274


def _pixels(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def _rgb(width: int = W, height: int = H) -> Image.Image:
    return Image.fromarray(_pixels(height, width, 3))


def _save(image, name: str, **options):
    return lambda world: world.save_image(image, name, **options)


def _bytes(content: bytes):
    return lambda world: world.image.write_bytes(content)


def _cut(share: float, split: str = "train", name: str = "0.jpg"):
    def spoil(world: World) -> None:
        path = world.folder / split / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return spoil


def _png(change):
    """Has a PNG file in place of the image, and changes its bytes."""

    def spoil(world: World) -> None:
        world.save_image(_rgb(), "0.png")
        world.image.write_bytes(change(world.image.read_bytes()))

    return spoil


def _damage_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(20) + content[middle + 20 :]


def _bomb(world: World) -> None:
    """A PNG that says it is 60,000 pixels wide and high."""
    world.save_image(_rgb(), "0.png")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    content = world.image.read_bytes()
    checked = chunk + struct.pack(">I", zlib.crc32(chunk))
    world.image.write_bytes(content[:12] + checked + content[33:])


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def _turned(says_so: bool):
    def spoil(world: World) -> None:
        world.save_image(_rgb(), "0.jpg", exif=_exif(6))
        if says_so:
            entry = world.image_entry
            entry["width"], entry["height"] = entry["height"], entry["width"]

    return spoil


def _folder(world: World) -> None:
    world.image.unlink()
    world.image.mkdir()


def _pipe(world: World) -> None:
    world.image.unlink()
    os.mkfifo(world.image)


def _skip(world: World) -> None:
    _cut(0.5)(world)
    (world.folder / "train" / "1.jpg").unlink()
    _cut(0.5, "val", "1.jpg")(world)
    world.opts += ["DATALOADER.SKIP_UNREADABLE", "True"]


def _skip_all(world: World) -> None:
    for path in (world.folder / "train").iterdir():
        path.write_bytes(b"")
    world.opts += ["DATALOADER.SKIP_UNREADABLE", "True"]


_CANNOT = "images that cannot be read: '{}' image 1"

CASES = [
    Case("missing image", "a file that the JSON names is not there",
         lambda world: world.image.unlink(), REFUSED,
         ("1 of 4 images that the folder lacks: '0.jpg' image 1",)),
    Case("image of no bytes", "an empty file", _bytes(b""), REFUSED, (_CANNOT.format("0.jpg"),)),
    Case("not an image", "a text file named .jpg", _bytes(b"hello"), REFUSED,
         (_CANNOT.format("0.jpg"), "no image")),
    Case("truncated JPEG", "cut in the middle", _cut(0.5), REFUSED,
         (_CANNOT.format("0.jpg"), "truncated")),
    Case("JPEG cut in its header", "the first 2 % only", _cut(0.02), REFUSED,
         (_CANNOT.format("0.jpg"),)),
    Case("truncated validation image", "cut in the middle", _cut(0.5, "val"), REFUSED,
         (_CANNOT.format("0.jpg"), "truncated")),
    Case("truncated PNG", "cut in the middle", _png(lambda c: c[: len(c) // 2]), REFUSED,
         (_CANNOT.format("0.png"),)),
    Case("damaged PNG", "20 bytes in its middle are zeros", _png(_damage_middle), REFUSED,
         (_CANNOT.format("0.png"),)),
    Case("decompression bomb", "a PNG that says it has 3.6 billion pixels", _bomb, REFUSED,
         (_CANNOT.format("0.png"), "decompression bomb")),
    Case("folder named .jpg", "a folder in place of the file", _folder, REFUSED,
         ("images that", "'0.jpg' image 1")),
    Case("named pipe", "a pipe in place of the file, which would wait for ever", _pipe, REFUSED,
         ("images that", "'0.jpg' image 1")),
    Case("JPEG with a tail", "bytes behind the end of the image",
         lambda w: w.image.write_bytes(w.image.read_bytes() + b"tail"), HANDLED),
    Case("CMYK", "a JPEG in CMYK", _save(_rgb().convert("CMYK"), "0.jpg"), HANDLED),
    Case("greyscale", "a JPEG in grey", _save(_rgb().convert("L"), "0.jpg"), HANDLED),
    Case("palette", "a PNG with a palette", _save(_rgb().convert("P"), "0.png"), HANDLED),
    Case("palette with transparency", "a PNG whose colour 0 is transparent",
         _save(_rgb().convert("P"), "0.png", transparency=0), HANDLED),
    Case("transparency", "a PNG in RGBA", _save(_rgb().convert("RGBA"), "0.png"), HANDLED),
    Case("grey with transparency", "a PNG in LA", _save(_rgb().convert("LA"), "0.png"), HANDLED),
    Case("black and white", "a PNG of one bit", _save(_rgb().convert("1"), "0.png"), HANDLED),
    Case("16 bits", "a PNG in grey with 16 bits",
         _save(Image.fromarray(_pixels(H, W, dtype=np.uint16)), "0.png"), REFUSED,
         (_CANNOT.format("0.png"), "more than 8 bits")),
    Case("floating point", "a TIFF of floats",
         _save(Image.fromarray(_pixels(H, W).astype(np.float32)), "0.tiff"), REFUSED,
         (_CANNOT.format("0.tiff"), "more than 8 bits")),
    Case("WebP", "another format", _save(_rgb(), "0.webp"), HANDLED),
    Case("wrong suffix", "a PNG named .jpg", _save(_rgb(), "0.jpg", format="PNG"), HANDLED),
    Case("animation", "a GIF of two frames: the first is taken",
         _save(_rgb(), "0.gif", save_all=True, append_images=[_rgb().rotate(90)]), HANDLED),
    Case("turned by EXIF", "orientation 6, and the JSON has the size of the turned image",
         _turned(True), HANDLED),
    Case("turned by EXIF, unknown to the JSON",
         "orientation 6, and the JSON has the size of the stored pixels", _turned(False), REFUSED,
         ("images of another size than the JSON says: '0.jpg' image 1", f"({H}x{W}, not {W}x{H})")),
    Case("a TIFF turned by EXIF", "orientation 3: Pillow turns it, and Detectron2 once more",
         _save(_rgb(), "0.tiff", exif=_exif(3)), REFUSED,
         (_CANNOT.format("0.tiff"), "Detectron2 would turn a TIFF twice")),
    Case("damaged EXIF", "a block of EXIF that holds noise",
         _save(_rgb(), "0.jpg", exif=b"Exif\0\0" + bytes(range(200))), HANDLED),
    Case("another size", "the JSON says 640x480",
         lambda world: world.image_entry.update(width=640, height=480), REFUSED,
         ("images of another size than the JSON says: '0.jpg' image 1", f"({W}x{H}, not 640x480)")),
    Case("1x1", "one pixel", _save(_rgb(1, 1), "0.png"), HANDLED),
    Case("thin", "1x100 pixels", _save(_rgb(1, 100), "0.png"), HANDLED),
    Case("too thin", "1x5000 pixels: nothing is left at INPUT.MAX_SIZE_TRAIN",
         _save(_rgb(1, 5000), "0.png"), REFUSED, ("images so thin", "'0.png' image 1 (1x5000)")),
    Case("skipped on demand", "a cut and a missing image, under DATALOADER.SKIP_UNREADABLE", _skip,
         HANDLED, ("Skipping 2 of 4 images of", "Skipping 1 of 2 images of")),
    Case("nothing left to skip", "every image is empty, under DATALOADER.SKIP_UNREADABLE",
         _skip_all, REFUSED, ("not one image of", "can be read"), ways=(OWN,)),
]  # fmt: skip
