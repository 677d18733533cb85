"""Each method takes the rows it says it takes, at the boundary it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from guardbake.activations import Activations, Turns
from guardbake.errors import RecipeError
from guardbake.fit.candidates import Candidate, candidates
from guardbake.fit.care import fit_care
from guardbake.fit.care_public import public_subspace
from guardbake.fit.contrasts import Contrasts
from guardbake.fit.push import mean_difference_push
from guardbake.fit.selection import choose_rank, choose_ridge, largest_rank, winsorised
from guardbake.fit.subspace import discriminative_subspace, largest_angle, safety_directions
from guardbake.fit.vlm_guard import safety_direction_edit
from guardbake.recipe import CandidateSection
from guardbake.site import Site
from guardbake.spec import Branch

FFN, RESIDUAL = Site(1, "ffn_output"), Site(1, "residual")


def test_the_push_is_the_mean_difference_of_the_text_form_on_the_residual(made: Any) -> None:
    acts = made.activations({RESIDUAL: 5.0})
    edit = mean_difference_push(acts, 1)
    text = acts.where(lambda s: s.form == "text")
    harmful = acts.where(lambda s: s.label == "harmful")
    rows = acts.last[RESIDUAL].astype(np.float64)
    expected = rows[text & harmful].mean(axis=0) - rows[text & ~harmful].mean(axis=0)
    assert (edit.site, edit.kind, edit.strength) == (FFN, "steer", 1.0)
    assert edit.push is not None
    assert np.abs(edit.push - expected).max() < 1e-6  # float32 of numbers near 5
    assert edit.push[0] > 4  # towards harmful


@pytest.mark.parametrize("kind", ["project", "add", "replace"])
def test_vlm_guard_takes_paired_text_rows_at_the_ffn_output(made: Any, kind: Any) -> None:
    acts = made.activations({FFN: 5.0})
    edit = safety_direction_edit(acts, 1, 2, kind)
    rows, samples = acts.last[FFN], acts.samples
    pairs = {
        label: [
            rows[i] for i, s in enumerate(samples) if s.form == "text" and s.label == label
        ]
        for label in ("harmful", "harmless")
    }  # fmt: skip
    expected = safety_directions(pairs["harmful"], pairs["harmless"], 2).basis
    assert (edit.site, edit.kind, edit.branches[0].strength) == (FFN, kind, 1.0)
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
    a, b = (safety_direction_edit(x, 1, 2, "add").branches[0].basis for x in (acts, shuffled))
    assert largest_angle(a.astype(np.float64), b.astype(np.float64)) < 1e-6  # float32


# ---- CARE


def section(**keys: Any) -> CandidateSection:
    given = {"edit": "care", "layers": [1], "strengths": [1.0], "rank": 2, "ridge": 0.1} | keys
    return CandidateSection.model_validate(given)


@pytest.fixture(scope="module")
def contrasts(made: Any) -> Contrasts:
    """Harm along axis 0 in the pictures, compliance along 7; attributed rows are others again."""
    acts = made.activations({FFN: 5.0})
    rng = np.random.default_rng(0)

    def rows(axis: int, count: int) -> Any:
        out = rng.standard_normal((count, made.width)).astype(np.float32)
        out[:, axis] += 6
        return {FFN: out}

    plain = Activations(acts.samples[:30], {}, rows(9, 30), rows(10, 30))
    attributed = replace(acts, image_attributed=rows(3, len(acts.samples)))
    return Contrasts(
        attributed, Turns(rows(7, 40), rows(8, 40)), Turns(rows(2, 40), rows(3, 40)), plain
    )


def spans(branch: Branch, malicious: Any, benign: Any) -> bool:
    """Whether the branch is the exact subspace of these rows: rank 2, ridge 0.1, benign centre."""
    expected = discriminative_subspace(malicious, benign, 2, 0.1)
    near = largest_angle(branch.basis.astype(np.float64), expected.basis) < 1e-6  # float32
    return near and bool(np.abs(branch.centre - benign.mean(axis=0)).max() < 1e-5)  # of 20


def pictures(contrasts: Contrasts, kind: str = "image_mean") -> tuple[Any, Any]:
    """(harmful, harmless) typographic rows."""
    acts = contrasts.prompts
    drawn = acts.where(lambda s: s.form == "typographic")
    harmful = acts.where(lambda s: s.label == "harmful")
    rows = getattr(acts, kind)[FFN]
    return rows[drawn & harmful], rows[drawn & ~harmful]


def test_care_fits_pictures_and_answers_at_the_ffn_output(contrasts: Contrasts) -> None:
    edit = fit_care(section(), 1, contrasts).edit
    assert (edit.site, edit.kind, edit.fusion) == (FFN, "care", "adaptive")
    visual, text = edit.branches
    assert (visual.modality, text.modality) == ("visual", "text")
    assert [(b.strength, b.gains) for b in edit.branches] == [(1.0, None)] * 2
    compliant, refusing = contrasts.compliant.mean[FFN], contrasts.refusing.mean[FFN]
    assert spans(visual, *pictures(contrasts))
    assert spans(text, compliant, refusing)
    assert not spans(text, refusing, compliant)  # the roles are not alike


def test_attribution_takes_the_attributed_rows_in_both_branches(contrasts: Contrasts) -> None:
    visual, text = fit_care(section(attribution=True), 1, contrasts).edit.branches
    assert spans(visual, *pictures(contrasts, "image_attributed"))
    assert spans(text, contrasts.compliant.attributed[FFN], contrasts.refusing.attributed[FFN])


def test_the_plain_contrast_takes_plain_pictures_as_benign(contrasts: Contrasts) -> None:
    visual, _ = fit_care(section(contrast="plain"), 1, contrasts).edit.branches
    assert spans(visual, pictures(contrasts)[0], contrasts.plain.image_mean[FFN])
    both = section(contrast="plain", attribution=True)
    visual, _ = fit_care(both, 1, contrasts).edit.branches
    malicious = pictures(contrasts, "image_attributed")[0]
    assert spans(visual, malicious, contrasts.plain.image_attributed[FFN])


@pytest.mark.parametrize("branch", ["visual", "text"])
def test_one_branch_alone_is_a_projection(contrasts: Contrasts, branch: str) -> None:
    edit = fit_care(section(branches=[branch]), 1, contrasts).edit
    both = {b.modality: b for b in fit_care(section(), 1, contrasts).edit.branches}
    assert (edit.kind, edit.branches[0].modality) == ("project", branch)
    assert edit.branches[0].basis.tobytes() == both[edit.branches[0].modality].basis.tobytes()


def test_fusions_are_named_and_a_parallel_one_carries_its_ratio(contrasts: Contrasts) -> None:
    sequential = fit_care(section(fusion="sequential"), 1, contrasts).edit
    assert sequential.fusion == "sequential"
    assert [b.strength for b in sequential.branches] == [1.0, 1.0]
    parallel = fit_care(section(fusion="parallel", visual_share=0.25), 1, contrasts).edit
    assert parallel.fusion == "parallel"
    assert [b.strength for b in parallel.branches] == [0.25, 0.75]


def test_public_numerics_come_with_gains(contrasts: Contrasts) -> None:
    edit = fit_care(section(numerics="public", ridge="ledoit-wolf"), 1, contrasts).edit
    for branch, rows in zip(
        edit.branches,
        (pictures(contrasts), (contrasts.compliant.mean[FFN], contrasts.refusing.mean[FFN])),
        strict=True,
    ):
        expected = public_subspace(*rows, 2)
        assert branch.gains is not None
        assert np.abs(branch.gains - expected.gains).max() < 1e-6  # float32
        assert np.abs(branch.basis - expected.basis).max() < 1e-6
        assert branch.gains[0] > 1.001  # the columns are not orthogonal


def test_held_out_rank_and_ridge_are_chosen_and_written_down(contrasts: Contrasts) -> None:
    found = fit_care(section(rank="held-out", ridge="held-out"), 1, contrasts)
    for branch in found.edit.branches:
        seen = found.evidence[branch.modality]
        rows = {
            "visual": pictures(contrasts),
            "text": (contrasts.compliant.mean[FFN], contrasts.refusing.mean[FFN]),
        }[branch.modality]
        most = largest_rank(len(rows[0]), 12)
        assert seen["ridge"] == choose_ridge(*rows, most)
        assert seen["rank"] == choose_rank(*rows, most, choose_ridge(*rows, most))
        assert branch.basis.shape == (12, seen["rank"])
        assert (seen["malicious"], seen["benign"]) == tuple(map(len, rows))
        assert seen["bootstrap"] is not None


def test_winsorising_changes_the_subspace_and_is_said(contrasts: Contrasts) -> None:
    found = fit_care(section(winsorise=0.05, branches=["text"]), 1, contrasts)
    cut = winsorised(contrasts.compliant.mean[FFN], contrasts.refusing.mean[FFN], 0.05)
    assert spans(found.edit.branches[0], *cut)
    assert found.evidence["text"]["winsorised"] == 0.05


# ---- candidates


def named(contrasts: Contrasts, *sections: CandidateSection) -> dict[str, Candidate]:
    return {c.name: c for c in candidates(sections, contrasts)}


def test_layers_times_strengths_in_order(contrasts: Contrasts, made: Any) -> None:
    acts = made.activations({})
    steer = CandidateSection(edit="steer", layers=[2, 0], strengths=[0.5, 1.0])
    found = named(replace(contrasts, prompts=acts), steer)
    assert list(found) == [f"steer layer {n} alpha {a}" for n in (2, 0) for a in ("0.5", "1")]
    assert [c.edits[0].strength for c in found.values()] == [0.5, 1.0, 0.5, 1.0]
    assert [c.edits[0].site.layer for c in found.values()] == [2, 2, 0, 0]


def test_together_edits_every_layer_in_layer_order(contrasts: Contrasts, made: Any) -> None:
    acts = made.activations({})
    remove = CandidateSection(edit="remove", layers=[2, 0], strengths=[1.0], together=True)
    (candidate,) = candidates([remove], replace(contrasts, prompts=acts))
    assert candidate.name == "remove layers 0+2 alpha 1"
    assert [edit.site.layer for edit in candidate.edits] == [0, 2]
    alone = safety_direction_edit(acts, 2, 1, "project").branches[0].basis
    assert candidate.edits[1].branches[0].basis.tobytes() == alone.tobytes()


def test_strength_scales_the_branches_and_reflection_is_named(contrasts: Contrasts) -> None:
    keys = {"fusion": "parallel", "visual_share": 0.25, "strengths": [4.0]}
    ((name, candidate),) = named(contrasts, section(**keys)).items()
    assert name == (
        "care layer 1 alpha 4 (reflects), rank 2, ridge 0.1, fusion parallel, visual share 0.25"
    )
    assert [b.strength for b in candidate.edits[0].branches] == [1.0, 3.0]
    assert candidate.edits[0].strength == 1.0
    assert candidate.method == "CARE, parallel fusion"


def test_variants_have_names_of_their_own(contrasts: Contrasts) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"attribution": True},
        {"contrast": "plain"},
        {"fusion": "sequential"},
        {"branches": ["visual"]},
        {"branches": ["text"]},
        {"numerics": "public", "ridge": "ledoit-wolf"},
        {"rank": 3},
    ]
    sections = [section(**keys) for keys in variants]
    assert len(named(contrasts, *sections)) == len(variants)
    assert {c.method for c in candidates(sections, contrasts)} >= {
        "CARE, visual branch alone",
        "CARE as the public code computes it, adaptive fusion",
    }
    with pytest.raises(RecipeError, match="two candidates named"):
        named(contrasts, *sections, section())
