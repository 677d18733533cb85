"""Ways round a guard that leave every guard node and every reader of the guarded value in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from guardbake.errors import IntegrityError, SiteError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.stream import require_only_way
from guardbake.passes.verify import VerifyGuard
from guardbake.site import Site

from tests.passes.conftest import WIDTH

Fault = Callable[[ir.Model], None]


def node(model: ir.Model, end: str) -> ir.Node:
    return next(n for n in model.graph if str(n.name).endswith(end))


def product(model: ir.Model, layer: int) -> ir.Node:
    return node(model, f"layers.{layer}/mlp/down_proj/MatMul")


def copied(model: ir.Model, layer: int) -> ir.Value:
    """The FFN output once more, out of a node of its own."""
    original = product(model, layer)
    twin = ir.node("MatMul", list(original.inputs), name="twin")
    model.graph.insert_after(original, twin)
    return twin.outputs[0]


def join_times_nothing(model: ir.Model, value: ir.Value) -> None:
    """`value` reaches the logits, and changes nothing there."""
    zero = ir.val("zero", const_value=ir.tensor(np.zeros(1, np.float32), name="zero"))
    model.graph.register_initializer(zero)
    head = node(model, "head")
    nothing = ir.node("Mul", [value, zero], name="nothing")
    joined = ir.node("Add", [head.inputs[0], nothing.outputs[0]], name="joined")
    model.graph.insert_before(head, [nothing, joined])
    head.replace_input_with(0, joined.outputs[0])


def edited(model: ir.Model) -> ir.Value:
    return node(model, "/edit").outputs[0]


def product_copied(model: ir.Model) -> None:
    node(model, "residual_2").replace_input_with(1, copied(model, 2))
    join_times_nothing(model, edited(model))


def sum_copied(model: ir.Model) -> None:
    """The guarded sum stays as it is, beside another one that the head reads."""
    real = node(model, "residual_2")
    twin = ir.node("Add", [real.inputs[0], copied(model, 2)], name="twin sum")
    model.graph.insert_after(real, twin)
    node(model, "head").replace_input_with(0, twin.outputs[0])
    join_times_nothing(model, real.outputs[0])


def undone_before_the_sum(model: ir.Model) -> None:
    """What is added to the edit is the stream, plus the plain product, minus the edit."""
    real = node(model, "residual_2")
    plain = ir.node("Add", [real.inputs[0], copied(model, 2)], name="plain")
    less = ir.node("Sub", [plain.outputs[0], edited(model)], name="less")
    model.graph.insert_before(real, [plain, less])
    real.replace_input_with(0, less.outputs[0])


def undone_after_the_sum(model: ir.Model) -> None:
    real, head = node(model, "residual_2"), node(model, "head")
    plain = ir.node("Add", [real.outputs[0], copied(model, 2)], name="plain")
    less = ir.node("Sub", [plain.outputs[0], edited(model)], name="less")
    model.graph.insert_before(head, [plain, less])
    head.replace_input_with(0, less.outputs[0])


def through_a_branch(model: ir.Model) -> None:
    """The copy is made inside the branches of an If, which reads the stream from outside."""
    real = node(model, "residual_2")
    weight = product(model, 2).inputs[1]
    graphs = []
    for _ in range(2):
        inner = ir.node("MatMul", [product(model, 2).inputs[0], weight], name="inner")
        graphs.append(ir.Graph([], inner.outputs, nodes=[inner], name="branch"))
    true = ir.val("true", const_value=ir.tensor(np.array(True), name="true"))
    model.graph.register_initializer(true)
    attributes = {"then_branch": graphs[0], "else_branch": graphs[1]}
    either = ir.node("If", [true], attributes=attributes, name="either")
    model.graph.insert_before(real, either)
    real.replace_input_with(1, either.outputs[0])
    join_times_nothing(model, edited(model))


def sensor_on_a_decoy(model: ir.Model) -> None:
    """The layer that is sensed goes by another name; what wears its name feeds the sensor alone."""
    real, total = product(model, 0), node(model, "residual_0")
    zero = ir.val("silence", const_value=ir.tensor(np.zeros(1, np.float32), name="silence"))
    model.graph.register_initializer(zero)
    silent = ir.node("Mul", [real.inputs[0], zero], name="silent")
    decoy = ir.node("Mul", [silent.outputs[0], zero], name=str(real.name))
    decoy_sum = ir.node("Add", [silent.outputs[0], decoy.outputs[0]], name="decoy sum")
    name = real.outputs[0].name
    real.name, real.outputs[0].name = "other", "other/output"
    decoy.outputs[0].name = name
    model.graph.insert_after(total, [silent, decoy, decoy_sum])
    node(model, "/reading.0").replace_input_with(0, decoy_sum.outputs[0])


def cache_of_the_plain_stream(model: ir.Model) -> None:
    """What later layers keep for the next call is computed without the guard."""
    real = node(model, "residual_2")
    keys = ir.node("Add", [real.inputs[0], copied(model, 2)], name="keys")
    keys.outputs[0].name = "present.3.key"
    keys.outputs[0].dtype, keys.outputs[0].shape = real.outputs[0].dtype, real.outputs[0].shape
    model.graph.append(keys)
    model.graph.outputs.append(keys.outputs[0])


FAULTS: tuple[Fault, ...] = (
    product_copied,
    sum_copied,
    undone_before_the_sum,
    undone_after_the_sum,
    through_a_branch,
    sensor_on_a_decoy,
    cache_of_the_plain_stream,
)


@pytest.mark.parametrize("plant", FAULTS)
def test_a_way_round_is_refused(lab: Any, guard: Any, plant: Fault) -> None:
    spec = guard("sequence", "care")
    model = lab.insert(lab.toy(), spec)
    VerifyGuard(spec, "the toy")(model)
    plant(model)
    with pytest.raises(IntegrityError, match=r"way round|residual|stream"):
        VerifyGuard(spec, "the toy")(lab.reloaded(model))


def test_the_copied_product_is_the_unguarded_model(lab: Any, guard: Any) -> None:
    """The fault is a real one: no edit acts, though every node and every score is there."""
    spec, feeds = guard("always", "steer"), lab.feeds()
    plain = lab.run(lab.toy().model, feeds)["logits"]
    model = lab.insert(lab.toy(), spec)
    assert not np.allclose(lab.run(model, feeds)["logits"], plain)
    product_copied(model)
    np.testing.assert_array_equal(lab.run(model, feeds)["logits"], plain)


def test_earlier_caches_and_sizes_are_no_way_round(lab: Any, guard: Any) -> None:
    spec, toy = guard("sequence", "care"), lab.toy()
    first = toy.node("residual_0").outputs[0]
    keys = ir.node("Identity", [first], name="keys")
    size = ir.node("Shape", [first], name="size")
    keys.outputs[0].name, size.outputs[0].name = "present.1.key", "size"
    scale = ir.node("Cast", [size.outputs[0]], attributes={"to": ir.DataType.FLOAT}, name="scale")
    most = ir.node("ReduceMax", [scale.outputs[0]], attributes={"keepdims": 0}, name="most")
    head = toy.node("head")
    longer = ir.node("Mul", [head.inputs[0], most.outputs[0]], name="longer")
    toy.model.graph.insert_before(head, [keys, size, scale, most, longer])
    head.replace_input_with(0, longer.outputs[0])
    toy.model.graph.outputs.append(keys.outputs[0])
    VerifyGuard(spec, "the toy")(lab.insert(toy, spec))


def test_a_graph_whose_ffn_meets_no_stream_takes_no_guard(lab: Any, guard: Any) -> None:
    toy = lab.toy()
    total = toy.node("residual_2")
    total.replace_input_with(0, toy.value(1))  # the other product, and not the stream
    with pytest.raises(SiteError, match="computed from another value"):
        require_only_way(toy.model.graph, Site(2, "ffn_output"), WIDTH, toy.value(2))
    with pytest.raises(SiteError) as caught:
        InsertGuard(guard("sequence", "care"))(toy.model)
    assert caught.value.exit_code == 3


def cut(model: ir.Model, start: int, name: str, source: ir.Value, columns: int = WIDTH) -> ir.Value:
    """So many columns of an input, from that one on."""
    bounds = {}
    for role, number in (("start", start), ("end", start + columns), ("axis", -1)):
        called = f"{name} {role}"
        tensor = ir.tensor(np.array([number], np.int64), name=called)
        bounds[role] = ir.val(called, const_value=tensor)
        model.graph.register_initializer(bounds[role])
    node = ir.node("Slice", [source, *bounds.values()], name=name)
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def widened(toy: Any) -> tuple[ir.Value, ir.Value]:
    """Let the toy be fed twice its columns; it takes the first half. Returns both halves."""
    graph = toy.model.graph
    embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")
    wide = ir.Value(name="inputs_embeds", type=embeds.type, shape=ir.Shape(["B", "S", 2 * WIDTH]))
    first, rest = (cut(toy.model, start, f"from {start}", wide) for start in (0, WIDTH))
    first.type, first.shape = embeds.type, embeds.shape
    ir.convenience.replace_all_uses_with(embeds, first)
    graph.inputs[graph.inputs.index(embeds)] = wide
    return first, rest


def test_features_in_columns_behind_the_embeddings_join_the_stream(lab: Any, guard: Any) -> None:
    """As DeepStack's do, whose input of their own is no way round either."""
    spec, toy = guard("sequence", "care"), lab.toy()
    _, rest = widened(toy)
    total = toy.node("residual_0").outputs[0]
    readers = list(total.uses())
    joined = ir.node("Add", [total, rest], name="joined")
    toy.model.graph.insert_after(toy.node("residual_0"), joined)
    for use in readers:
        use.node.replace_input_with(use.idx, joined.outputs[0])
    VerifyGuard(spec, "the toy")(lab.insert(toy, spec))


