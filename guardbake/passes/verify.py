"""Verify that a graph carries a guard whole: present, unaltered, and with no way round it.

Requires: a decoder graph and the spec it should carry. Leaves: the graph as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from guardbake.errors import IntegrityError, SiteError
from guardbake.passes.edits import edit_function, edit_inputs
from guardbake.passes.functions import (
    DOMAIN,
    gate_function,
    pooling_sensor_function,
    reading_function,
    reading_inputs,
    sensor_function,
    sensor_inputs,
)
from guardbake.passes.insert import (
    DIGEST_KEY,
    FOLD_KEY,
    IMAGES_IN,
    MEMORY_IN,
    MEMORY_OUT,
    OPEN_OUT,
    SCORE_OUT,
    STATE_IN,
    STATE_OUT,
    Told,
    gate_output,
    heard_output,
    is_packed,
    outputs_of,
    text_input,
)
from guardbake.passes.locate import locate
from guardbake.passes.stream import require_only_way
from guardbake.passes.tokens import tokens_function
from guardbake.site import Site
from guardbake.spec import Edit, GuardSpec, Sensor


@dataclass(frozen=True)
class PresenceReport:
    """The guard's call nodes by name, all of them found in place."""

    nodes: tuple[str, ...]


class VerifyGuard:
    """The check. `VerifyGuard(spec)(model)` raises IntegrityError at the first thing amiss."""

    def __init__(self, spec: GuardSpec, where: str) -> None:
        self.spec = spec
        self.where = where
        self.tag = spec.digest[:12]

    def __repr__(self) -> str:
        return f"VerifyGuard({self.tag})"

    def __call__(self, model: ir.Model) -> PresenceReport:
        spec, opset = self.spec, model.opset_imports.get("", 0)
        if FOLD_KEY in model.metadata_props:  # see `verify_fold`
            self._refuse("a folded guard, which has no nodes", "a guard that can be seen")
        if model.metadata_props.get(DIGEST_KEY) != spec.digest:
            self._refuse(
                f"guard {model.metadata_props.get(DIGEST_KEY, 'none')[:12]}", f"guard {self.tag}"
            )
        nodes = [node for node in model.graph if node.domain == DOMAIN]
        told_of_tokens = bool(spec.sensors) and not is_packed(model.graph)
        names = [str(node.name) for node in nodes]
        expected = list(self._expected_nodes(told_of_tokens))
        if sorted(names) != sorted(expected):
            self._refuse(f"guard nodes {sorted(names)}", f"guard nodes {sorted(expected)}")
        calls = dict(zip(names, nodes, strict=True))
        told = self._check_tokens(model, calls, opset) if told_of_tokens else {}
        opens = self._check_gates(model, calls, told, opset)
        for edit in spec.edits:
            open_ = opens[edit.gate] if opens else None
            self._check_edit(model, calls, edit, open_, told, opset)
        self._check_stream(model, calls)
        return PresenceReport(tuple(expected))

    def _refuse(self, found: str, expected: str, cause: SiteError | None = None) -> NoReturn:
        raise IntegrityError(
            found=found,
            expected=expected,
            where=self.where,
            remedy="do not ship this graph: bake it again from the unguarded export",
        ) from cause

    def _locate(self, model: ir.Model, site: Site) -> ir.Value:
        """The site's value. A graph that states the guard's digest had it: its loss is damage."""
        try:
            return locate(model.graph, [site])[site].value
        except SiteError as error:
            self._refuse(error.found, error.expected, cause=error)

    def _expected_nodes(self, told_of_tokens: bool) -> Iterator[str]:
        for gate, sensor in enumerate(self.spec.sensors):
            for site in sensor.sites:
                yield f"guardbake/{site}/{self.tag}/reading.{gate}"
            yield f"guardbake/sensor.{gate}/{self.tag}"
            yield f"guardbake/gate.{gate}/{self.tag}"
        if told_of_tokens:
            yield f"guardbake/tokens/{self.tag}"
        for edit in self.spec.edits:
            yield f"guardbake/{edit.site}/{self.tag}/edit"

    def _check_tokens(self, model: ir.Model, calls: dict[str, ir.Node], opset: int) -> Told:
        """What the guard knows of the tokens is as the law says, and told by the caller alone."""
        node = calls[f"guardbake/tokens/{self.tag}"]
        site = self.spec.sensors[0].sites[0]
        reading = calls[f"guardbake/{site}/{self.tag}/reading.0"]
        function = tokens_function(f"GuardbakeTokens_{self.tag}", self.spec, opset)
        self._check_body(model, node, function)
        fed = ["attention_mask", STATE_IN, MEMORY_IN][: len(function.inputs) - 1]
        self._check_inputs(node, [reading.outputs[0]], fed)
        return outputs_of(model, node)

    def _check_gates(
        self, model: ir.Model, calls: dict[str, ir.Node], told: Told, opset: int
    ) -> list[ir.Value]:
        """Sensors and gates are as the law says; returns the gates' open values."""
        opens: list[ir.Value] = []
        before: list[ir.Value] = []
        for gate, sensor in enumerate(self.spec.sensors):
            features = self._check_readings(model, calls, gate, sensor, opset)
            score, *memory = self._check_sensor(model, calls, gate, sensor, features, told)
            node = calls[f"guardbake/gate.{gate}/{self.tag}"]
            function = gate_function(self.spec, gate, not told, opset)
            self._check_body(model, node, function)
            known = [told[str(each.name)] for each in function.inputs if each.name in told]
            self._check_inputs(node, [score, *known, *before], [])
            self._check_output(model, score, gate_output(SCORE_OUT, gate, self.spec))
            self._check_output(model, node.outputs[0], gate_output(OPEN_OUT, gate, self.spec))
            for value in memory:
                self._check_output(model, value, MEMORY_OUT)
            opens.append(node.outputs[0])
            before = list(node.outputs[1:])
        for value in before:
            self._check_output(model, value, STATE_OUT)
        return opens

    def _check_readings(
        self, model: ir.Model, calls: dict[str, ir.Node], gate: int, sensor: Sensor, opset: int
    ) -> list[ir.Value]:
        """Each reading is as the law says and reads its site; returns their features."""
        features = []
        for reading in sensor.readings:
            base = f"guardbake/{reading.site}/{self.tag}/reading.{gate}"
            node = calls[base]
            function = reading_function(f"GuardbakeReading_L{reading.site.layer}_{self.tag}", opset)
            self._check_body(model, node, function)
            self._check_arrays(node, base, reading_inputs(reading), skip=1)
            self._check_reads(node, 0, self._locate(model, reading.site))
            features.append(node.outputs[0])
        return features

    def _check_sensor(
        self,
        model: ir.Model,
        calls: dict[str, ir.Node],
        gate: int,
        sensor: Sensor,
        features: Sequence[ir.Value],
        told: Told,
    ) -> Sequence[ir.Value]:
        """The sensor is as the law says; returns its outputs."""
        base = f"guardbake/sensor.{gate}/{self.tag}"
        node = calls[base]
        opset, count = model.opset_imports.get("", 0), len(features)
        make = pooling_sensor_function if sensor.pools else sensor_function
        self._check_body(model, node, make(f"GuardbakeSensor_{gate}_{self.tag}", count, opset))
        known = [told["real"], told["tokens"]] if sensor.pools else []
        fed = [IMAGES_IN, MEMORY_IN] if sensor.pools else []
        arrays = sensor_inputs(sensor)
        self._check_arrays(node, base, arrays, skip=count, after=len(known) + len(fed))
        own = [v for v in node.inputs[count : count + len(arrays)] if v is not None]
        self._check_inputs(node, [*features, *own, *known], fed)
        return node.outputs

    def _check_inputs(self, node: ir.Node, values: Sequence[ir.Value], fed: Sequence[str]) -> None:
        """The node reads `values`, then graph inputs called `fed`."""
        if len(node.inputs) != len(values) + len(fed):
            self._refuse(
                f"{node.name} of {len(node.inputs)} inputs", f"{len(values) + len(fed)} inputs"
            )
        for index, value in enumerate(values):
            self._check_reads(node, index, value)
        self._check_fed(node.inputs[len(values) :], fed)

    def _check_fed(self, values: Sequence[ir.Value | None], names: Sequence[str]) -> None:
        """What the guard knows of the call comes from the caller, and from the caller alone."""
        for value, name in zip(values, names, strict=True):
            found = None if value is None else value.name
            if value is None or found != name:
                self._refuse(f"the guard reading {found}", f"the guard reading {name}")
            if not value.is_graph_input() or value.is_initializer():
                self._refuse(f"{name} computed or preset in the graph", "an input of the graph")

    def _check_output(self, model: ir.Model, value: ir.Value, name: str) -> None:
        """Seen outside under its name, as the guard computed it; kept inside of packed tokens."""
        shown = any(out is value for out in model.graph.outputs)
        if value.name != name or shown == is_packed(model.graph):
            kind = "as graph output" if shown else "inside"
            self._refuse(f"{value.name} {kind} for the guard's {name}", "the guard's own outputs")

    def _check_edit(
        self,
        model: ir.Model,
        calls: dict[str, ir.Node],
        edit: Edit,
        open_: ir.Value | None,
        told: Told,
        opset: int,
    ) -> None:
        base = f"guardbake/{edit.site}/{self.tag}"
        node = calls[f"{base}/edit"]
        y = self._locate(model, edit.site)
        self._check_reads(node, 0, y)
        name = f"GuardbakeEdit_{edit.kind}_L{edit.site.layer}_{self.tag}"
        dtype = y.dtype or ir.DataType.FLOAT
        self._check_body(model, node, edit_function(name, edit, dtype, open_ is not None, opset))
        fixed = 1 + (open_ is not None) + 2 * (edit.kind == "replace")
        self._check_arrays(node, base, edit_inputs(edit), skip=fixed)
        if open_ is not None:
            self._check_reads(node, 1, open_)
        if edit.kind == "replace":
            self._check_fed(node.inputs[2:3], [text_input(edit.site)])
            self._check_reads(node, 3, told["last"])
            self._check_output(model, node.outputs[1], heard_output(edit.site))
        for use in y.uses():
            if use.node not in calls.values():
                self._refuse(
                    f"{use.node.op_type} {use.node.name} reads the unguarded {y.name}",
                    f"only the guard to read {edit.site}",
                )
        if any(output is y for output in model.graph.outputs):
            self._refuse(f"{y.name} as a graph output", "the unguarded value kept inside")

    def _check_stream(self, model: ir.Model, calls: dict[str, ir.Node]) -> None:
        """What is read is the data itself; what an edit gives goes on, and nothing without it."""
        spec = self.spec
        edits = {edit.site: calls[f"guardbake/{edit.site}/{self.tag}/edit"] for edit in spec.edits}
        told = [(node, 1) for node in edits.values()] if spec.sensors else []
        told += [(edits[edit.site], 3) for edit in spec.edits if edit.kind == "replace"]
        layers = {site.layer for sensor in spec.sensors for site in sensor.sites}
        for layer in sorted(layers | {site.layer for site in edits}):
            site = Site(layer, "ffn_output")
            edited = edits[site].outputs[0] if site in edits else None
            try:
                product = self._locate(model, site)
                require_only_way(model.graph, site, spec.model.width, product, edited, told)
            except SiteError as error:
                self._refuse(error.found, error.expected, cause=error)

    def _check_reads(self, node: ir.Node, index: int, expected: ir.Value) -> None:
        got = node.inputs[index] if index < len(node.inputs) else None
        if got is not expected:
            self._refuse(
                f"{node.name} reading {got.name if got is not None else None}",
                f"{node.name} reading {expected.name}",
            )

    def _check_body(self, model: ir.Model, node: ir.Node, expected: ir.Function) -> None:
        found = model.functions.get(node.op_identifier())
        if found is None:
            self._refuse(f"no function {node.op_type}", f"a body for {node.name}")
        if _body_bytes(found) != _body_bytes(expected):
            self._refuse(f"another body of function {node.op_type}", "the body of the law")
        if len(node.outputs) != len(expected.outputs):
            self._refuse(f"{node.name} of {len(node.outputs)} outputs", "all of its function's")

    def _check_arrays(
        self,
        node: ir.Node,
        base: str,
        arrays: dict[str, np.ndarray],
        skip: int,
        after: int = 0,
    ) -> None:
        """The node's inputs past the first `skip` and before the last `after` are `arrays`."""
        wanted = skip + len(arrays) + after
        if len(node.inputs) != wanted:
            self._refuse(f"{node.name} with {len(node.inputs)} inputs", f"{wanted}")
        own = node.inputs[skip : wanted - after]
        for value, (key, array) in zip(own, arrays.items(), strict=True):
            tensor = value.const_value if value is not None else None
            if value is None or value.name != f"{base}/{key}" or tensor is None:
                self._refuse(f"{node.name} without the initialiser {key}", f"{base}/{key}")
            if value.is_graph_input():
                self._refuse(f"{value.name} as a graph input", "a constant nobody can override")
            stored = tensor.numpy()
            same = (stored.dtype, stored.shape) == (array.dtype, array.shape)
            if not same or stored.tobytes() != np.ascontiguousarray(array).tobytes():
                self._refuse(f"{value.name} with other numbers", "the numbers of the guard pack")


def _body_bytes(function: ir.Function) -> bytes:
    """The function's inputs, outputs, nodes and attributes, without names of people or places."""
    proto = ir.to_proto(function)
    proto.ClearField("metadata_props")
    proto.ClearField("value_info")
    proto.ClearField("doc_string")
    return bytes(proto.SerializeToString(deterministic=True))
