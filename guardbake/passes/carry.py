"""Let a decoding loop that feeds only what it knows carry a guard's state from call to call.

A loop hands two tensors a layer back at each step, found by their names and zero at the start: of a
model with recurrent layers onnxruntime-genai `past_key_values.N.conv_state` and `.recurrent_state`,
transformers.js `past_key_values.N.key` and `.value` in whatever type and sizes the graph declares.
A slot behind the last layer carries `guard_state` and `guard_memory`. The image mask is told from
the token ids, which the first binds to a decoder that asks for them, or read from one more column
of the embeddings, which `passes.mark` gives them.

Requires: a guarded decoder graph whose guard is latched. Leaves: the same graph without the inputs
and outputs that such a loop does not know. Of one call:

    several  = more than one new token, so a prompt, or a turn of a conversation
    state    = 0, undecided until the end of this call, if several; else what the slot carries
    memory   = zeros if several; else what the slot carries
    images   = token ids equal to the image token, or the last column of the embeddings is not zero

onnxruntime-genai binds the slot's input and output to one buffer. So nothing reads the input but a
`Where`, which makes a copy, and what is written to the output follows from that copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from guardbake.errors import SiteError, UnsupportedError
from guardbake.passes.insert import IMAGES_IN, MEMORY_IN, MEMORY_OUT, STATE_IN, STATE_OUT

IDS, EMBEDS = "input_ids", "inputs_embeds"
_BASE = "guardbake/carrier"
_FED = (STATE_IN, IMAGES_IN, MEMORY_IN, EMBEDS)
_GIVEN = (MEMORY_OUT, STATE_OUT)
_Sizes = Sequence[ir.SymbolicDim | int | None]


@dataclass(frozen=True)
class Slot:
    """past, present: names of the slot's inputs and outputs up to their last part, with the dot.
    parts: that last part, of what carries the state and of what carries the memory. image_token:
    the id that stands for image features, None if the model has none, or `marked`: if the
    embeddings' last column tells."""

    past: str
    present: str
    parts: tuple[str, str]
    image_token: int | None = None
    marked: bool = False


