"""Faults before there is a bundle: in the splits, in the rows, in the guard that fitting makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from guardbake.activations import rows_at
from guardbake.fit.sign_test import Outcome
from guardbake.fit.subspace import discriminative_subspace
from guardbake.samples import Prompt
from guardbake.site import Site
from guardbake.spec import Branch, GuardSpec, Sensor

from tests.mutation.bundles import turned_outside
from tests.mutation.fault import Fault
from tests.mutation.faults_in_pack import each_branch

Rows = npt.NDArray[np.generic]


@dataclass
class FitCase:
    """What fitting works on, sound until a fault is planted.

    splits: prompts by split. site: what is fitted; harmful, harmless: rows [n, d] by site.
    spec: the guard that was fitted; make: what becomes of it before it is tried. ask: its outcome.
    """

    splits: dict[str, Sequence[Prompt]]
    site: Site
    harmful: dict[Site, Rows]
    harmless: dict[Site, Rows]
    spec: GuardSpec
    ask: Callable[[GuardSpec], Outcome]
    make: Callable[[GuardSpec], GuardSpec] = lambda spec: spec

    def fit(self) -> None:
        """Fit a subspace to the rows."""
        pair: list[Mapping[Site, Rows]] = [self.harmful, self.harmless]
        rows = [rows_at(kind, self.site, "the mutation suite") for kind in pair]  # type: ignore[arg-type]
        discriminative_subspace(rows[0], rows[1], 4, 0.1)


def overlap(case: FitCase) -> None:
    case.splits["fit"] = [*case.splits["fit"], case.splits["test"][0]]


def with_nan(case: FitCase) -> None:
    case.harmful[case.site] = case.harmful[case.site].copy()
    case.harmful[case.site][:, 0] = np.nan


def in_float16(case: FitCase) -> None:
    case.harmless[case.site] = case.harmless[case.site].astype(np.float16)


def other_boundary(case: FitCase) -> None:
    case.harmful = {Site(case.site.layer, "residual"): case.harmful[case.site]}


def one_class(case: FitCase) -> None:
    case.harmful[case.site] = case.harmful[case.site][:0]


def made(change: Callable[[GuardSpec], GuardSpec]) -> Callable[[FitCase], None]:
    def plant(case: FitCase) -> None:
        case.make = change

    return plant


def branches(change: Callable[[Branch], Branch]) -> Callable[[FitCase], None]:
    return made(lambda spec: each_branch(spec, change))


def sensors(change: Callable[[Sensor], Sensor]) -> Callable[[FitCase], None]:
    return made(lambda spec: replace(spec, sensors=tuple(change(each) for each in spec.sensors)))


def thresholds(value: float) -> Callable[[FitCase], None]:
    return sensors(lambda s: replace(s, thresholds=tuple(value for _ in s.thresholds)))


def turned(sensor: Sensor) -> Sensor:
    readings = tuple(replace(r, directions=-r.directions) for r in sensor.readings)
    return replace(sensor, readings=readings)


def swap_layers(spec: GuardSpec) -> GuardSpec:
    """The edits' sites in the order of a list that was sorted the wrong way."""
    return replace(spec, edits=tuple(reversed(spec.edits)))


def behind_the_edits(sensor: Sensor) -> Sensor:
    """Moved to the last residual that the model has."""
    last = replace(sensor.readings[-1], site=Site(5, "residual"))
    return replace(sensor, readings=(*sensor.readings[:-1], last))


def scaled(factor: float) -> Callable[[FitCase], None]:
    return branches(lambda b: replace(b, basis=b.basis * np.float32(factor)))


def nan_basis(branch: Branch) -> Branch:
    basis = branch.basis.copy()
    basis[0, 0] = np.nan
    return replace(branch, basis=basis)


def random_basis(branch: Branch) -> Branch:
    """Ten degrees away nine times over: a subspace that has nothing to do with the model."""
    basis = branch.basis
    for _ in range(9):
        basis = turned_outside(basis)
    return replace(branch, basis=basis)


FAULTS: tuple[Fault[FitCase], ...] = (
    Fault("a test prompt among those fitted on", "fit", "splits", overlap),
    Fault("NaN in the activations", "fit", "rows", with_nan),
    Fault("activations in float16", "fit", "rows", in_float16),
    Fault("activations of the other boundary", "fit", "rows", other_boundary),
    Fault("no harmful sample", "fit", "rows", one_class),
    Fault("basis not orthonormal", "fit", "spec", scaled(1.01)),
    Fault("NaN in a basis", "fit", "spec", branches(nan_basis)),
    Fault("threshold at infinity", "fit", "spec", thresholds(np.inf)),
    Fault("layers in the wrong order", "fit", "spec", made(swap_layers)),
    Fault("sensor behind the edit", "fit", "spec", sensors(behind_the_edits)),
    Fault("wrong profile", "fit", "spec", made(lambda spec: replace(spec, profile="always"))),
    Fault("threshold nobody reaches", "fit", "sign test", thresholds(3e38)),
    Fault("sensor direction turned", "fit", "sign test", sensors(turned)),
    Fault(
        "sign flipped", "fit", "sign test", branches(lambda b: replace(b, strength=-b.strength))
    ),
    Fault("alpha so large that no language is left", "fit", "sign test",
          branches(lambda b: replace(b, strength=40 * b.strength))),
    Fault("a subspace of nothing", "fit", "sign test", branches(random_basis)),
)  # fmt: skip
