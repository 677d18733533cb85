"""The rewrite stage: unguarded decoder graph in, guarded one out. No torch, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from guardbake.bundle.graphs import load_graph
from guardbake.errors import IntegrityError
from guardbake.passes.admit import admit
from guardbake.passes.branches import decoders, require_twins
from guardbake.passes.carry import CarryState, Slot, bare
from guardbake.passes.dtypes import settle_dtypes
from guardbake.passes.fold import FoldGuard
from guardbake.passes.insert import FOLD_KEY, InsertGuard, InsertReport, refuse_guarded
from guardbake.passes.locate import locate
from guardbake.passes.locate_stream import read_stream
from guardbake.passes.verify import VerifyGuard
from guardbake.passes.verify_fold import VerifyFold, require_same
from guardbake.spec import GuardSpec

Array = npt.NDArray[Any]


def load_decoder(path: Path) -> ir.Model:
    """The unguarded graph, of a kind that we read; UnsupportedError or MalformedError if not."""
    model = load_graph(path)
    admit(model, str(path))
    return model


def insert(model: ir.Model, spec: GuardSpec) -> dict[str, InsertReport]:
    """Put the guard into every decoder of the graph; the reports by branch ("" if there is none).

    Raises SiteError or UnsupportedError; of the model, nothing is promised then.
    """
    refuse_guarded(model)
    reports = {}
    for branch, decoder in decoders(model):
        edited = locate(decoder.graph, [edit.site for edit in spec.edits])
        _require_size(decoder.graph, spec, [each.value for each in edited.values()])
        settle_dtypes(each.value for each in edited.values())
        reports[branch] = InsertGuard(spec)(decoder)
    for edit in spec.edits:
        places = [each for report in reports.values() for each in report.found]
        require_twins([p.value for p in places if p.site == edit.site], str(edit.site))
    return reports


def _require_size(graph: ir.Graph, spec: GuardSpec, values: Sequence[ir.Value]) -> None:
    """IntegrityError if the decoder has other layers or another width than the guard's model.

    A folder of another tool does not say which model it holds; this much its graph may show.
    """
    layers = len(read_stream(graph).ffn_outputs)
    widths = {value.shape[-1] for value in values if value.shape is not None and len(value.shape)}
    seen = [("layers", layers, spec.model.layers)] if layers else []
    seen += [("columns", each, spec.model.width) for each in widths if isinstance(each, int)]
    for what, found, wanted in seen:
        if found != wanted:
            raise IntegrityError(
                found=f"a decoder of {found} {what}",
                expected=f"{wanted}, as has the model for which the guard was fitted",
                where="the decoder graph",
                remedy="fit a guard for this model with guardbake fit",
            )


def rewrite(
    source: Path, spec: GuardSpec, target: Path, slot: Slot | None = None
) -> dict[str, Any]:
    """Write the guarded graph to `target`; its external data keeps the name it has beside `source`.

    slot: where a latched guard's state is carried if the caller does not feed it. Returns what was
    inserted and how each site was found, as JSON values. The result is verified as a reader would
    find it.
    """
    model = load_decoder(source)
    reports = insert(model, spec)
    carried = slot is not None and CarryState(slot)(model)
    ir.save(model, target)
    _require_guard(load_graph(target), spec, target)
    sites = {
        f"{branch}: {found.site}" if branch else str(found.site): {
            "value": found.value.name,
            "found_by": found.how,
            "confirmed": found.confirmed,
            "missed": [str(miss) for miss in found.missed],
        }
        for branch, report in reports.items()
        for found in report.found
    }
    nodes = [name for report in reports.values() for name in report.nodes]
    carrier = f"{slot.past}*" if slot is not None and carried else None
    return {"nodes": nodes, "sites": sites, "carried_by": carrier}


def _require_guard(model: ir.Model, spec: GuardSpec, where: Path) -> None:
    bare(model)
    for _, decoder in decoders(model):
        VerifyGuard(spec, str(where))(decoder)


def fold(source: Path, spec: GuardSpec, target: Path) -> dict[str, Any]:
    """Write the graph with the guard folded into its weights, and those into their own data file.

    All other external data keeps the name it has beside `source`; the weights that were folded stay
    there too, unread. Returns what was folded where, as JSON values. The result is compared with
    another fold of `source`, as a reader would find it.
    """
    model = load_decoder(source)
    report = FoldGuard(spec, array_beside)(model)
    changed = [model.graph.initializers[name] for name in report.changed]
    tensors = [value.const_value for value in changed if value.const_value is not None]
    if tensors:
        name = f"{target.stem}.folded.data"
        stored = ir.external_data.convert_tensors_to_external(tensors, target.parent, name)
        for value, tensor in zip(changed, stored, strict=True):
            value.const_value = tensor
    ir.save(model, target)
    verify_rewritten(target, spec, source)
    return {"sites": report.sites}


def verify_rewritten(target: Path, spec: GuardSpec, source: Path, slot: Slot | None = None) -> bool:
    """Check that `target` is the unguarded graph `source` with the guard, and nothing besides.

    slot: where its state would be carried, as `rewrite` was told. Returns whether the guard is
    folded into the weights. Raises IntegrityError at the first thing amiss; the data files of
    weights that were not folded are not read.
    """
    model, original = load_graph(target), load_graph(source)
    if FOLD_KEY in model.metadata_props:
        VerifyFold(spec, str(target), original, array_beside)(model)
        return True
    _require_guard(model, spec, target)
    model = load_graph(target)
    insert(original, spec)
    if slot is not None:
        CarryState(slot)(original)
    require_same(model, original, str(target))
    return False


def array_beside(tensor: ir.TensorProtocol) -> Array:
    """The tensor's array; the file beside the graph that holds it may have several hard links.

    onnx-ir refuses such a file, which is what `apply` makes of a weights file that it shares.
    Raises IntegrityError if the data is not there whole.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    path = Path(tensor.path)
    end = (tensor.offset or 0) + tensor.nbytes
    size = path.stat().st_size if path.is_file() and path.name == str(tensor.location) else -1
    if size < end:
        raise IntegrityError(
            found=f"{path.name} with {size} bytes"
            if size >= 0
            else f"no file {tensor.location!r:.80}",
            expected=f"at least {end} bytes beside the graph, for {tensor.name!r:.80}",
            where=str(path.parent),
            remedy="copy the graph's external data again",
        )
    alone = ir.ExternalTensor(
        path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
    )
    return alone.numpy()
