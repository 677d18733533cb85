"""The rewrite stage: unguarded decoder graph in, guarded one out. No torch, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.serde import SerdeError

from guardbake.errors import MalformedError
from guardbake.passes.insert import InsertGuard
from guardbake.passes.verify import VerifyGuard
from guardbake.spec import GuardSpec


def load_graph(path: Path) -> ir.Model:
    """The graph with its weights left on disk; MalformedError if it is not ONNX."""
    try:
        return ir.load(path)
    except (OSError, DecodeError, SerdeError, ValueError, KeyError) as error:
        raise MalformedError(
            found=f"{type(error).__name__}: {error}",
            expected="an ONNX graph",
            where=str(path),
            remedy="export the model again",
        ) from error


def rewrite(source: Path, spec: GuardSpec, target: Path) -> dict[str, Any]:
    """Write the guarded graph to `target`; its external data keeps the name it has beside `source`.

    Returns what was inserted, as JSON values. The result is verified as a reader would find it.
    """
    model = load_graph(source)
    report = InsertGuard(spec)(model)
    ir.save(model, target)
    VerifyGuard(spec, str(target))(load_graph(target))
    return {
        "nodes": list(report.nodes),
        "sites": {str(f.site): {"value": f.value.name, "found_by": f.how} for f in report.found},
    }
