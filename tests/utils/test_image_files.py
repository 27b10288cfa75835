"""What is said about an image file is what Pillow and Detectron2 find when they decode it."""

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from rope_vit_det.errors import InputError
from rope_vit_det.utils.image_files import image_size


@pytest.fixture(params=["jpg", "png", "webp"])
def path(tmp_path, request):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = tmp_path / f"image.{request.param}"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_image_that_detectron2_reads(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    height, width = read_image(str(tmp_path / "turned.jpg")).shape[:2]
    assert image_size(tmp_path / "turned.jpg") == (width, height)


def test_no_cut_is_missed(path):
    """A file that lacks its end is either refused, or Detectron2 can read it."""
    whole = path.read_bytes()
    assert image_size(path) == (40, 30)
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        try:
            image_size(path)
        except InputError:
            refused += 1
        else:
            read_image(str(path), "RGB")
    assert refused > 35


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_deep_pixels_would_be_cut_off(tmp_path, mode):
    path = tmp_path / "deep.tiff"
    Image.new(mode, (4, 4), 300).save(path)
    with pytest.raises(InputError, match="more than 8 bits"):
        image_size(path)