def widest(model: ir.Model) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == "inputs_embeds")


def all_past(toy: Any) -> None:
    join_times_nothing(toy.model, widened(toy)[0])


def all_but_one_past(toy: Any) -> None:
    """As if they were other columns."""
    widened(toy)
    join_times_nothing(toy.model, cut(toy.model, 1, "around", widest(toy.model)))


def first_columns_too_few(toy: Any) -> None:
    """The layers get one column of the embeddings, the head the others; the loop feeds as ever."""
    graph, wide = toy.model.graph, widest(toy.model)
    readers = list(wide.uses())
    one = cut(toy.model, 0, "one", wide, columns=1)
    zeros = ir.val("none", const_value=ir.tensor(np.zeros(WIDTH, np.float32), name="none"))
    graph.register_initializer(zeros)
    spread = ir.node("Add", [one, zeros], name="spread")
    graph.insert_after(one.producer(), spread)
    for use in readers:
        use.node.replace_input_with(use.idx, spread.outputs[0])
    others = cut(toy.model, 1, "others", wide, columns=WIDTH - 1)
    total = ir.node("ReduceSum", [others], {"keepdims": 1}, name="total")
    graph.insert_after(others.producer(), total)
    join_times_nothing(toy.model, total.outputs[0])


def bounds_that_a_caller_gives(toy: Any) -> None:
    _, rest = widened(toy)
    start = rest.producer().inputs[1]
    toy.model.graph.inputs.append(start)
    join_times_nothing(toy.model, rest)


