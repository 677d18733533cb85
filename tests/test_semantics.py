"""The law's own properties; every other rendering is compared with the law, so it must be right."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardbake import activations, plugins, semantics, site
from guardbake import semantics as law
from guardbake.diagnose import separability
from guardbake.spec import GuardSpec

Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
# The properties are tested in float64: some dozens of operations on numbers near 1, each with a
# relative error of 1.1e-16, stay below 1e-13.
NOISE = 1e-12
FUSIONS = ("adaptive", "parallel", "sequential")


def basis(rng: np.random.Generator, width: int, rank: int) -> Array:
    return np.linalg.qr(rng.standard_normal((width, rank)))[0]


@dataclass(frozen=True)
class Terms:
    """A branch in float64; a `spec.Branch` has the same names."""

    basis: Array
    centre: Array
    strength: float
    gains: Array | None = None


def terms(rng: np.random.Generator, width: int, rank: int, strength: float) -> Terms:
    return Terms(basis(rng, width, rank), rng.standard_normal(width), strength)


@pytest.mark.parametrize("module", [semantics, site, activations, separability, plugins])
def test_doctests(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("module", [semantics, site, separability])
def test_doctests_are_there(module: ModuleType) -> None:
    assert doctest.testmod(module).attempted > 0


# ---- edits


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_closed_gate_is_the_identity_bit_for_bit(value: float) -> None:
    y = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    y[0, 0, 0] = -0.0
    edited = np.full_like(y, value)
    closed = law.gated(y, edited, np.zeros((2, 3), bool))
    assert closed.tobytes() == y.tobytes()


def test_the_gate_chooses_token_by_token() -> None:
    y, edited = np.zeros((2, 2, 3)), np.ones((2, 2, 3))
    open_ = np.array([[True, False], [False, True]])
    assert (law.gated(y, edited, open_)[..., 0] == open_).all()


@given(SEEDS, st.integers(1, 6))
def test_strength_1_is_a_projection(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    y, q, centre = rng.standard_normal((2, 3, 7)), basis(rng, 7, rank), rng.standard_normal(7)
    whole = Terms(q, centre, 1.0)
    once = law.project(y, whole)
    assert np.abs(law.project(once, whole) - once).max() < NOISE
    assert np.abs((once - centre) @ q).max() < NOISE
    assert np.abs(once - y).max() > 0.01  # and it did something


@given(SEEDS, st.floats(0.01, 1.0))
def test_strength_up_to_1_contracts_and_twice_that_reflects(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    y, q, centre = rng.standard_normal((2, 3, 7)), basis(rng, 7, 3), rng.standard_normal(7)
    z = (y - centre) @ q
    for strength in (alpha, 1 + alpha):
        after = (law.project(y, Terms(q, centre, strength)) - centre) @ q
        assert np.abs(after - (1 - strength) * z).max() < NOISE
    distance = np.linalg.norm(law.project(y, Terms(q, centre, alpha)) - centre, axis=-1)
    assert (distance <= np.linalg.norm(y - centre, axis=-1) + NOISE).all()
    reflected = (law.project(y, Terms(q, centre, 1 + alpha)) - centre) @ q
    assert (np.sign(reflected) == -np.sign(z)).all()


@given(SEEDS, st.floats(-3, 3))
def test_add_is_project_with_the_other_sign(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    y, q, centre = rng.standard_normal((1, 3, 5)), basis(rng, 5, 2), rng.standard_normal(5)
    grown = (law.add(y, Terms(q, centre, alpha)) - centre) @ q
    assert np.abs(grown - (1 + alpha) * ((y - centre) @ q)).max() < NOISE


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strength_0_is_the_identity(dtype: type[np.floating]) -> None:
    rng = np.random.default_rng(1)
    y = rng.standard_normal((2, 3, 6)).astype(dtype)
    q, centre = basis(rng, 6, 2).astype(dtype), rng.standard_normal(6).astype(dtype)
    none, push = Terms(q, centre, 0.0), q[:, 0]
    for edited in (
        law.project(y, none),
        law.add(y, none),
        law.steer(y, centre, 0.0),
        *(law.care(y, [none, none], fusion) for fusion in FUSIONS),
        law.astra(y, push, centre, 0.0),
    ):
        assert edited.dtype == dtype
        assert edited.tobytes() == y.tobytes()


@given(SEEDS, st.floats(-4, 4))
def test_size_is_the_length_of_the_change(seed: int, alpha: float) -> None:
    """n_m == ||y_m' - y||: the basis is orthonormal, so the k coordinates carry the length."""
    rng = np.random.default_rng(seed)
    y, branch = rng.standard_normal((2, 3, 8)), terms(rng, 8, 3, alpha)
    size = abs(alpha) * np.linalg.norm(law.coordinates(y, branch), axis=-1)
    moved = law.project(y, branch) - y
    assert np.abs(np.linalg.norm(moved, axis=-1) - size).max() < NOISE


