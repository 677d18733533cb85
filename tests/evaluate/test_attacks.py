"""PGD on the tiny VLM: within its bound, stronger with a wider one, and through a guard."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guardbake.errors import MalformedError, UsageError
from guardbake.evaluate.arms import Arm
from guardbake.evaluate.attacks.compliance import Compliance
from guardbake.evaluate.attacks.found import Found, Target, attack, load_found, save_found
from guardbake.evaluate.attacks.pgd import Budget, search
from guardbake.samples.natural import natural_picture
from guardbake.samples.readers import read
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.runner import in_float64

SIDE, COUNT = 192, 6
BUDGET = Budget(eps=16, steps=5, step=0.25, seed=0)
TURN = "sure , first get the parts"


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


def quiet() -> None:
    """Nobody watches."""


def target(arm: Arm, universal: bool = False) -> Target:
    prompts = read("file:tiny-prompts/harmful_test.txt", models_root(), "harmful")[:COUNT]
    clean = [np.asarray(natural_picture(SIDE, SIDE, str(n))) for n in range(COUNT)]
    return Target(arm, [p.prompt for p in prompts], np.stack(clean), [TURN] * COUNT, universal)


@pytest.fixture(scope="module")
def spec(vlm: Vlm, guard: Any) -> GuardSpec:
    """A gate that is open for half of the prompts, on a direction that means nothing."""
    made: GuardSpec = guard(
        "sequence", "steer", width=128, layers=6, sensor=Site(2, "residual"), edits=(4,),
        threshold=0.0, strength=1.0,
    )  # fmt: skip
    return _centred(vlm, made)


def _centred(vlm: Vlm, spec: GuardSpec) -> GuardSpec:
    """The guard with its last gate's thresholds moved to the middle of the prompts' scores."""
    some = target(Arm("a", spec))
    score = Compliance(vlm, some.arm, some.texts, some.clean, some.turns).measure(some.clean).score
    assert score is not None
    middle = np.sort(score)[COUNT // 2 - 1 : COUNT // 2 + 1].mean()
    *others, sensor = spec.sensors
    moved = tuple(float(threshold + middle) for threshold in sensor.thresholds)
    return replace(spec, sensors=(*others, replace(sensor, thresholds=moved)))


@pytest.fixture(scope="module")
def found(vlm: Vlm) -> dict[int, Found]:
    """By eps, on the undefended model."""
    return {
        eps: attack(vlm, target(Arm("undefended")), replace(BUDGET, eps=eps), quiet)
        for eps in (1, 4, 16)
    }


def test_images_are_eight_bit_and_within_the_bound(found: dict[int, Found]) -> None:
    clean = target(Arm("undefended")).clean.astype(int)
    for eps, one in found.items():
        assert one.images.dtype == np.uint8
        moved = np.abs(one.images.astype(int) - clean)
        assert moved.max() == eps
        assert (moved > 0).mean() > 0.5


def test_a_wider_bound_makes_compliance_likelier(found: dict[int, Found]) -> None:
    clean = found[1].before
    surprise = [clean.mean(), *(found[eps].after.mean() for eps in (1, 4, 16))]
    assert all(after < before for before, after in pairwise(surprise))
    assert surprise[-1] < 0.2 * surprise[0]
    # how many prompts are likelier than not to be answered with the whole turn
    tokens = 6
    won = [(one * tokens < np.log(2)).sum() for one in (clean, *(f.after for f in found.values()))]
    assert won == sorted(won)
    assert won[-1] > won[0]


def test_the_same_arguments_give_the_same_bytes(vlm: Vlm, found: dict[int, Found]) -> None:
    undefended = target(Arm("undefended"))
    again = attack(vlm, undefended, replace(BUDGET, eps=4), quiet)
    assert again.images.tobytes() == found[4].images.tobytes()
    other = attack(vlm, undefended, replace(BUDGET, eps=4, seed=1), quiet)
    assert other.images.tobytes() != found[4].images.tobytes()


def test_what_is_found_is_never_worse_than_the_clean_image() -> None:
    clean = np.full((2, 1, 1, 3), 100, np.uint8)

    def hill(images: torch.Tensor) -> torch.Tensor:  # the clean image is the best there is
        return (images - 100 / 255).abs().sum((1, 2, 3))

    assert (search(clean, hill, BUDGET, quiet) == clean).all()


@pytest.mark.parametrize(
    "wrong", [{"eps": 0}, {"eps": 256}, {"steps": 0}, {"step": 0.0}, {"step": 2.0}]
)
def test_impossible_budgets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        replace(BUDGET, **wrong)


# ---- through a guard


def test_an_adaptive_attack_closes_gates(vlm: Vlm, spec: GuardSpec) -> None:
    one = attack(vlm, target(Arm("guard", spec)), BUDGET, quiet)
    assert (one.score_before > 0).sum() == COUNT // 2
    assert (one.score_after > 0).sum() < COUNT // 2
    assert (one.after < one.before).all()


def test_a_canned_arm_is_attacked_at_its_gate_and_answers_unguarded(
    vlm: Vlm, spec: GuardSpec
) -> None:
    canned = target(Arm("gate-only", spec, canned="no"))
    one = attack(vlm, canned, BUDGET, quiet)
    plain = Compliance(vlm, Arm("undefended"), canned.texts, canned.clean, canned.turns)
    assert np.abs(one.before - plain.measure(canned.clean).surprise).max() < 1e-5
    assert (one.score_after > 0).sum() < (one.score_before > 0).sum()


@pytest.mark.parametrize(
    ("profile", "kind", "pools"),
    [
        ("sequence", "steer", False),
        ("token", "steer", False),
        ("sequence", "replace", False),
        ("sequence", "steer", True),
    ],
)
def test_a_sharp_surrogate_is_the_guard(
    vlm: Vlm, guard: Any, profile: str, kind: str, pools: bool
) -> None:
    """... so that what is lowered is what is judged."""
    sites = (Site(1, "residual"), Site(2, "residual"))
    made = guard(
        profile, kind, width=128, layers=6, sensor=sites, pools=pools, edits=(4,), threshold=0.0
    )
    sharp_is_hard(vlm, _centred(vlm, made))


@pytest.mark.parametrize("profile", ["sequence", "token"])
def test_a_sharp_surrogate_has_a_gate_an_edit(vlm: Vlm, guard: Any, profile: str) -> None:
    """The first gate stays shut, so that the second one's score is the guard's."""
    made: GuardSpec = guard(
        profile, "steer", width=128, layers=6, sensor=Site(1, "residual"),
        later=(Site(3, "residual"),), edits=(2, 4), threshold=0.0,
    )  # fmt: skip
    shut = replace(made.sensors[0], thresholds=(1e30,))
    sharp_is_hard(vlm, _centred(vlm, replace(made, sensors=(shut, made.sensors[1]))))


def sharp_is_hard(vlm: Vlm, spec: GuardSpec) -> None:
    some = target(Arm("guard", spec))
    loss = Compliance(vlm, some.arm, some.texts, some.clean, some.turns)
    loss._unit = 1e-6
    image = torch.from_numpy(some.clean) / 255
    with torch.no_grad():
        (soft, score), (hard, same) = (loss._run(image, soft=soft) for soft in (True, False))
    assert score is not None
    assert same is not None
    assert int((score > 0).sum()) == COUNT // 2
    assert float((score - same).abs().max()) < 1e-4
    assert float((soft - hard).abs().max()) < 1e-5
    undefended = Compliance(vlm, Arm("undefended"), some.texts, some.clean, some.turns)
    moved = np.abs(undefended.measure(some.clean).surprise - hard.numpy())
    assert (moved[score > 0] > 1e-3).all()
    # a gate of its own for every token edits other tokens of the prompt, too
    assert spec.profile == "token" or (moved[score <= 0] < 1e-5).all()


def test_the_gradient_passes_through_gate_and_edit(vlm: Vlm, spec: GuardSpec) -> None:
    """Against differences of the loss itself, along the gradient."""
    some = target(Arm("guard", spec))
    loss = Compliance(vlm, some.arm, some.texts, some.clean, some.turns)
    image = (torch.from_numpy(some.clean) / 255).requires_grad_()
    (slope,) = torch.autograd.grad(loss(image).sum(), image)
    expected = slope.flatten(1).norm(dim=1)
    along = slope / expected[:, None, None, None]
    errors = []
    for reach in (0.02, 0.01):
        with torch.no_grad(), in_float64(vlm):
            rise = loss(image.double() + reach * along) - loss(image.double() - reach * along)
        errors.append(float((rise / (2 * reach) / expected - 1).abs().max()))
    # what is left is the third derivative's, a quarter of it at half the reach
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)
    assert errors[1] < 0.01
    undefended = Compliance(vlm, Arm("undefended"), some.texts, some.clean, some.turns)
    (other,) = torch.autograd.grad(undefended(image).sum(), image)
    assert float((other - slope).abs().max()) > 0.1 * float(slope.abs().max())


# ---- one image for all, and files


def test_a_universal_image_serves_every_prompt(vlm: Vlm) -> None:
    one = attack(vlm, target(Arm("undefended"), universal=True), BUDGET, quiet)
    assert one.images.shape == (1, SIDE, SIDE, 3)
    assert one.after.shape == (COUNT,)
    assert one.after.mean() < 0.5 * one.before.mean()


def test_a_file_gives_back_what_was_found(found: dict[int, Found], tmp_path: Path) -> None:
    save_found(found[4], tmp_path / "a.safetensors")
    again = load_found(tmp_path / "a.safetensors")
    assert again.images.tobytes() == found[4].images.tobytes()
    assert again.after.tolist() == found[4].after.tolist()
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    with pytest.raises(MalformedError):
        load_found(tmp_path / "b.safetensors")


def test_a_key_names_everything_but_the_arm_s_name(vlm: Vlm, spec: GuardSpec) -> None:
    plain = target(Arm("undefended"))
    keys = [
        plain.key(vlm, BUDGET),
        plain.key(vlm, replace(BUDGET, seed=1)),
        replace(plain, texts=[*plain.texts[:-1], "other"]).key(vlm, BUDGET),
        replace(plain, clean=plain.clean[::-1].copy()).key(vlm, BUDGET),
        replace(plain, turns=["no"] * COUNT).key(vlm, BUDGET),
        target(Arm("x", spec)).key(vlm, BUDGET),
        target(Arm("x", spec, canned="no")).key(vlm, BUDGET),
        target(Arm("x", preamble="Be safe.")).key(vlm, BUDGET),
        target(Arm("x"), universal=True).key(vlm, BUDGET),
    ]
    assert len({str(key) for key in keys}) == len(keys)
    assert target(Arm("another name")).key(vlm, BUDGET) == keys[0]
    assert not any(text in str(keys) for text in plain.texts)
