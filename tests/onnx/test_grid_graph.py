"""The index arrays that a vision graph works out of the grids, against those of the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st

from guardbake_onnx.description import VisionGeometry
from guardbake_onnx.grid import vision_inputs
from guardbake_onnx.grid_graph import GRIDS, read_grids
from guardbake_onnx.session import open_graph

INTEGERS = ("position_ids", "window_index", "cu_seqlens", "cu_window_seqlens", "interp_indices")
KINDS = dict.fromkeys(INTEGERS, ir.DataType.INT64) | {"interp_weights": ir.DataType.FLOAT}
sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
geometries = [
    VisionGeometry("qwen2_5_vl", patch, merge, window, 0)
    for patch, merge, window in ((14, 2, 112), (24, 2, 96), (8, 1, 24), (4, 3, 36))
]
geometries += [VisionGeometry("qwen2_vl", 14, 2, 0, 0)]
geometries += [
    VisionGeometry("qwen3_vl", 16, merge, 0, 0, position_side=side)
    for merge, side in ((2, 48), (2, 5), (1, 7))
]


def graph_of(geometry: VisionGeometry) -> bytes:
    """A vision graph of nothing but the index arrays."""
    pixels = np.zeros((geometry.merge**2, 1), np.float32)
    grid = np.array([[1, geometry.merge, geometry.merge]])
    names = sorted(set(vision_inputs(geometry, pixels, grid)) - {"pixel_values"})
    inputs = [ir.val(name, KINDS[name], None) for name in names]
    nodes = [ir.node("Identity", [value]) for value in inputs]
    for name, node in zip(names, nodes, strict=True):
        node.outputs[0].name, node.outputs[0].dtype = f"{name}_out", KINDS[name]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}, name="vision")
    model = ir.Model(graph, ir_version=10)
    read_grids(model, geometry)
    assert [value.name for value in model.graph.inputs] == [GRIDS]
    return bytes(ir.to_proto(model).SerializeToString())


sessions = [(geometry, open_graph(graph_of(geometry), Path())) for geometry in geometries]


@given(which=st.sampled_from(range(len(sessions))), images=st.lists(sizes, min_size=1, max_size=3))
def test_the_graph_computes_what_the_host_does(
    which: int, images: list[tuple[int, int, int]]
) -> None:
    geometry, session = sessions[which]
    merge = geometry.merge
    grids = np.array([(t, h * merge, w * merge) for t, h, w in images], np.int64)
    patches = np.zeros((grids.prod(axis=1).sum(), 1), np.float32)
    wanted = vision_inputs(geometry, patches, grids)
    got = session.run({GRIDS: grids})
    for name in set(wanted) - {"pixel_values"}:
        assert got[f"{name}_out"].tolist() == wanted[name].tolist(), name
