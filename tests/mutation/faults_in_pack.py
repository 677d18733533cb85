"""Faults in the guard pack: under the digest it states, and as another sound pack in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from guardbake.artifact import load_guard, save_guard
from guardbake.bundle.manifest import GUARD
from guardbake.spec import Branch, Edit, GuardSpec

from tests.mutation.bundles import in_pack, mend, turned_inside, turned_outside
from tests.mutation.fault import Fault

Head, Arrays = dict[str, Any], dict[str, np.ndarray]
Change = Callable[[Head, Arrays], object]


def named(arrays: Arrays, end: str) -> list[str]:
    return sorted(name for name in arrays if name.endswith(end))


def renumber(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def plant(_head: Head, arrays: Arrays) -> None:
        name = named(arrays, end)[0]
        arrays[name] = change(arrays[name])

    return plant


def strengths(factor: float) -> Change:
    def plant(head: Head, _arrays: Arrays) -> None:
        for branch in head["edits"][0]["branches"]:
            branch["strength"] *= factor

    return plant


def swap_layers(_head: Head, arrays: Arrays) -> None:
    first, second = named(arrays, "visual.basis")[:2]
    arrays[first], arrays[second] = arrays[second], arrays[first]


def with_nan(array: np.ndarray) -> np.ndarray:
    array.flat[0] = np.nan
    return array


UNDER_ITS_DIGEST: dict[str, Change] = {
    "basis rotated inside its span": renumber("visual.basis", turned_inside),
    "basis rotated outside its span": renumber("visual.basis", turned_outside),
    "basis not orthonormal": renumber("visual.basis", lambda a: a * np.float32(1.01)),
    "basis in float16": renumber("visual.basis", lambda a: a.astype(np.float16)),
    "NaN in a centre": renumber("visual.centre", with_nan),
    "sign flipped": strengths(-1.0),
    "alpha x 0.9": strengths(0.9),
    "threshold raised": lambda head, _: head["sensors"][0]["thresholds"].__setitem__(0, 1e30),
    "layers swapped": swap_layers,
    "wrong profile": lambda head, _: head.update(profile="always"),
    "another fusion": lambda head, _: head["edits"][0].update(fusion="parallel"),
    "an edit behind no gate": lambda head, _: head["edits"][0].update(gate=1),
    "other polarity": lambda head, _: head.update(polarity="harmless-positive"),
    "an entry nobody reads": lambda head, _: head.update(note="x"),
    "a missing tensor": lambda _, arrays: arrays.pop(named(arrays, "text.centre")[0]),
}


# ---- another pack, whole and sound, in the place of the one that was baked


def instead(change: Callable[[GuardSpec], GuardSpec]) -> Callable[[Path], None]:
    """The manifest and the certificate state the new guard; the graph still has the old one."""

    def plant(bundle: Path) -> None:
        spec = change(load_guard(bundle / GUARD))
        save_guard(spec, bundle / GUARD)
        mend(bundle, guard=spec.digest)

    return plant


def each_branch(spec: GuardSpec, change: Callable[[Branch], Branch]) -> GuardSpec:
    def changed(edit: Edit) -> Edit:
        return replace(edit, branches=tuple(change(branch) for branch in edit.branches))

    return replace(spec, edits=tuple(changed(edit) for edit in spec.edits))


def weaker(spec: GuardSpec) -> GuardSpec:
    return each_branch(spec, lambda b: replace(b, strength=0.9 * b.strength))


def rotated(spec: GuardSpec) -> GuardSpec:
    return each_branch(spec, lambda b: replace(b, basis=turned_inside(b.basis)))


def one_layer_less(spec: GuardSpec) -> GuardSpec:
    return replace(spec, edits=spec.edits[:1])


def of_another_model(bundle: Path) -> None:
    spec = load_guard(bundle / GUARD)
    other = replace(spec, model=replace(spec.model, digest="0" * 64))
    save_guard(other, bundle / GUARD)
    mend(bundle, guard=other.digest)


def cut(bundle: Path) -> None:
    path = bundle / GUARD
    path.write_bytes(path.read_bytes()[:-100])
    mend(bundle)


FAULTS: tuple[Fault[Path], ...] = (
    *(Fault(name, "pack", "pack", in_pack(c)) for name, c in UNDER_ITS_DIGEST.items()),
    Fault("pack cut short", "pack", "pack", cut),
    Fault("pack of another model", "pack", "pack", of_another_model),
    Fault("another pack: alpha x 0.9", "pack", "presence", instead(weaker)),
    Fault("another pack: rotated inside its span", "pack", "presence", instead(rotated)),
    Fault("another pack: one layer less", "pack", "presence", instead(one_layer_less)),
)
