"""Verify that a graph is another one with a guard folded into its weights, and nothing besides.

A folded guard leaves no node to look at, and its weights alone do not tell what they were. So this
check needs the graph it was folded from: it folds that one again and compares. Without the original
nothing can be said, and `VerifyGuard` refuses such a graph.
"""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.errors import IntegrityError
from guardbake.passes.fold import FoldGuard, FoldReport, Read, array_of, sha256_of
from guardbake.passes.insert import DIGEST_KEY, FOLD_KEY
from guardbake.spec import GuardSpec

Array = npt.NDArray[Any]
# One unit in the last place, relative: two machines may round a float64 sum to either neighbour.
_ULP = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
_CANCELLED = 2.0**-40  # float64 noise of numbers that cancel, relative to the largest one


class VerifyFold:
    """The check. `VerifyFold(spec, where, original)(model)` raises IntegrityError at what differs.

    original: the unguarded graph, which is folded in place and is of no other use afterwards.
    What lies in external files that both graphs read at the same place is not read here.
    """

    def __init__(
        self, spec: GuardSpec, where: str, original: ir.Model, read: Read = array_of
    ) -> None:
        self.spec = spec
        self.where = where
        self.original = original
        self.read = read

    def __repr__(self) -> str:
        return f"VerifyFold({self.spec.digest[:12]})"

    def __call__(self, model: ir.Model) -> FoldReport:
        stated = model.metadata_props.get(DIGEST_KEY, "none")
        if stated != self.spec.digest:
            self._refuse(f"guard {stated[:12]}", f"guard {self.spec.digest[:12]}")
        sites = self._stated_sites(model)
        report = FoldGuard(self.spec, self.read)(self.original)
        if sorted(sites) != sorted(report.sites):
            self._refuse(f"folded sites {sorted(sites)}", f"{sorted(report.sites)}")
        folded = set()
        for site, wanted in report.sites.items():
            for role in ("weight", "bias"):
                self._check_tensor(model, f"{role} of {site}", sites[site].get(role), wanted[role])
                folded |= {wanted[role]["name"]} if wanted[role] else set()
        require_same(model, self.original, self.where, folded)
        return report

    def _refuse(self, found: str, expected: str) -> NoReturn:
        _refuse(found, expected, self.where)

    def _stated_sites(self, model: ir.Model) -> dict[str, dict[str, Any]]:
        text = model.metadata_props.get(FOLD_KEY, "")
        try:
            sites = json.loads(text)
        except (ValueError, RecursionError):
            sites = None
        if not isinstance(sites, dict) or any(
            not isinstance(each, dict) for each in sites.values()
        ):
            self._refuse(f"{FOLD_KEY} = {text[:40]!r}", "a record of what was folded where")
        return sites

    def _check_tensor(
        self, model: ir.Model, what: str, stated: Any, wanted: dict[str, Any] | None
    ) -> None:
        """The record names the right tensors, and the new one holds the right numbers."""
        told = {k: v for k, v in stated.items() if k != "sha256"} if stated else None
        true = {k: v for k, v in wanted.items() if k != "sha256"} if wanted else None
        if told != true:
            self._refuse(f"a record of {what} that is of another fold", "the record of this one")
        if wanted is None:
            return
        value = model.graph.initializers.get(wanted["name"])
        if value is None or value.const_value is None or value.is_graph_input():
            self._refuse(f"no constant {wanted['name']}", f"the folded {what}")
        fresh = self.original.graph.initializers[wanted["name"]].const_value
        assert fresh is not None
        tensor = value.const_value
        if (tensor.dtype, tensor.shape) != (fresh.dtype, fresh.shape):
            self._refuse(f"{what} as {tensor.dtype} {tensor.shape}", f"{fresh.dtype} {fresh.shape}")
        stored = self.read(tensor)
        digest = sha256_of(stored)
        if digest == wanted["sha256"]:
            return
        if digest != stated.get("sha256"):
            self._refuse(f"{what} with sha256 {digest[:12]}", f"{stated.get('sha256')!s:.12}")
        if not _same_but_for_rounding(stored, fresh.numpy(), _ULP[fresh.dtype]):
            self._refuse(f"{what} with other numbers", "the numbers that the guard pack gives")


def _same_but_for_rounding(stored: Array, exact: Array, ulp: float) -> bool:
    for mine, theirs in zip(np.atleast_2d(stored), np.atleast_2d(exact), strict=True):
        wide = theirs.astype(np.float64)
        slack = ulp * np.abs(wide) + _CANCELLED * np.abs(wide).max()
        if not (np.abs(mine.astype(np.float64) - wide) <= slack).all():
            return False
    return True


def require_same(
    model: ir.Model, expected: ir.Model, where: str, besides: AbstractSet[str] = frozenset()
) -> None:
    """Raises IntegrityError unless both graphs compute the same, weights outside taken as read.

    besides: initialisers that were compared before. An external tensor is the same if it lies at
    the same place of a file of the same name.
    """
    found, wanted = _fingerprint(model, besides), _fingerprint(expected, besides)
    for part in wanted:
        if found[part] != wanted[part]:
            _refuse(
                f"other {part}", f"the {part} that the unguarded graph and the guard give", where
            )


def _refuse(found: str, expected: str, where: str) -> NoReturn:
    raise IntegrityError(
        found=found,
        expected=expected,
        where=where,
        remedy="do not ship this graph: apply the guard to the unguarded export again",
    )


def _fingerprint(model: ir.Model, besides: AbstractSet[str]) -> dict[str, Any]:
    """Everything a graph computes with, but the numbers of some initialisers."""
    graph = model.graph

    def plain(item: Any) -> bytes:
        return bytes(ir.to_proto(item).SerializeToString(deterministic=True))

    return {
        "opsets": dict(model.opset_imports),
        "functions": {key: plain(function) for key, function in model.functions.items()},
        "inputs": [plain(value) for value in graph.inputs],
        "outputs": [plain(value) for value in graph.outputs],
        "nodes": [plain(node) for node in graph],
        "initialisers": {
            name: None if name in besides else _place(value.const_value)
            for name, value in graph.initializers.items()
        },
    }


def _place(tensor: ir.TensorProtocol | None) -> Any:
    """Where an external tensor lies, or what another one holds."""
    if isinstance(tensor, ir.ExternalTensor):
        kind = (tensor.dtype, [str(size) for size in tensor.shape])
        return str(tensor.location), tensor.offset or 0, tensor.nbytes, kind
    return None if tensor is None else (tensor.dtype, tensor.numpy().shape, tensor.tobytes())