@given(SEEDS, st.floats(0.01, 1e3), st.floats(0, 1e3))
def test_weights_sum_to_1_where_any_size_is(seed: int, first: float, second: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = [s * rng.uniform(0.5, 1, (2, 3, 1)) for s in (first, second)]
    weights = law.fusion_weights(sizes)
    # eps takes eps / total <= 1e-8 / 0.005 from the sum
    assert np.abs(sum(weights) - 1).max() < 2.1e-6
    assert all((w >= 0).all() for w in weights)
    assert np.abs(weights[0] * sizes[1] - weights[1] * sizes[0]).max() < 1e-9 * first * (second + 1)


def test_weights_without_any_size_are_0() -> None:
    assert all((w == 0).all() for w in law.fusion_weights([np.zeros((1, 2, 1))] * 2))


@given(SEEDS, st.floats(0.1, 2), st.floats(0.1, 2))
def test_care_is_the_weighted_sum_of_its_branches(seed: int, a: float, b: float) -> None:
    rng = np.random.default_rng(seed)
    y = rng.standard_normal((2, 3, 8))
    branches = [terms(rng, 8, 3, a), terms(rng, 8, 2, b)]
    moves = [law.project(y, t) - y for t in branches]
    sizes = [np.linalg.norm(move, axis=-1, keepdims=True) for move in moves]
    expected = y + sum(n * m for n, m in zip(sizes, moves, strict=True)) / (sum(sizes) + law.EPS)
    assert np.abs(law.care(y, branches, "adaptive") - expected).max() < NOISE
    for fusion in ("adaptive", "parallel"):  # no branch comes first
        turned = law.care(y, branches[::-1], fusion) - law.care(y, branches, fusion)
        assert np.abs(turned).max() < NOISE
    assert np.abs(law.care(y, branches, "parallel") - y - sum(moves)).max() < NOISE


def test_care_with_one_silent_branch_is_the_other_projection() -> None:
    rng = np.random.default_rng(2)
    y, loud = rng.standard_normal((2, 3, 8)), terms(rng, 8, 3, 1.0)
    silent = Terms(basis(rng, 8, 2), rng.standard_normal(8), 0.0)
    alone = law.project(y, loud)
    # eps over a size of about 1 takes a share of 1e-8 of the change away
    assert np.abs(law.care(y, [loud, silent], "adaptive") - alone).max() < 1e-7


@given(SEEDS, st.floats(-2, 2), st.floats(-2, 2))
def test_sequential_is_the_second_projection_of_the_first(seed: int, a: float, b: float) -> None:
    rng = np.random.default_rng(seed)
    y, visual, text = rng.standard_normal((2, 3, 8)), terms(rng, 8, 3, a), terms(rng, 8, 2, b)
    both = law.care(y, [visual, text], "sequential")
    assert np.abs(both - law.project(law.project(y, visual), text)).max() < NOISE
    remainder = (both - text.centre) @ text.basis
    seen = (law.project(y, visual) - text.centre) @ text.basis
    assert np.abs(remainder - (1 - b) * seen).max() < NOISE


def test_the_order_of_a_sequence_matters_unless_the_subspaces_are_orthogonal() -> None:
    rng = np.random.default_rng(3)
    y, q = rng.standard_normal((2, 3, 8)), basis(rng, 8, 5)
    for two, apart in ((basis(rng, 8, 2), False), (q[:, 3:], True)):
        branches = [Terms(q[:, :3], np.zeros(8), 1.0), Terms(two, np.zeros(8), 1.0)]
        turned = law.care(y, branches[::-1], "sequential")
        change = np.abs(law.care(y, branches, "sequential") - turned).max()
        assert (change < NOISE) if apart else (change > 0.1)
        together = np.abs(law.care(y, branches, "parallel") - turned).max()
        assert (together < NOISE) if apart else (together > 0.1)


@given(SEEDS, st.sampled_from(["parallel", "sequential"]))
def test_parallel_and_sequential_are_affine(seed: int, fusion: law.Fusion) -> None:
    """What lets them fold into the weights; adaptive is not affine."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 1, 3, 8))
    branches = [terms(rng, 8, 3, 1.5), replace(terms(rng, 8, 2, 0.5), gains=np.array([0.3, 2.0]))]

    def bend(fusion: law.Fusion) -> float:
        middle = law.care((a + b) / 2, branches, fusion)
        ends = law.care(a, branches, fusion) + law.care(b, branches, fusion)
        return float(np.abs(middle - ends / 2).max())

    assert bend(fusion) < NOISE
    assert bend("adaptive") > 1e-3


@given(SEEDS)
def test_gains_express_a_basis_that_is_not_orthonormal(seed: int) -> None:
    """U U^T = Q diag(gains) Q^T: columns of unit length that are not orthogonal."""
    rng = np.random.default_rng(seed)
    y, centre, u = rng.standard_normal((2, 3, 8)), rng.standard_normal(8), rng.random((8, 3))
    u /= np.linalg.norm(u, axis=0)
    gains, q = np.linalg.eigh(u @ u.T)
    branch = Terms(q[:, -3:], centre, 0.7, gains[-3:])
    assert np.abs(law.project(y, branch) - (y - 0.7 * (y - centre) @ u @ u.T)).max() < NOISE
    size = np.linalg.norm(law.scaled(y, branch), axis=-1)
    moved = np.linalg.norm(law.project(y, branch) - y, axis=-1)
    assert np.abs(size - moved).max() < NOISE  # the length of the change, gains or not


@given(SEEDS)
def test_gains_of_1_change_nothing_and_of_0_silence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, branches = rng.standard_normal((2, 3, 8)), [terms(rng, 8, 3, 1.0), terms(rng, 8, 2, 0.5)]
    ones = [replace(b, gains=np.ones(b.basis.shape[1])) for b in branches]
    first = replace(branches[0], gains=np.array([1.0, 1.0, 0.0]))
    fewer = replace(branches[0], basis=branches[0].basis[:, :2])
    for fusion in FUSIONS:
        whole = law.care(y, branches, fusion)
        assert (law.care(y, ones, fusion) == whole).all()
        partly = law.care(y, [first, branches[1]], fusion)
        assert np.abs(partly - law.care(y, [fewer, branches[1]], fusion)).max() < NOISE
        assert np.abs(partly - whole).max() > 1e-3


@given(SEEDS, st.floats(-2, 2))
def test_replace_hands_on_the_text_s_coordinates_and_nothing_else(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    y, branch, text = rng.standard_normal((2, 3, 8)), terms(rng, 8, 3, alpha), rng.random((2, 3))
    after = law.replace(y, branch, text)
    assert np.abs(law.coordinates(after, branch) - alpha * text[:, None]).max() < NOISE
    beside = np.eye(8) - branch.basis @ branch.basis.T
    assert np.abs((after - y) @ beside).max() < NOISE


def test_replace_by_its_own_coordinates_is_the_identity() -> None:
    rng = np.random.default_rng(4)
    y, branch = rng.standard_normal((2, 1, 8)), terms(rng, 8, 3, 1.0)
    own = law.coordinates(y, branch)[:, 0]
    assert np.abs(law.replace(y, branch, own) - y).max() < NOISE
    nothing = law.project(y, branch)
    assert np.abs(law.replace(y, branch, 0 * own) - nothing).max() < NOISE  # remove


# ---- ASTRA


def test_astra_removes_along_the_push_what_points_that_way() -> None:
    push, none = np.array([1.0, 0.0]), np.zeros(2)
    y = np.array([[[3.0, 4.0], [-3.0, 4.0], [0.0, 5.0], [5.0, 0.0]]])
    cosines = np.array([0.6, 0.0, 0.0, 1.0])  # the second points away, the third across
    moved = law.astra(y, push, none, 0.5) - y
    assert np.abs(moved[0, :, 0] + 0.5 * cosines * 5).max() < 1e-7  # eps over a length of 5
    assert (moved[0, :, 1] == 0).all()


def test_astra_looks_from_its_reference() -> None:
    push, y = np.array([1.0, 0.0]), np.array([[[1.0, 1.0]]])
    for reference, cosine in (([2.0, 1.0], 0.0), ([0.0, 1.0], 1.0), ([0.0, 0.0], np.sqrt(0.5))):
        moved = (y - law.astra(y, push, np.array(reference), 1.0))[0, 0]
        assert np.abs(moved - [cosine * np.sqrt(2), 0.0]).max() < 1e-7


def test_astra_at_its_reference_is_the_identity() -> None:
    y = np.full((1, 1, 2), 3.0)
    assert (law.astra(y, np.array([1.0, 0.0]), y[0, 0], 4.0) == y).all()


# ---- steer, and edits as a spec names them


@pytest.mark.parametrize("gains", [False, True])
def test_an_edit_by_name_is_the_edit(guard: Callable[..., GuardSpec], gains: bool) -> None:
    y = np.random.default_rng(5).standard_normal((2, 3, 16)).astype(np.float32)
    for fusion in FUSIONS:
        edit = guard("always", f"care {fusion}", gains=gains).edits[0]
        assert (law.edited(y, edit) == law.care(y, edit.branches, fusion)).all()
    for name, function in (("project", law.project), ("add", law.add)):
        edit = guard("always", name, gains=gains).edits[0]
        assert (law.edited(y, edit) == function(y, edit.branches[0])).all()
    whole, text = guard("sequence", "replace").edits[0], np.ones((2, 3), np.float32)
    assert (law.edited(y, whole, text) == law.replace(y, whole.branches[0], text)).all()
    steer, astra = (guard("always", name, strength=0.7).edits[0] for name in ("steer", "astra"))
    assert (law.edited(y, steer) == law.steer(y, steer.push, 0.7)).all()
    assert (law.edited(y, astra) == law.astra(y, astra.push, astra.reference, 0.7)).all()


def test_steer_adds_the_push() -> None:
    y, push = np.zeros((1, 2, 3)), np.array([1.0, 0.0, -1.0])
    assert (law.steer(y, push, 2.0) == [2.0, 0.0, -2.0]).all()


@given(SEEDS)
def test_edits_do_not_mix_rows_or_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, branches = rng.standard_normal((4, 5, 8)), [terms(rng, 8, 3, 1.0), terms(rng, 8, 2, 0.5)]
    rows, tokens = rng.permutation(4), rng.permutation(5)
    push, reference = basis(rng, 8, 1)[:, 0], rng.standard_normal(8)
    edits = [partial(law.care, branches=branches, fusion=fusion) for fusion in FUSIONS]
    for edit in (*edits, partial(law.astra, push=push, reference=reference, strength=2.0)):
        whole = edit(y)
        assert np.abs(edit(y[rows][:, tokens]) - whole[rows][:, tokens]).max() < NOISE
        assert np.abs(edit(y[1:2, 2:3]) - whole[1:2, 2:3]).max() < NOISE
