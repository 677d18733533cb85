"""Insert a guard into a decoder graph: one visible model-local function a site.

Requires: located sites with known dtype, an `attention_mask` input or packed tokens for gated
profiles, and a graph that carries no guard yet. Leaves: the same graph with the sensors, a gate
each, one node that tells them of the call's tokens (`tokens`), and one edit a site; a `sequence`
guard adds the input `guard_state` [B] int64 and the output `guard_state_out`; gated profiles add
the outputs `guard_score` [B, S] float32 and `guard_open` [B, S] bool, of several gates one each:
`guard_score_0`, `guard_score_1` and so on. A `replace` edit adds the input `guard_text_<layer>`
[B, k] float32 and the output `guard_heard_<layer>` [B, k]: feed the prompt without its images and
`guard_state` closed, and what is heard is the prompt's text.

Packed tokens are those of all sequences in one row, as TensorRT Edge-LLM feeds them: none is
padding, so a gate that decides token by token needs neither a mask nor the node `tokens`. Its score
and verdict stay inside: the loop that feeds such a graph knows no further outputs. A gate that
latches for a sequence is refused there: it would need to know which token ends which prompt, and a
state for each that comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from guardbake.errors import SiteError, UnsupportedError
from guardbake.passes.edits import edit_function, edit_inputs
from guardbake.passes.functions import (
    DOMAIN,
    MIN_OPSET,
    gate_function,
    pooling_sensor_function,
    reading_function,
    reading_inputs,
    sensor_function,
    sensor_inputs,
)
from guardbake.passes.locate import Found, locate
from guardbake.passes.stream import require_only_way
from guardbake.passes.tokens import tokens_function
from guardbake.site import Site
from guardbake.spec import Edit, GuardSpec, Reading, Sensor

Told = Mapping[str, ir.Value]
"""What the guard knows of the call's tokens, by the names of `tokens_function`'s outputs."""

DIGEST_KEY = "guardbake.guard"
FOLD_KEY = "guardbake.fold"
SITE_KEY = "guardbake.site"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
STATE_IN, STATE_OUT = "guard_state", "guard_state_out"
IMAGES_IN = "guard_image_mask"
MEMORY_IN, MEMORY_OUT = "guard_memory", "guard_memory_out"
SCORE_OUT, OPEN_OUT = "guard_score", "guard_open"
_MASK, _STARTS = "attention_mask", "query_start_offsets"


@dataclass(frozen=True)
class InsertReport:
    """What was inserted: the guard's nodes by name, and how each site was found."""

    nodes: tuple[str, ...]
    found: tuple[Found, ...]


@dataclass(frozen=True)
class _Gates:
    """opens: by which each gate opens, [B,S] bool; told: of the tokens of the call."""

    opens: Sequence[ir.Value]
    told: Told