class CarryState:
    """The pass. `CarryState(slot)(model)` says whether there was a state to carry."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __repr__(self) -> str:
        return f"CarryState({self.slot.past}*)"

    def __call__(self, model: ir.Model) -> bool:
        graph, slot = model.graph, self.slot
        state, images = _find(graph.inputs, STATE_IN), _find(graph.inputs, IMAGES_IN)
        if state is None:
            return False
        self._refuse(graph, images is not None)
        shell = _Shell(graph, slot)
        batch = state.shape[0] if state.shape is not None else None
        if images is not None:
            shell.tell_images()
        several = shell.op("Greater", [shell.new_tokens(), shell.one], "several")
        shell.carry(STATE_IN, STATE_OUT, several, slot.parts[0], [batch, 1, 1])
        if images is None:
            shell.fill(slot.parts[1], [batch, 1, 1, 1])
        else:
            shell.carry(MEMORY_IN, MEMORY_OUT, several, slot.parts[1], [batch, 1, 1, 3])
        shell.place()
        return True

    def _refuse(self, graph: ir.Graph, images: bool) -> None:
        """What cannot be carried, before anything is changed."""
        for value in (*graph.inputs, *graph.outputs):
            if str(value.name).startswith((self.slot.past, self.slot.present)):
                raise SiteError(
                    found=f"{value.name} in the graph",
                    expected=f"no {self.slot.past}*, where the guard's state would be carried",
                    where="the decoder graph",
                    remedy="check num_hidden_layers in the runtime's configuration",
                )
        told = _find(graph.inputs, EMBEDS) if self.slot.marked else self.slot.image_token
        if images and told is None:
            raise UnsupportedError(
                found="a guard that reads image tokens, and a model that names none",
                expected="image_token_id in the runtime's configuration, or inputs_embeds to mark",
                where="the decoder graph",
                remedy="in a folder for onnxruntime-genai, add the id to genai_config.json, "
                "section model",
            )


class _Shell:
    """The nodes around the guarded graph: some before its first node, some after its last."""

    def __init__(self, graph: ir.Graph, slot: Slot) -> None:
        self.graph, self.slot = graph, slot
        self._before: list[ir.Node] = []
        self._after: list[ir.Node] = []
        self.one = self.constant("one", np.ones(1, np.int64))

    def constant(self, role: str, array: np.ndarray) -> ir.Value:
        name = f"{_BASE}/{role}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def ids(self) -> ir.Value:
        """The call's token ids [B, S], asked for if the decoder takes embeddings alone."""
        found = _find(self.graph.inputs, IDS)
        if found is not None:
            return found
        embeds = _find(self.graph.inputs, EMBEDS)
        rows = None if embeds is None or embeds.shape is None else list(embeds.shape)[:2]
        return self._input(IDS, ir.DataType.INT64, rows or [None, None])

    def new_tokens(self) -> ir.Value:
        """S of the call, [1] int64."""
        source = _find(self.graph.inputs, IDS) or _find(self.graph.inputs, EMBEDS)
        return self.op("Shape", [source or self.ids()], "new_tokens", {"start": 1, "end": 2})

    def tell_images(self) -> None:
        """Compute the image mask from what the loop feeds."""
        if self.slot.marked:
            self._take_mark(_require(self.graph.inputs, EMBEDS))
        else:
            token = self.constant("image_token", np.array(self.slot.image_token, np.int64))
            self.provide(IMAGES_IN, "Equal", [self.ids(), token])

    def _take_mark(self, old: ir.Value) -> None:
        """The embeddings come with a further column, which is the mask."""
        dims = [None, None, None] if old.shape is None else list(old.shape)
        wide = dims[2] + 1 if isinstance(dims[2], int) else None
        embeds = self._input(EMBEDS, old.dtype or ir.DataType.UNDEFINED, [*dims[:2], wide])
        first, last, end = (
            self.constant(f"mark/{role}", np.array([place], np.int64))
            for role, place in (("first", 0), ("last", -1), ("end", np.iinfo(np.int64).max))
        )
        axis = self.constant("mark/axis", np.array([2], np.int64))
        words = self.op("Slice", [embeds, first, last, axis], EMBEDS)
        words.type, words.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, words)
        self.graph.inputs.remove(old)
        mark = self.op("Slice", [embeds, last, end, axis], "mark")
        flat = self.op("Squeeze", [mark, axis], "mark/flat")
        self.provide(IMAGES_IN, "Cast", [flat], {"to": int(ir.DataType.BOOL)})

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        role: str,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes, name=f"{_BASE}/{role}")
        node.outputs[0].name = f"{_BASE}/{role}/output"
        self._before.append(node)
        return node.outputs[0]

    def provide(
        self,
        name: str,
        kind: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int] | None = None,
    ) -> None:
        """Compute what was an input of the guard."""
        old, new = _require(self.graph.inputs, name), self.op(kind, inputs, name, attributes)
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
        self.graph.inputs.remove(old)
        new.name = name

    def carry(self, fed: str, given: str, several: ir.Value, part: str, shape: _Sizes) -> None:
        """The guard's input `fed` comes out of the slot's part, its output `given` goes in."""
        inner = _require(self.graph.inputs, fed)
        dtype = inner.dtype or ir.DataType.UNDEFINED
        past = self._input(f"{self.slot.past}{part}", dtype, shape)
        sizes = np.array([-1] if fed == STATE_IN else [-1, shape[-1]], np.int64)
        flat_sizes = self.constant(f"{part}/flat_sizes", sizes)
        flat = self.op("Reshape", [past, flat_sizes], f"{part}/flat")
        flat.type, flat.shape = inner.type, inner.shape
        zero = self.constant(f"{part}/zero", np.zeros(1, dtype.numpy()))
        self.provide(fed, "Where", [several, zero, flat])
        out = _require(self.graph.outputs, given)
        self.graph.outputs.remove(out)
        whole = self.constant(f"{part}/sizes", np.array([-1, *shape[1:]], np.int64))
        self._give(ir.node("Reshape", [out, whole], name=f"{_BASE}/{given}"), past)

    def fill(self, part: str, shape: _Sizes) -> None:
        """The loop wants both parts of a slot; the one that nobody needs hands itself on."""
        past = self._input(f"{self.slot.past}{part}", ir.DataType.FLOAT, shape)
        self._give(ir.node("Identity", [past], name=f"{_BASE}/unused"), past)

    def _input(self, name: str, dtype: ir.DataType, shape: _Sizes) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def _give(self, node: ir.Node, past: ir.Value) -> None:
        """The node's output becomes the slot's, of the kind that the slot's input has."""
        out = node.outputs[0]
        out.name = f"{self.slot.present}{str(past.name).rpartition('.')[2]}"
        out.type, out.shape = past.type, past.shape
        self._after.append(node)
        self.graph.outputs.append(out)

    def place(self) -> None:
        self.graph.insert_before(self.graph[0], self._before)
        self.graph.extend(self._after)


def bare(model: ir.Model) -> None:
    """Undo `CarryState`, so that the guard can be looked at and run as it was inserted.

    A graph that carries no state is left as it is.
    """
    graph = model.graph
    shell = {str(node.name).removeprefix(f"{_BASE}/"): node for node in graph}
    shell = {role: node for role, node in shell.items() if node.name == f"{_BASE}/{role}"}
    for name in _FED:
        if name in shell:
            old = shell[name].outputs[0]
            new = ir.Value(name=name, type=old.type, shape=old.shape)
            ir.convenience.replace_all_uses_with(old, new)
            graph.inputs.append(new)
    given = [shell[name].inputs[0] for name in _GIVEN if name in shell]
    outside = {node.outputs[0] for node in shell.values()}
    kept = [value for value in graph.outputs if value not in outside]
    graph.outputs.clear()
    graph.outputs.extend([*kept, *(value for value in given if value is not None)])
    read = {value for node in shell.values() for value in node.inputs if value is not None}
    graph.remove(shell.values(), safe=True)
    embeds = _find(graph.inputs, EMBEDS)
    for value in read:
        if value.is_initializer():
            del graph.initializers[str(value.name)]
        elif value in graph.inputs and not value.uses() and (value.name != IDS or embeds):
            graph.inputs.remove(value)


def _find(values: Iterable[ir.Value], name: str) -> ir.Value | None:
    return next((value for value in values if value.name == name), None)


def _require(values: Iterable[ir.Value], name: str) -> ir.Value:
    """The guard's own input or output; a guard that has a state has all of them."""
    return next(value for value in values if value.name == name)
