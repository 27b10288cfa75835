"""Drawn objects with textures, and backgrounds to put them on: what the demo's images consist of.

Images are uint8 arrays (H, W, 3) in BGR, as OpenCV keeps them; masks are boolean (H, W).
"""

import colorsys
from collections.abc import Callable

import cv2
import numpy as np

_SUPERSAMPLING = 4


def _ring(radii: list[float]) -> np.ndarray:
    """Corners at these distances from the centre, at equal angles; (n, 2), unit size."""
    angles = np.arange(len(radii)) / len(radii) * 2 * np.pi
    return np.stack((np.cos(angles), np.sin(angles)), axis=1) * np.array(radii)[:, None]


# Outlines in unit size around the origin.
_OUTLINES = {
    "disc": _ring([1.0] * 40),
    "crate": np.array([(-0.9, -0.7), (0.9, -0.7), (0.9, 0.7), (-0.9, 0.7)]),
    "tile": _ring([1.05] * 6),
    "star": _ring([1.15, 0.62] * 5),
}
CATEGORIES = tuple(_OUTLINES)


# How bright an object is at (x, y), in unit size.
_TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: np.sin(np.hypot(x, y) * 11),  # rings
    "crate": lambda x, y: np.sin(x * 9),  # planks
    "tile": lambda x, y: np.sin(x * 8) * np.sin(y * 8) * 2,  # checks
    "star": lambda x, y: np.cos(x * 10) + np.cos(y * 10) - 0.6,  # spots
}
# Degrees. A category's colours scatter so far around it that neighbours overlap.
_HUES = {"disc": 20, "crate": 110, "tile": 200, "star": 290}
_HUE_SPREAD = 18


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Clouds of two dull colours, a few blurred streaks, and noise; (H, W, 3) uint8."""
    dark = _colour(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.15, 0.5))
    light = _colour(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.5, 0.85))
    clouds = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.6), (9, 0.3), (30, 0.15)):
        grid = rng.random((cells, cells), np.float32)
        clouds += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    image = dark + (light - dark) * np.clip(clouds, 0, 1)[..., None]
    streaks = np.zeros((height, width, 3), np.float32)
    for _ in range(rng.integers(2, 6)):
        start, end = (rng.random((2, 2)) * (width, height)).astype(int).tolist()
        colour = rng.integers(-50, 51, 3).tolist()
        cv2.line(streaks, start, end, colour, int(rng.integers(2, 9)))
    image = image + cv2.GaussianBlur(streaks, (0, 0), 2) + rng.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def outline(
    rng: np.random.Generator, category: str, centre: tuple[float, float], radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Turns, stretches and places the outline of a category.

    Returns:
        Its corners (n, 2) in pixels (x, y), and the 2x2 matrix from unit size to pixels.
    """
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = rng.uniform(0.8, 1.25)
    matrix = turn @ np.diag([radius * stretch, radius / stretch])
    return _OUTLINES[category] @ matrix.T + centre, matrix


def coverage(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """The share of each pixel that lies inside a polygon; (H, W) float32."""
    alpha = np.zeros((height, width), np.float32)
    low = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, (width, height))
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int), 0, (width, height))
    (columns, rows), size = high - low, _SUPERSAMPLING
    if columns and rows:
        fine = np.zeros((rows * size, columns * size), np.uint8)
        # Pixel (0, 0) of the fine grid has its centre at (0.5, 0.5) / size.
        fine = cv2.fillPoly(fine, [np.round((corners - low) * size - 0.5).astype(np.int32)], 255)
        inside = cv2.resize(fine, (int(columns), int(rows)), interpolation=cv2.INTER_AREA)
        alpha[low[1] : high[1], low[0] : high[0]] = inside / np.float32(255)
    return alpha


def paint(
    rng: np.random.Generator,
    image: np.ndarray,
    category: str,
    centre: tuple[float, float],
    matrix: np.ndarray,
    alpha: np.ndarray,
) -> None:
    """Paints an object over the image, in the texture of its category and two colours.

    Args:
        image: changed in place.
        matrix: from unit size to pixels, as `outline` returns it.
        alpha: coverage, (H, W).
    """
    hue = rng.normal(_HUES[category], _HUE_SPREAD)
    first = _colour(hue, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
    second = _colour(rng.uniform(0, 360), rng.uniform(0, 0.4), rng.choice((0.15, 0.95)))
    rows, columns = np.nonzero(alpha)
    pixels = np.stack((columns, rows)) + 0.5 - np.array(centre)[:, None]
    x, y = np.linalg.inv(matrix) @ pixels
    share = np.clip(_TEXTURES[category](x, y) * 1.5 + 0.5, 0, 1)[:, None]
    shade = 1 + 0.25 * np.clip(x + y, -1, 1)[:, None]
    colour = (first + (second - first) * share) * shade
    weight = alpha[rows, columns, None]
    mixed = image[rows, columns] * (1 - weight) + colour * weight
    image[rows, columns] = np.clip(mixed, 0, 255).astype(np.uint8)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """BGR, 0 to 255, of a hue in degrees, and saturation and value up to 1."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))[::-1]