class InsertGuard:
    """The pass. `InsertGuard(spec)(model)` changes the model in place."""

    def __init__(self, spec: GuardSpec) -> None:
        self.spec = spec
        self.tag = spec.digest[:12]

    def __repr__(self) -> str:
        return f"InsertGuard({self.tag})"

    def __call__(self, model: ir.Model) -> InsertReport:
        refuse_guarded(model)
        spec, graph = self.spec, model.graph
        sites = {edit.site for edit in spec.edits}
        sites |= {site for sensor in spec.sensors for site in sensor.sites}
        found = locate(graph, sorted(sites, key=lambda site: site.depth))
        opset = self._opset(model)
        for edit in spec.edits:
            self._refuse_untyped(found[edit.site])
        for layer in sorted({site.layer for site in sites}):
            site = Site(layer, "ffn_output")
            require_only_way(graph, site, spec.model.width, locate(graph, [site])[site].value)
        # nothing is changed before this line: a refused graph stays as it was
        mask = self._mask(graph) if spec.sensors else None
        nodes: list[ir.Node] = []
        gates = _Gates((), {})
        if spec.sensors:
            nodes, gates = self._gates(model, found, mask, opset)
        for edit in spec.edits:
            nodes.append(self._edit(model, found[edit.site].value, edit, gates, opset))
        model.opset_imports[DOMAIN] = 1
        model.metadata_props[DIGEST_KEY] = spec.digest
        return InsertReport(tuple(str(node.name) for node in nodes), tuple(found.values()))

    def _opset(self, model: ir.Model) -> int:
        opset = model.opset_imports.get("", 0)
        if opset < MIN_OPSET:
            raise UnsupportedError(
                found=f"opset {opset}",
                expected=f"opset {MIN_OPSET} or later",
                where="the decoder graph",
                remedy="convert the graph with onnx.version_converter, or export it again",
            )
        return opset

    def _refuse_untyped(self, found: Found) -> None:
        if found.value.dtype not in _FLOATS:
            raise SiteError(
                found=f"{found.value.name} with dtype {found.value.dtype}",
                expected="a float dtype on the guarded value",
                where=f"{found.site} of the decoder graph",
                remedy="run ONNX shape inference on the graph first",
            )

    def _mask(self, graph: ir.Graph) -> ir.Value | None:
        """Which tokens are real; None where all are."""
        mask = next((v for v in graph.inputs if v.name == _MASK), None)
        if mask is None and is_packed(graph):
            self._refuse_latched()
        elif mask is None:
            raise SiteError(
                found=f"inputs {[v.name for v in graph.inputs][:4]}",
                expected="an input attention_mask, from which the gate knows the real tokens",
                where="the decoder graph",
                remedy="export the decoder with an attention mask, or use the profile always",
            )
        return mask

    def _refuse_latched(self) -> None:
        if self.spec.profile == "sequence":
            raise UnsupportedError(
                found="packed tokens: which of them end a prompt changes from call to call, and no "
                "state comes back",
                expected="rows of one sequence each, for a guard of profile sequence",
                where="the decoder graph",
                remedy="use the profile always or token",
            )

    def _gates(
        self, model: ir.Model, found: Mapping[Site, Found], mask: ir.Value | None, opset: int
    ) -> tuple[list[ir.Node], _Gates]:
        """Every sensor and its gate, in order, and before them what is known of the tokens."""
        nodes: list[ir.Node] = []
        opens: list[ir.Value] = []
        before: list[ir.Value] = []  # the verdicts of the gates so far
        told: Told = {}
        for gate, sensor in enumerate(self.spec.sensors):
            readings = [
                self._reading(model, found[reading.site].value, gate, reading, opset)
                for reading in sensor.readings
            ]
            nodes += readings
            if mask is not None and not told:
                nodes.append(self._tokens(model, readings[0], mask, opset))
                told = outputs_of(model, nodes[-1])
            score_node = self._sensor(model, readings, gate, sensor, told, opset)
            gate_node = self._gate(model, score_node, gate, told, before, opset)
            nodes += [score_node, gate_node]
            opens.append(gate_node.outputs[0])
            before = list(gate_node.outputs[1:])
        for value in before:
            _expose(model, value, STATE_OUT)
        return nodes, _Gates(opens, told)

    def _tokens(self, model: ir.Model, reading: ir.Node, mask: ir.Value, opset: int) -> ir.Node:
        """After the first reading, whose features have the call's tokens, for all that follow."""
        batch, sizes = _sizes(mask)[:1], _sizes(reading.outputs[0])
        fed = []
        if self.spec.profile == "sequence":
            fed.append(ir.val(STATE_IN, ir.DataType.INT64, batch))
        if self.spec.pools:
            fed.append(ir.val(MEMORY_IN, ir.DataType.FLOAT, [*batch, 3]))
        model.graph.inputs.extend(fed)
        function = tokens_function(f"GuardbakeTokens_{self.tag}", self.spec, opset)
        inputs = [reading.outputs[0], mask, *fed]
        node = self._call(model, function, inputs, f"guardbake/tokens/{self.tag}")
        kinds = {"known": ir.DataType.INT64, "tokens": ir.DataType.FLOAT}
        for name, value in outputs_of(model, node).items():
            shape = [*batch, 1] if name in kinds else sizes
            _describe(value, kinds.get(name, ir.DataType.BOOL), shape)
        model.graph.insert_after(reading, node)
        return node

    def _reading(
        self, model: ir.Model, x: ir.Value, gate: int, reading: Reading, opset: int
    ) -> ir.Node:
        name = f"GuardbakeReading_L{reading.site.layer}_{self.tag}"
        base = f"guardbake/{reading.site}/{self.tag}/reading.{gate}"
        inputs = [x, *self._register(model, base, reading_inputs(reading))]
        node = self._call(model, reading_function(name, opset), inputs, base)
        node.metadata_props[SITE_KEY] = str(reading.site)
        columns = reading.directions.shape[1]
        _describe(node.outputs[0], ir.DataType.FLOAT, [*_sizes(x), columns])
        model.graph.insert_after(_producer(x), node)
        return node

    def _sensor(
        self,
        model: ir.Model,
        readings: Sequence[ir.Node],
        gate: int,
        sensor: Sensor,
        told: Told,
        opset: int,
    ) -> ir.Node:
        """After the last reading: the score and, of a pooling sensor, its memory."""
        base, name = f"guardbake/sensor.{gate}/{self.tag}", f"GuardbakeSensor_{gate}_{self.tag}"
        features = [node.outputs[0] for node in readings]
        inputs = [*features, *self._register(model, base, sensor_inputs(sensor))]
        count = len(readings)
        if sensor.pools:
            memory = next(v for v in model.graph.inputs if v.name == MEMORY_IN)
            images = ir.val(IMAGES_IN, ir.DataType.BOOL, _sizes(features[0]))
            model.graph.inputs.append(images)
            function = pooling_sensor_function(name, count, opset)
            inputs += [told["real"], told["tokens"], images, memory]
            node = self._call(model, function, inputs, base)
            _describe(node.outputs[1], ir.DataType.FLOAT, [*_sizes(memory)[:1], 3])
            _expose(model, node.outputs[1], MEMORY_OUT)
        else:
            node = self._call(model, sensor_function(name, count, opset), inputs, base)
        _describe(node.outputs[0], ir.DataType.FLOAT, _sizes(features[0]))
        last = _latest(model.graph, [*readings, *(_producer(each) for each in told.values())])
        model.graph.insert_after(last, node)
        _expose(model, node.outputs[0], gate_output(SCORE_OUT, gate, self.spec))
        return node

    def _gate(
        self,
        model: ir.Model,
        score_node: ir.Node,
        gate: int,
        told: Told,
        before: Sequence[ir.Value],
        opset: int,
    ) -> ir.Node:
        """told: nothing if tokens are packed. before: the verdicts of the gates before it."""
        score = score_node.outputs[0]
        function = gate_function(self.spec, gate, not told, opset)
        known = [told[str(each.name)] for each in function.inputs if each.name in told]
        inputs = [score, *known, *before]
        node = self._call(model, function, inputs, f"guardbake/gate.{gate}/{self.tag}")
        for state_out in node.outputs[1:]:
            _describe(state_out, ir.DataType.INT64, _sizes(known[-1])[:1])
        _describe(node.outputs[0], ir.DataType.BOOL, _sizes(score))
        model.graph.insert_after(score_node, node)
        _expose(model, node.outputs[0], gate_output(OPEN_OUT, gate, self.spec))
        return node

    def _edit(
        self,
        model: ir.Model,
        y: ir.Value,
        edit: Edit,
        gates: _Gates,
        opset: int,
    ) -> ir.Node:
        assert y.dtype is not None
        users = [use for use in y.uses() if use.node.domain != DOMAIN]
        name = f"GuardbakeEdit_{edit.kind}_L{edit.site.layer}_{self.tag}"
        base = f"guardbake/{edit.site}/{self.tag}"
        gate = [gates.opens[edit.gate]] if gates.opens else []
        told = self._text(model.graph, edit, gates.told)
        inputs = [y, *gate, *told, *self._register(model, base, edit_inputs(edit))]
        function = edit_function(name, edit, y.dtype, bool(gate), opset)
        node = self._call(model, function, inputs, f"{base}/edit")
        node.metadata_props[SITE_KEY] = str(edit.site)
        edited = node.outputs[0]
        edited.dtype, edited.shape = y.dtype, y.shape
        if told:
            _describe(node.outputs[1], ir.DataType.FLOAT, _sizes(told[0]))
            _expose(model, node.outputs[1], heard_output(edit.site))
        after = _latest(model.graph, [_producer(y), *(_producer(value) for value in gate)])
        model.graph.insert_after(after, node)
        for user in users:
            user.node.replace_input_with(user.idx, edited)
        for index, output in enumerate(model.graph.outputs):
            if output is y:
                model.graph.outputs[index] = edited
        return node

    def _text(self, graph: ir.Graph, edit: Edit, told: Told) -> list[ir.Value]:
        """What an edit replace is fed besides y: the text-only coordinates, and the last tokens."""
        if edit.kind != "replace":
            return []
        batch, rank = _sizes(told["known"])[0], edit.branches[0].basis.shape[1]
        text = ir.val(text_input(edit.site), ir.DataType.FLOAT, [batch, rank])
        graph.inputs.append(text)
        return [text, told["last"]]

    def _register(
        self, model: ir.Model, base: str, arrays: dict[str, np.ndarray]
    ) -> list[ir.Value]:
        values = []
        for key, array in arrays.items():
            tensor = ir.tensor(np.array(array, order="C"), name=f"{base}/{key}")
            value = ir.val(f"{base}/{key}", const_value=tensor)
            model.graph.register_initializer(value)
            values.append(value)
        return values

    def _call(
        self, model: ir.Model, function: ir.Function, inputs: Sequence[ir.Value], name: str
    ) -> ir.Node:
        model.functions[function.identifier()] = function
        node = ir.Node(DOMAIN, function.name, inputs, num_outputs=len(function.outputs), name=name)
        for declared, output in zip(function.outputs, node.outputs, strict=True):
            output.name = f"{name}/{declared.name}"
        return node