def cut_inside_a_branch(toy: Any) -> None:
    """Both branches of an If cut the same columns, and what it gives goes on by both ways."""
    graph, wide = toy.model.graph, widest(toy.model)
    readers = list(wide.uses())
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = cut(toy.model, 0, name, wide).producer()
        graph.remove(node)
        branches[name] = ir.Graph([], node.outputs, nodes=[node], name=name)
    true = ir.val("true", const_value=ir.tensor(np.array(True), name="true"))
    graph.register_initializer(true)
    either = ir.node("If", [true], attributes=branches, name="either")
    graph.insert_before(graph[0], either)
    for use in readers:
        use.node.replace_input_with(use.idx, either.outputs[0])
    join_times_nothing(toy.model, either.outputs[0])


@pytest.mark.parametrize(
    "plant",
    [
        all_past,
        all_but_one_past,
        first_columns_too_few,
        bounds_that_a_caller_gives,
        cut_inside_a_branch,
    ],
)
def test_the_embeddings_past_the_guard_are_a_way_round(
    lab: Any, guard: Any, plant: Callable[[Any], None]
) -> None:
    toy = lab.toy()
    plant(toy)
    with pytest.raises(SiteError, match=r"way round|computed from another value|no stream"):
        lab.insert(toy, guard("sequence", "care"))


