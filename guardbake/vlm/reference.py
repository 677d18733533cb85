"""The guarded model in PyTorch, written from the law and from nothing else.

Hooks read the sensors' sites and replace the FFN outputs; they live inside one context manager and
are gone after it. The graph rewriting never sees this code and this code never sees the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guardbake.errors import UsageError
from guardbake.site import Site
from guardbake.spec import Branch, Edit, GuardSpec, Reading, Sensor

EPS = 1e-8
CLOSED = 1  # and upwards of it a bit for each open gate


class TorchGuard:
    """A guard on its way through one batch.

    Before every forward call set `attention_mask` [B, P + S] and, for a pooling sensor,
    `image_mask` [B, S], the call's image tokens; `state` [B] int64 carries the verdicts from call
    to call (-n undecided until real token n, 0 undecided until the end of the call, then 1 and
    2**g for each open gate g), `memory` [B, 3] float64 what a pooling sensor needs of earlier calls
    (sum over image tokens, their number, real tokens fed). After a call: `scores`, one [B, S] a
    gate in float32 or wider, `opens`, one [B, S] bool a gate, `reached[site]` and `edited[site]`
    [B, S, d] are what the guard saw and did. A guard with `replace` edits wants `hear` before its
    first call.
    """

    def __init__(self, spec: GuardSpec, state: Tensor) -> None:
        self.spec = spec
        self.state = state
        self.memory = torch.zeros(len(state), 3, dtype=torch.float64)
        self.attention_mask = torch.ones(len(state), 0, dtype=torch.long)
        self.image_mask = torch.zeros(len(state), 0, dtype=torch.bool)
        self.scores: list[Tensor] = []
        self.opens: list[Tensor] = []
        self.reached: dict[Site, Tensor] = {}
        self.edited: dict[Site, Tensor] = {}
        self.text: dict[Site, Tensor] = {}
        self._edits = [(edit, _EditTensors(edit)) for edit in spec.edits]
        self._features: list[list[Tensor]] = [[] for _ in spec.sensors]
        self._given = state

    def read(self, gate: int, reading: Reading, x: Tensor) -> None:
        """Take features of a gate's sensor from x [B, S, d]; its last reading of a call decides."""
        self.reached[reading.site] = x
        x = _wide(x)
        directions = torch.tensor(reading.directions, dtype=x.dtype)
        features = (x - torch.tensor(reading.centre, dtype=x.dtype)) @ directions
        self._features[gate].append(features)
        if reading is self.spec.sensors[gate].readings[-1]:
            total = torch.stack(self._features[gate]).sum(0)
            self._features[gate] = []
            self._sense(gate, total)

    def _sense(self, gate: int, features: Tensor) -> None:
        """features [B, S, C]: score them and open or close the gate."""
        sensor, mask = self.spec.sensors[gate], self.attention_mask
        tokens = features.shape[1]
        real = mask[:, -tokens:].bool()
        if gate == 0:
            self._begin(real)
        if sensor.pools:
            score = self._pool(features, real, sensor)
        else:
            score = features[..., 0] - sensor.thresholds[0]
        above = ~(score <= 0)
        self.scores.append(score)
        if self.spec.profile == "token":
            self.opens.append(above & real)
            return
        position = mask.cumsum(1)[:, -tokens:]
        rows = [
            self._decide(gate, row, position[row], real[row], above[row])
            for row in range(len(mask))
        ]
        self.opens.append(torch.stack(rows))

    def _begin(self, real: Tensor) -> None:
        """The first gate's turn: a new call. Whose end, or image tokens, went by unread is open."""
        self.scores, self.opens = [], []
        earlier = self.attention_mask.sum(1) - real.sum(1)
        missed = (self.state < 0) & (earlier >= -self.state)
        if self.spec.pools:
            missed |= (self.state <= 0) & (earlier != self.memory[:, 2])
        self.state[missed] = 2 ** len(self.spec.sensors)  # fail closed
        self._given = self.state.clone()

    def _pool(self, features: Tensor, real: Tensor, sensor: Sensor) -> Tensor:
        """Scores [B, S] that average over the image tokens so far; moves `memory` on."""
        last, pooled = features.unbind(-1)
        text, visual, pooled_limit = sensor.thresholds
        image = self.image_mask & real
        total = self.memory[:, :1] + torch.where(image, pooled.double(), 0.0).cumsum(1)
        count = self.memory[:, 1:2] + image.cumsum(1)
        tokens = self.memory[:, 2] + real.sum(1)
        self.memory = torch.stack([total[:, -1], count[:, -1], tokens], 1).detach()
        mean = (total / count.clamp(min=1)).to(last.dtype)
        accused = torch.maximum(last - visual, last + mean - pooled_limit)
        return torch.where(count > 0, accused, last - text)

    def _decide(self, gate: int, row: int, position: Tensor, real: Tensor, above: Tensor) -> Tensor:
        """One sequence: open [S] for this call; adds the gate's verdict to `state[row]`."""
        given = int(self._given[row])
        if given >= CLOSED:
            return real if (given - CLOSED) >> gate & 1 else torch.zeros_like(real)
        end = -given if given < 0 else int(self.attention_mask[row].sum())
        decider = real & (position == end)
        if not decider.any():
            return torch.zeros_like(real)
        verdict = bool(above[decider].any())
        self.state[row] = max(int(self.state[row]), CLOSED) + (verdict << gate)
        return real & (position >= end) if verdict else torch.zeros_like(real)

    @property
    def text_sites(self) -> list[Site]:
        """Where `hear` wants rows."""
        return [edit.site for edit in self.spec.edits if edit.kind == "replace"]

    def hear(self, rows: Mapping[Site, Tensor]) -> None:
        """Keep what the text-only pass said: unguarded FFN outputs of its last token, [B, d]."""
        for edit, tensors in self._edits:
            if edit.kind == "replace":
                self.text[edit.site] = tensors.branches[0].coordinates(_wide(rows[edit.site]))

    def edit(self, edit: Edit, tensors: _EditTensors, y: Tensor) -> Tensor:
        """y [B, S, d] with the edit where the gate is open, in y's dtype."""
        self.reached[edit.site] = y
        full = torch.finfo(y.dtype)
        text = self.text.get(edit.site)
        edited = tensors.apply(edit, _wide(y), text).clamp(full.min, full.max).to(y.dtype)
        if self.spec.sensors:
            edited = self.where_open(edit.gate, edited, y)
        self.edited[edit.site] = edited
        return edited

    def where_open(self, gate: int, edited: Tensor, y: Tensor) -> Tensor:
        """`edited` where the gate is open and y elsewhere, [B, S, d] all."""
        return torch.where(self.opens[gate][..., None], edited, y)

    @contextmanager
    def installed(self, layers: nn.ModuleList, ffn: str) -> Iterator[TorchGuard]:
        """Hooks on decoder `layers`, whose FFN is the submodule named `ffn`; removed on exit."""
        with ExitStack() as stack:
            for gate, sensor in enumerate(self.spec.sensors):
                for reading in sensor.readings:
                    see = partial(self.read, gate, reading)
                    stack.enter_context(on_site(layers, ffn, reading.site, see))
            for edit, tensors in self._edits:
                stack.enter_context(on_site(layers, ffn, edit.site, self._editor(edit, tensors)))
            yield self

    def _editor(self, edit: Edit, tensors: _EditTensors) -> Callable[[Tensor], Tensor]:
        return lambda y: self.edit(edit, tensors, y)


