"""Each method takes the rows it says it takes, at the boundary it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guardbake.fit.care import care_edit
from guardbake.fit.push import mean_difference_push
from guardbake.fit.subspace import discriminative_subspace, largest_angle, safety_directions
from guardbake.fit.vlm_guard import safety_direction_edit
from guardbake.site import Site

FFN, RESIDUAL = Site(1, "ffn_output"), Site(1, "residual")


def test_the_push_is_the_mean_difference_of_the_text_form_on_the_residual(made: Any) -> None:
    acts = made.activations({RESIDUAL: 5.0})
    edit = mean_difference_push(acts, 1, 3.0)
    text = acts.where(lambda s: s.form == "text")
    harmful = acts.where(lambda s: s.label == "harmful")
    rows = acts.last[RESIDUAL].astype(np.float64)
    expected = rows[text & harmful].mean(axis=0) - rows[text & ~harmful].mean(axis=0)
    assert (edit.site, edit.kind, edit.strength) == (FFN, "steer", 3.0)
    assert edit.push is not None
    assert np.abs(edit.push - expected).max() < 1e-6  # float32 of numbers near 5
    assert edit.push[0] > 4  # towards harmful


@pytest.mark.parametrize("kind", ["project", "add"])
def test_vlm_guard_takes_paired_text_rows_at_the_ffn_output(made: Any, kind: Any) -> None:
    acts = made.activations({FFN: 5.0})
    edit = safety_direction_edit(acts, 1, 2, kind, 0.7)
    rows, samples = acts.last[FFN], acts.samples
    pairs = {
        label: [
            rows[i] for i, s in enumerate(samples) if s.form == "text" and s.label == label
        ]
        for label in ("harmful", "harmless")
    }  # fmt: skip
    expected = safety_directions(pairs["harmful"], pairs["harmless"], 2).basis
    assert (edit.site, edit.kind, edit.branches[0].strength) == (FFN, kind, 0.7)
    assert largest_angle(edit.branches[0].basis.astype(np.float64), expected) < 1e-6  # float32
    assert (edit.branches[0].centre == 0).all()  # no centring, as printed
    assert edit.branches[0].basis[0, 0] > 0.9


def test_vlm_guard_pairs_by_index_whatever_the_order(made: Any) -> None:
    acts = made.activations({FFN: 5.0})
    order = np.random.default_rng(0).permutation(len(acts.samples))
    shuffled = replace(
        acts,
        samples=[acts.samples[i] for i in order],
        last={site: rows[order] for site, rows in acts.last.items()},
        image_mean={site: rows[order] for site, rows in acts.image_mean.items()},
    )
    a, b = (safety_direction_edit(x, 1, 2, "add", 1.0).branches[0].basis for x in (acts, shuffled))
    assert largest_angle(a.astype(np.float64), b.astype(np.float64)) < 1e-6  # float32


def test_care_fits_pictures_and_answers_at_the_ffn_output(made: Any) -> None:
    acts = made.activations({FFN: 5.0})
    rng = np.random.default_rng(0)
    compliant, refusing = rng.standard_normal((2, 40, made.width)).astype(np.float32)
    compliant[:, 7] += 6
    edit = care_edit(acts, compliant, refusing, 1, 2, 0.9, 0.1)
    assert (edit.site, edit.kind) == (FFN, "care")
    visual, text = edit.branches
    assert (visual.modality, text.modality) == ("visual", "text")
    assert (visual.strength, text.strength) == (0.9, 0.9)
    drawn = acts.where(lambda s: s.form == "typographic")
    harmful = acts.where(lambda s: s.label == "harmful")
    rows = acts.image_mean[FFN]
    expected = discriminative_subspace(rows[drawn & harmful], rows[drawn & ~harmful], 2, 0.1)
    assert largest_angle(visual.basis.astype(np.float64), expected.basis) < 1e-6  # float32
    expected = discriminative_subspace(compliant, refusing, 2, 0.1)
    assert largest_angle(text.basis.astype(np.float64), expected.basis) < 1e-6
    other = discriminative_subspace(refusing, compliant, 2, 0.1)  # the roles are not alike
    assert largest_angle(text.basis.astype(np.float64), other.basis) > 0.1
    assert np.abs(text.centre - refusing.mean(axis=0)).max() < 1e-6