@pytest.mark.parametrize("name", ["Shape", "Cast", "Add", "Equal"])
def test_operators_of_other_domains_are_not_known_by_their_names(
    lab: Any, guard: Any, name: str
) -> None:
    """A function of the file may be called Shape and hand on the data whole."""
    toy = lab.toy()
    graph, total = toy.model.graph, toy.node("residual_2")
    if name == "Equal":
        told_apart(toy.model, 7)
        node(toy.model, "is 7").domain = "own"
    elif name == "Shape":
        size = ir.node("Shape", [widest(toy.model)], domain="own", name="size")
        graph.insert_before(toy.node("head"), size)
        join_times_nothing(toy.model, size.outputs[0])
    elif name == "Cast":
        cast = ir.node("Cast", [toy.value(2)], domain="own", name="cast")
        graph.insert_before(total, cast)
        total.replace_input_with(1, cast.outputs[0])
    else:
        total.domain = "own"
    with pytest.raises(SiteError, match=r"way round|not a residual add"):
        lab.insert(toy, guard("sequence", "care"))


def told_apart(model: ir.Model, *tokens: int) -> None:
    """The head's input is scaled by whether each token is one of these."""
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(ids)
    head = node(model, "head")
    for token in tokens:
        number = ir.tensor(np.array([token], np.int64), name=f"token {token}")
        value = ir.val(f"token {token}", const_value=number)
        model.graph.register_initializer(value)
        found = ir.node("Equal", [ids, value], name=f"is {token}")
        scale = ir.node("Cast", found.outputs, {"to": ir.DataType.FLOAT}, name=f"cast {token}")
        wide = ir.node("ReduceMax", scale.outputs, {"keepdims": 0}, name=f"any {token}")
        scaled = ir.node("Mul", [head.inputs[0], wide.outputs[0]], name=f"scaled {token}")
        model.graph.insert_before(head, [found, scale, wide, scaled])
        head.replace_input_with(0, scaled.outputs[0])


def test_to_find_one_token_is_no_way_round(lab: Any, guard: Any) -> None:
    """An image's, say, whose tokens see each other; to find several could be to read the text."""
    spec, toy = guard("sequence", "care"), lab.toy()
    told_apart(toy.model, 7)
    VerifyGuard(spec, "the toy")(lab.insert(toy, spec))
    toy = lab.toy()
    told_apart(toy.model, 7, 8)
    with pytest.raises(SiteError, match="way round"):
        lab.insert(toy, spec)


def test_a_cast_may_stand_before_the_sum(lab: Any, guard: Any) -> None:
    spec, toy = guard("sequence", "care"), lab.toy()
    total = toy.node("residual_2")
    cast = ir.node("Cast", [toy.value(2)], {"to": ir.DataType.FLOAT}, name="cast")
    toy.model.graph.insert_before(total, cast)
    total.replace_input_with(1, cast.outputs[0])
    model = lab.insert(toy, spec)
    VerifyGuard(spec, "the toy")(model)
    total = node(model, "residual_2")
    total.replace_input_with(1, copied(model, 2))  # and the cast of the edit goes nowhere
    join_times_nothing(model, node(model, "cast").outputs[0])
    with pytest.raises(IntegrityError, match=r"residual|readers|way round"):
        VerifyGuard(spec, "the toy")(lab.reloaded(model))
