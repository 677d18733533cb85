"""Planted faults of single kinds of edit, beside those of every guard in test_verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.errors import IntegrityError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.spec import GuardSpec

FUSIONS = ("adaptive", "parallel", "sequential")
Fault = Callable[[ir.Model], None]


def verify(spec: GuardSpec, model: ir.Model) -> None:
    VerifyGuard(spec, "the toy")(model)


def renumber(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """Other numbers of the same shape in the initialiser whose name ends so."""

    def plant(model: ir.Model) -> None:
        value = next(v for name, v in model.graph.initializers.items() if name.endswith(end))
        assert value.const_value is not None
        value.const_value = ir.tensor(change(value.const_value.numpy()), name=value.name)

    return plant


def unclipped(model: ir.Model) -> None:
    """ASTRA's edit also pushes what points away."""
    body = next(f for key, f in model.functions.items() if "Edit" in key[1])
    clip = next(n for n in body if n.op_type == "Clip")
    (use,) = clip.outputs[0].uses()
    use.node.replace_input_with(use.idx, clip.inputs[0])


BRANCHES_SWAPPED: Fault = renumber("/basis", lambda a: np.roll(a, 2, axis=1))
OF_KIND: dict[str, dict[str, Fault]] = {
    "care parallel": {
        "gains x 1.01": renumber("/scale", lambda a: a * np.float32([1, 1, 1, 1.01, 1.01])),
        "branches swapped": BRANCHES_SWAPPED,
    },
    "care sequential": {
        "gains x 1.01": renumber("/mix", lambda a: a * np.float32([1, 1, 1, 1.01, 1.01])),
        "the second branch sees y": renumber("/mix", lambda a: np.diag(np.diag(a))),
        "the order turned": renumber("/mix", lambda a: np.ascontiguousarray(a.T)),
        "branches swapped": BRANCHES_SWAPPED,
    },
    "astra": {
        "reference flipped": renumber("/reference", np.negative),
        "push flipped": renumber("/push", np.negative),
        "alpha x 0.9": renumber("/strength", lambda a: a * np.float32(0.9)),
        "no floor under the cosine": unclipped,
    },
}


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, faults in OF_KIND.items() for n in faults]
)
def test_a_planted_fault_of_one_kind_is_refused(lab: Any, guard: Any, kind: str, name: str) -> None:
    spec = guard("sequence", kind, gains=True)
    model = lab.insert(lab.toy(), spec)
    verify(spec, model)
    OF_KIND[kind][name](model)
    with pytest.raises(IntegrityError, match="do not ship"):
        verify(spec, lab.reloaded(model))


@pytest.mark.parametrize("made", FUSIONS)
@pytest.mark.parametrize("meant", FUSIONS)
def test_another_fusion_is_refused_whatever_the_graph_states(
    lab: Any, guard: Any, made: str, meant: str
) -> None:
    """The same arrays under another fusion, wearing digest and names of the guard asked for."""
    spec, other = guard("token", f"care {meant}"), guard("token", f"care {made}")
    worn = InsertGuard(other)
    worn.tag = spec.digest[:12]
    toy = lab.toy()
    worn(toy.model)
    toy.model.metadata_props["guardbake.guard"] = spec.digest
    model = lab.reloaded(toy.model)
    if made == meant:
        verify(spec, model)
    else:
        with pytest.raises(IntegrityError, match=r"another body|initialiser|inputs"):
            verify(spec, model)
