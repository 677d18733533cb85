"""The self-check sees every planted fault: in the guard's numbers, its gate, its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.bundle.graphs import load_graph
from guardbake.errors import IntegrityError, ParityError, UnsupportedError
from guardbake.passes.functions import DOMAIN
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.steps.feeds import head_size_of
from guardbake.steps.rewrite import insert
from guardbake.steps.self_check import require_session, self_check

Fault = Callable[[ir.Model], None]


def guard_node(model: ir.Model, ending: str) -> ir.Node:
    return next(n for n in model.graph if n.domain == DOMAIN and str(n.name).endswith(ending))


def scaled(array: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    """The guard's array of that name, changed."""

    def fault(model: ir.Model) -> None:
        (name,) = [n for n in model.graph.initializers if n.endswith(array)]
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(change(value.const_value.numpy().copy()), name=name)

    return fault


def one_row_flipped(array: np.ndarray) -> np.ndarray:
    array[3] *= -1
    return array


def always_edited(model: ir.Model) -> None:
    """What a gate that is ignored looks like: the edit takes a constant for its verdict."""
    edit = guard_node(model, "/edit")
    body = model.functions[edit.op_identifier()]
    where = next(node for node in body if node.op_type == "Where")
    where.replace_input_with(2, where.inputs[1])


def led_past(model: ir.Model) -> None:
    """The decoder reads the unguarded value again."""
    edit = guard_node(model, "/edit")
    for use in list(edit.outputs[0].uses()):
        use.node.replace_input_with(use.idx, edit.inputs[0])


def opened_the_other_way(model: ir.Model) -> None:
    gate = next(n for n in model.graph if "TokenGate" in n.op_type)
    body = model.functions[gate.op_identifier()]
    next(node for node in body if node.op_type == "LessOrEqual").op_type = "GreaterOrEqual"


def read_elsewhere(model: ir.Model) -> None:
    """The sensor subtracts its centre twice."""
    node = next(n for n in model.graph if "Reading" in n.op_type)
    body = model.functions[node.op_identifier()]
    matmul = next(n for n in body if n.op_type == "MatMul")
    centre = body.inputs[2]
    again = ir.node("Sub", [matmul.inputs[0], centre], name="again")  # type: ignore[list-item]
    again.outputs[0].name = "again"
    body.insert_before(matmul, again)
    matmul.replace_input_with(0, again.outputs[0])


FAULTS: dict[str, tuple[Fault, str]] = {
    "alpha x 0.9999": (scaled("/scale", lambda a: a * np.float32(0.9999)), "while open"),
    "basis x 1.0001": (scaled("/basis", lambda a: a * np.float32(1.0001)), "while open"),
    "a basis row flipped": (scaled("/basis", one_row_flipped), "while open"),
    "an offset moved": (scaled("/offset", lambda a: a + np.float32(1e-4)), "while open"),
    "a direction x 1.0001": (scaled("/directions", lambda a: a * np.float32(1.0001)), "score"),
    "a centre read twice": (read_elsewhere, "score"),
    "a gate the other way": (opened_the_other_way, "guard_open: other values"),
    "a gate that is ignored": (always_edited, "while closed: other values"),
    "an edit that leads nowhere": (led_past, "changes no logit"),
    "a number that is none": (scaled("/offset", lambda a: a * np.float32(np.nan)), "numbers"),
}


def check(
    path: Path, spec: GuardSpec, fault: Fault | None = None, configured: Path | None = None
) -> dict[str, dict[str, float]]:
    guarded = load_graph(path)
    insert(guarded, spec)
    if fault is not None:
        fault(guarded)
    size = head_size_of(configured or path.parent)
    plain = load_graph(path)
    report = self_check(plain, guarded, spec, path.parent, require_session(), size)
    agreements: dict[str, dict[str, float]] = report["agreements"]
    return agreements


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    graph_of: Callable[[str], Path], foreign_guard: Callable[..., GuardSpec], fault: str
) -> None:
    plant, says = FAULTS[fault]
    with pytest.raises(ParityError, match=says) as caught:
        check(graph_of("genai-int4"), foreign_guard(threshold=0.0), plant)
    assert caught.value.exit_code == 4


