"""Natural-statistics pictures: what is natural about them, and that they are always the same."""

from __future__ import annotations

import numpy as np

from guardbake.samples.natural import natural_picture

SIDE = 192


def levels(key: str) -> np.ndarray:
    return np.asarray(natural_picture(SIDE, SIDE, key), np.float64) / 255


def test_the_spectrum_falls_as_one_over_f() -> None:
    slopes = []
    for key in ("a", "b", "c"):
        amplitude = np.abs(np.fft.fft2(levels(key).mean(-1)))
        frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None])
        band = (frequency > 3 / SIDE) & (frequency < 0.4)
        slopes.append(np.polyfit(np.log(frequency[band]), np.log(amplitude[band]), 1)[0])
    assert abs(np.mean(slopes) + 1) < 0.1


def test_colours_lie_close_to_grey() -> None:
    flat = levels("a").reshape(-1, 3)
    grey, blue, red = flat.mean(1), flat[:, :2].mean(1) - flat[:, 2], flat[:, 0] - flat[:, 1]
    assert grey.std() > 2 * blue.std() > 4 * red.std() > 0
    assert 0.35 < grey.mean() < 0.55


def test_a_key_is_a_picture() -> None:
    picture = natural_picture(96, 48, "a")
    assert picture.size == (96, 48)
    assert picture.mode == "RGB"
    assert picture.tobytes() == natural_picture(96, 48, "a").tobytes()
    assert picture.tobytes() != natural_picture(96, 48, "b").tobytes()