def is_packed(graph: ir.Graph) -> bool:
    """Whether a call's tokens stand in one row, whichever sequences they belong to."""
    names = {value.name for value in graph.inputs}
    return _STARTS in names and _MASK not in names


def refuse_guarded(model: ir.Model) -> None:
    """Raises UnsupportedError if the graph carries a guard, as nodes or folded."""
    if DIGEST_KEY in model.metadata_props or any(d == DOMAIN for d, _, _ in model.functions):
        raise UnsupportedError(
            found=f"guard {model.metadata_props.get(DIGEST_KEY, 'of unknown digest')[:12]}",
            expected="a decoder graph without a guard",
            where="the graph's metadata and model-local functions",
            remedy="start from the unguarded export",
        )


def outputs_of(model: ir.Model, node: ir.Node) -> dict[str, ir.Value]:
    """The outputs of a call, by what its function calls them."""
    declared = model.functions[node.op_identifier()].outputs
    return {str(d.name): value for d, value in zip(declared, node.outputs, strict=True)}


def _latest(graph: ir.Graph, nodes: Iterable[ir.Node]) -> ir.Node:
    """The one that comes last in the graph."""
    return max(nodes, key=list(graph).index)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise SiteError(
            found=f"{value.name}, which no node computes",
            expected="a value computed in the graph",
            where="the decoder graph",
            remedy="check that the graph is the model's decoder",
        )
    return node


def gate_output(name: str, gate: int, spec: GuardSpec) -> str:
    """What a gate's score or open value is called outside: with its number if there are several."""
    return name if len(spec.sensors) == 1 else f"{name}_{gate}"


def text_input(site: Site) -> str:
    """The graph input that takes an edit replace's text-only coordinates."""
    return f"guard_text_{site.layer}"


def heard_output(site: Site) -> str:
    """The graph output that gives the coordinates of a call's last token."""
    return f"guard_heard_{site.layer}"


def _sizes(value: ir.Value) -> list[int | str | None]:
    """The first two sizes as `value` spells them: [batch, sequence] of most."""
    dims = list(value.shape)[:2] if value.shape is not None else ["batch", "sequence"]
    return [dim.value if isinstance(dim, ir.SymbolicDim) else dim for dim in dims]


def _describe(value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str | None]) -> None:
    value.dtype, value.shape = dtype, ir.Shape(shape)


def _expose(model: ir.Model, value: ir.Value, name: str) -> None:
    """Call `value` by `name` and make it a graph output, unless the tokens are packed."""
    value.name = name
    if not is_packed(model.graph):
        model.graph.outputs.append(value)