class _EditTensors:
    """An edit's arrays as float32 tensors."""

    def __init__(self, edit: Edit) -> None:
        self.push = None if edit.push is None else torch.tensor(edit.push)
        self.reference = None if edit.reference is None else torch.tensor(edit.reference)
        self.branches = [_BranchTensors(branch) for branch in edit.branches]

    def apply(self, edit: Edit, y: Tensor, text: Tensor | None) -> Tensor:
        """The edit with the gate open, y [B, S, d] float32 or float64; text [B, k] for replace."""
        if self.push is not None:
            return y + edit.strength * self._push(self.push.to(y.dtype), y)
        if edit.fusion == "sequential":
            for branch in self.branches:
                y = y - branch.part(y)
            return y
        if edit.kind == "replace":
            return self._replaced(self.branches[0], y, text, edit.site)
        parts = [branch.part(y) for branch in self.branches]
        if edit.kind == "add":
            return y + parts[0]
        if edit.kind == "project" or edit.fusion == "parallel":
            return y - sum(parts[1:], start=parts[0])
        sizes = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in parts]
        total = sizes[0] + sizes[1] + EPS
        weighted: Tensor = (sizes[0] / total) * parts[0] + (sizes[1] / total) * parts[1]
        return y - weighted

    def _replaced(
        self, branch: _BranchTensors, y: Tensor, text: Tensor | None, site: Site
    ) -> Tensor:
        if text is None:
            raise UsageError(
                found="no text-only pass",
                expected="the rows of one, given to TorchGuard.hear",
                where=f"the edit at {site}",
                remedy="run the requests without their images first",
            )
        wanted = branch.alpha * text.to(y.dtype)[:, None] - branch.coordinates(y)
        return y + wanted @ branch.basis.to(y.dtype).T

    def _push(self, push: Tensor, y: Tensor) -> Tensor:
        """The change at strength 1: a constant, or with a reference ASTRA's (arXiv 2411.16721)."""
        if self.reference is None:
            return push
        away = y - self.reference.to(y.dtype)
        toward = (away * push).sum(-1, keepdim=True)
        cosine = toward / (away.square().sum(-1, keepdim=True).sqrt() + EPS)
        return -cosine.clamp(0, 1) * y.square().sum(-1, keepdim=True).sqrt() * push


class _BranchTensors:
    """One branch's arrays as float32 tensors."""

    def __init__(self, branch: Branch) -> None:
        self.basis, self.centre = torch.tensor(branch.basis), torch.tensor(branch.centre)
        self.alpha = float(branch.strength)
        self.gains = None if branch.gains is None else torch.tensor(branch.gains)

    def coordinates(self, y: Tensor) -> Tensor:
        """z = (y - mu) Q in y's dtype."""
        return (y - self.centre.to(y.dtype)) @ self.basis.to(y.dtype)

    def part(self, y: Tensor) -> Tensor:
        """What the branch takes out of y, in y's dtype: alpha (gains * z) Q^T."""
        z = self.coordinates(y)
        if self.gains is not None:
            z = z * self.gains.to(y.dtype)
        part: Tensor = self.alpha * z @ self.basis.to(y.dtype).T
        return part


def _wide(x: Tensor) -> Tensor:
    """x in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def on_site(
    layers: nn.ModuleList, ffn: str, site: Site, see: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `see` with the site's tensor [B, S, d]; a tensor it returns takes that one's place."""
    module = layers[site.layer]
    if site.boundary == "ffn_output":
        module = module.get_submodule(ffn)
    with on_output(module, see):
        yield


@contextmanager
def on_output(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with what `module` returns, the first of a tuple; what `see` returns, if it is a
    tensor, takes that one's place."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        seen = see(tensor)
        if seen is None:
            return None
        return (seen, *output[1:]) if isinstance(output, tuple) else seen

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
