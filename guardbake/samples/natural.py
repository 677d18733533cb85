"""Pictures with the statistics of photographs, drawn from a seed: no photograph is in them.

The amplitude of a photograph's spatial frequencies falls as 1/f (Field 1987, JOSA A 4:2379), and
its colours lie close to grey: luminance, yellow-blue and red-green vary independently, each several
times less than the one before (Ruderman, Cronin and Chiao 1998, JOSA A 15:2036). Phases are random,
so there are no edges and no objects.
"""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

# luminance, yellow-blue, red-green
_AXES = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]], np.float64)
_DEVIATIONS = (1.0, 0.2, 0.04)
_MEAN, _CONTRAST = 0.45, 0.2  # of the range from black to white


def natural_picture(width: int, height: int, key: str) -> Image.Image:
    """An RGB image, the same for the same size and key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    side = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(*side)
    frequency[0, 0] = np.inf  # no constant part
    planes = []
    for axis, deviation in zip(_AXES, _DEVIATIONS, strict=True):
        noise = np.fft.rfft2(rng.standard_normal((height, width)))
        plane = np.fft.irfft2(noise / frequency, s=(height, width))
        unit = axis / np.linalg.norm(axis) * np.sqrt(3)
        planes.append((deviation * plane / plane.std())[..., None] * unit)
    levels = np.clip(_MEAN + _CONTRAST * sum(planes), 0, 1) * 255
    return Image.fromarray(levels.round().astype(np.uint8))
