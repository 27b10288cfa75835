#!/usr/bin/env python3
"""Says which system library OpenCV misses, where `import cv2` fails, and how to get it."""

import sys

# Debian's packages of the libraries that opencv-python loads and does not bring along.
PACKAGES = "libgl1 libglib2.0-0"

if __name__ == "__main__":
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: import cv2: {error}; run: apt-get install -y {PACKAGES}")
