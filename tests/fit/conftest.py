"""Activations made up for the tests: prompts in forms, rows at sites, harm planted where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from guardbake.activations import Activations
from guardbake.samples import Form, Sample
from guardbake.site import Site

WIDTH = 12
SITES = tuple(Site(layer, b) for layer in range(3) for b in ("ffn_output", "residual"))


def make_activations(
    strengths: dict[Site, float],
    prompts: int = 60,
    forms: Sequence[Form] = ("text", "typographic"),
    seed: int = 0,
    width: int = WIDTH,
) -> Activations:
    """`prompts` harmful and as many harmless prompts in every form, rows of noise of deviation 1.

    strengths[site]: how far the harmful rows are moved along the first axis there. Forms lie 20
    apart along the second axis.
    """
    rng = np.random.default_rng(seed)
    samples = [
        Sample(f"{label} {index}", label, form, f"{label} {seed}", index)
        for label in ("harmful", "harmless")
        for index in range(prompts)
        for form in forms
    ]
    harmful = np.array([sample.label == "harmful" for sample in samples])
    place = np.array([forms.index(sample.form) for sample in samples])
    last, means = {}, {}
    for site in SITES:
        rows = rng.standard_normal((len(samples), width)).astype(np.float32)
        rows[harmful, 0] += strengths.get(site, 0.0)
        rows[:, 1] += 20 * place
        last[site] = rows
        means[site] = np.where((place > 0)[:, None], rows, np.nan).astype(np.float32)
    return Activations(samples, last, means)


@dataclass(frozen=True)
class Made:
    activations: Callable[..., Activations] = make_activations
    sites: tuple[Site, ...] = SITES
    width: int = WIDTH


@pytest.fixture(scope="session")
def made() -> Made:
    return Made()