# Rounding to the nearest float16 takes up to half a unit of every number, which is that limit.
@pytest.mark.parametrize(
    ("name", "most"), [("genai-fp16", 1.0), ("genai-int4", 0.5), ("mobius", 0.5)]
)
def test_what_is_right_is_within_its_limits(
    graph_of: Callable[[str], Path],
    foreign_guard: Callable[..., GuardSpec],
    name: str,
    most: float,
) -> None:
    """In float32 well within: otherwise it would be a matter of luck."""
    found = check(graph_of(name), foreign_guard("sequence", pools=True))
    assert max(row["worst"] for row in found.values()) < most
    assert found["layers.1.ffn_output while open"]["compared"] > 0


def test_a_sensor_may_read_what_was_not_yet_rounded(
    graph_of: Callable[[str], Path], foreign_guard: Callable[..., GuardSpec]
) -> None:
    """onnxruntime multiplies float16 matrices in float32 on a CPU, and hands that to the sensor."""
    for layer in (0, 1):
        guard = foreign_guard(sensor=Site(layer, "ffn_output"), threshold=0.0)
        found = check(graph_of("genai-fp16"), guard)
        # more than float32 sums of 16 numbers below one explain, less than a rounding to float16
        assert 1e-5 < found["score of gate 0"]["difference"] < 1e-3
        assert found["score of gate 0"]["worst"] < 1
    plant = scaled("/directions", lambda a: a * np.float32(1.01))
    with pytest.raises(ParityError, match="score"):
        check(graph_of("genai-fp16"), guard, plant)


def test_a_fault_that_float16_hides_is_seen_in_float32(
    graph_of: Callable[[str], Path], foreign_guard: Callable[..., GuardSpec]
) -> None:
    """The limit follows the dtype that the graph stores: what float16 rounds away, it allows."""
    plant = FAULTS["alpha x 0.9999"][0]
    assert check(graph_of("genai-fp16"), foreign_guard(threshold=0.0), plant)
    with pytest.raises(ParityError, match="while open"):
        check(graph_of("genai-fp32"), foreign_guard(threshold=0.0), plant)


def test_a_cache_of_unknown_size_is_not_guessed_at(
    graph_of: Callable[[str], Path], foreign_guard: Callable[..., GuardSpec], tmp_path: Path
) -> None:
    assert head_size_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"head_dim": "16"')
    assert head_size_of(tmp_path) is None
    with pytest.raises(UnsupportedError, match="axis 3 of no known size"):
        check(graph_of("genai-fp32"), foreign_guard(), configured=tmp_path)


def test_an_input_that_nobody_knows_is_not_fed_at_random(
    graph_of: Callable[[str], Path], foreign_guard: Callable[..., GuardSpec]
) -> None:
    def strange(model: ir.Model) -> None:
        model.graph.inputs.append(ir.val("temperature", ir.DataType.FLOAT, [1]))

    with pytest.raises(UnsupportedError, match="input temperature"):
        check(graph_of("mobius"), foreign_guard(), strange)


@pytest.mark.parametrize(("layers", "width", "says"), [(3, 16, "2 layers"), (2, 8, "16 columns")])
def test_a_guard_of_another_model_is_told_by_its_size(
    graph_of: Callable[[str], Path],
    foreign_guard: Callable[..., GuardSpec],
    layers: int,
    width: int,
    says: str,
) -> None:
    model = load_graph(graph_of("genai-int8"))
    with pytest.raises(IntegrityError, match=f"a decoder of {says}") as caught:
        insert(model, foreign_guard(layers=layers, width=width))
    assert caught.value.exit_code == 6
