"""Runs the PyTorch model, guarded by the reference or not, call by call with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from guardbake.batch import Batch, prefill_stops
from guardbake.plugins import EDITED, REACHED, Trace, first_end
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import Prompt, prepare
from guardbake.vlm.reference import TorchGuard, on_site

Array = npt.NDArray[Any]
Pick = Callable[[Tensor, int], Tensor]
"""Chooses a token [B] of each row from its logits [B, V], at step 0, 1, ... of the answer."""


class Session:
    """One batch on its way through the decoder: its cache, its mask, its guard."""

    def __init__(self, vlm: Vlm, prompt: Prompt, spec: GuardSpec | None) -> None:
        self.vlm = vlm
        self.prompt = prompt
        self.cache = DynamicCache()
        self.fed = 0
        self._decoder: nn.Module = vlm.model.get_submodule(vlm.family.decoder)
        self._head: nn.Module = vlm.model.get_submodule(vlm.family.head)
        last = prompt.positions.amax(-1, keepdim=True)
        self._next = last.amax(0, keepdim=True).expand_as(last) if last.ndim == 3 else last
        self.guard = self._guard(spec)

    def guarded(self) -> AbstractContextManager[object]:
        """The guard's hooks, while open; nothing for an unguarded session."""
        if self.guard is None:
            return nullcontext()
        layers = self.vlm.model.get_submodule(self.vlm.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return self.guard.installed(layers, self.vlm.family.feed_forward)

    @property
    def resumes(self) -> int:
        """The first column that differs for another guard of the same prompt, whose cache before
        it stays: the last token's, or 0 where tokens before that see it."""
        mutual = self.prompt.mutual
        return 0 if mutual is not None and mutual[:, -1].any() else self.prompt.mask.shape[1] - 1

    def feed(self, stop: int) -> Tensor:
        """Prompt tokens up to `stop`, not including it: hidden states [B, stop - fed, d].

        They must not end between tokens that see each other, see `batch.prefill_stops`.
        """
        start, deepstack = self.fed, self.prompt.deepstack
        if start == stop:
            return self.prompt.embeds[:, :0]
        return self._call(
            self.prompt.embeds[:, start:stop],
            self.prompt.positions[..., start:stop],
            self.prompt.mask[:, :stop],
            self.prompt.image[:, start:stop],
            None if deepstack is None else deepstack[:, :, start:stop],
        )

    def step(self, tokens: Tensor) -> Tensor:
        """New tokens [B, n] after the whole prompt: hidden states [B, n, d]."""
        new = self.fed - self.prompt.mask.shape[1]
        offset = torch.arange(new + 1, new + 1 + tokens.shape[1])
        mask = torch.cat(
            [self.prompt.mask, self.prompt.mask.new_ones(len(tokens), new + tokens.shape[1])], 1
        )
        embeds = self.vlm.model.get_input_embeddings()(tokens)
        words = torch.zeros_like(tokens, dtype=torch.bool)
        return self._call(embeds, self._next + offset, mask, words)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, n, V] float32."""
        out: Tensor = self._head(hidden)
        return out.float()

    def rewind(self, to: int, spec: GuardSpec | None, memory: Tensor | None = None) -> None:
        """Forget every token from column `to` on and take another guard, its state fresh.

        memory: what a pooling sensor would remember of the columns before `to`.
        """
        if self.fed > to:
            self.cache.crop(to - self.fed)  # a negative number: how many to drop
        self.fed = to
        self.guard = self._guard(spec)
        if self.guard is not None and memory is not None:
            self.guard.memory = memory

    def rows(self, chosen: Sequence[int]) -> Session:
        """These sequences alone, unguarded, with a copy of their cache."""
        whole = self.prompt
        few = Session(
            self.vlm,
            Prompt(
                whole.embeds[chosen],
                whole.positions[..., chosen, :],
                whole.mask[chosen],
                whole.image[chosen],
                None if whole.deepstack is None else whole.deepstack[:, chosen],
                None if whole.mutual is None else whole.mutual[chosen],
            ),
            None,
        )
        few.cache = deepcopy(self.cache)
        few.cache.batch_select_indices(torch.tensor(chosen))
        few.fed = self.fed
        return few

    def _guard(self, spec: GuardSpec | None) -> TorchGuard | None:
        """A guard that has seen nothing of the prompt but, if it asks for it, its text alone."""
        if spec is None:
            return None
        guard = TorchGuard(spec, -self.prompt.mask.sum(1))
        if guard.text_sites:
            guard.hear(self._text_only(guard.text_sites))
        return guard

    @torch.no_grad()
    def _text_only(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Rows [B, d] of the last token, the prompt's image tokens left out, unguarded."""
        layers = self.vlm.model.get_submodule(self.vlm.family.layers)
        assert isinstance(layers, nn.ModuleList)
        words = self.prompt.mask.bool() & ~self.prompt.image
        # a stable sort puts them to the right in their order: left padding again
        order = words.long().argsort(dim=1, stable=True)[:, -int(words.sum(1).max()) :]
        mask = words.gather(1, order).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rows: dict[Site, Tensor] = {}
        with ExitStack() as stack:
            for site in sites:
                see = partial(_keep_last, rows, site)
                stack.enter_context(on_site(layers, self.vlm.family.feed_forward, site, see))
            embeds = self.prompt.embeds
            embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
            whole = mask.bool() if self.vlm.family.mask == "prefix" else None
            self._decoder(
                inputs_embeds=embeds,
                attention_mask=self._visible(embeds, positions, mask, whole, None),
                position_ids=positions.expand(*self.prompt.positions.shape[:-2], -1, -1),
                use_cache=False,
            )
        return rows

    def _call(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        image: Tensor,
        deepstack: Tensor | None = None,
    ) -> Tensor:
        if self.guard is not None:
            self.guard.attention_mask, self.guard.image_mask = mask, image
        more: dict[str, Any] = {}
        if deepstack is not None:  # transformers wants the image tokens' rows alone
            rows = [level[image] for level in deepstack]
            more = {"visual_pos_masks": image, "deepstack_visual_embeds": rows}
        out = self._decoder(
            inputs_embeds=embeds,
            attention_mask=self._visible(embeds, positions, mask, self.prompt.mutual, self.cache),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        )
        self.fed += embeds.shape[1]
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _visible(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor,
        mutual: Tensor | None,
        cache: DynamicCache | None,
    ) -> Any:
        """The mask [B, total], or where tokens see each other transformers' own of it.

        mutual: of the prompt. Its type of token is 1 for an image's, but 0 for a prefix's.
        """
        if mutual is None:
            return mask
        model: Any = self.vlm.model
        prefix = self.vlm.family.mask == "prefix"
        return model.create_masks_for_generate(
            config=model.config,
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=positions,
            token_type_ids=(mutual ^ prefix)[:, : mask.shape[1]].long(),
        )


def _keep_last(rows: dict[Site, Tensor], site: Site, x: Tensor) -> None:
    rows[site] = x[:, -1]


@contextmanager
def in_float64(vlm: Vlm) -> Iterator[None]:
    """The float32 model computing in float64: its own rounding out of the way of a comparison.

    transformers keeps its norms and its rotary table in float32 even then.
    """
    model: nn.Module = vlm.model  # whose own float() is untyped
    model.double()
    try:
        yield
    finally:
        model.float()  # exact: every number was a float32


class TorchRunner:
    """The `Runner` of the PyTorch reference. spec None: the undefended model."""

    def __init__(self, vlm: Vlm, spec: GuardSpec | None) -> None:
        self.vlm = vlm
        self.spec = spec
        self.end_ids = end_ids(vlm)

    @property
    def settings(self) -> dict[str, str]:
        """See `Runner`."""
        one = next(self.vlm.model.parameters())
        return {"model": f"torch {torch.__version__}, {one.dtype} on {one.device}"}

    @property
    def number(self) -> str:
        """See `Runner`."""
        return str(next(self.vlm.model.parameters()).dtype).removeprefix("torch.")

    @torch.no_grad()
    def run(
        self,
        batch: Batch,
        steps: int,
        forced_tokens: Array | None = None,
        chunk: int | None = None,
        keep_prefill: bool = True,
    ) -> Trace:
        """See `Runner.run`. taps hold what reached every site read or edited, and every edit."""
        session = Session(self.vlm, prepare(self.vlm, batch), self.spec)
        record = _Record(session)
        with session.guarded():
            hidden = []
            for stop in prefill_stops(batch, chunk, self.vlm.family.mask):
                hidden.append(session.feed(stop))
                record.see()
            prefill = torch.cat(hidden, 1)[:, 0 if keep_prefill else -1 :]
            prefill_logits = session.logits(prefill)
            tokens, logits = decode(
                session, prefill_logits[:, -1], steps, forced_tokens, self.end_ids, record
            )
        return Trace(
            tokens=tokens,
            prefill_logits=prefill_logits.numpy(),
            step_logits=logits,
            lengths=first_end(tokens, self.end_ids),
            valid=batch.attention_mask == 1,
            guard_score=record.joined([score.float() for score in record.scores]),
            guard_open=record.joined(record.opens),
            guard_state=record.state(),
            taps=record.taps(),
        )


def end_ids(vlm: Vlm) -> frozenset[int]:
    """The token ids that end an answer, from the generation configuration."""
    config: Any = vlm.model.generation_config
    ends = config.eos_token_id if config is not None else None
    if ends is None:
        ends = vlm.processor.tokenizer.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [ends])


def greedy(logits: Tensor, _step: int) -> Tensor:
    """The likeliest token of each row: [B, V] -> [B]."""
    return logits.argmax(-1)


def decode(
    session: Session,
    first: Tensor,
    steps: int,
    forced: Array | None,
    ends: frozenset[int],
    record: _Record | None,
    pick: Pick = greedy,
) -> tuple[Array, Array]:
    """Take `steps` tokens from the logits `first` [B, V] on: tokens [B, n], logits [B, n, V].

    Stops early when every row has ended and no tokens are forced. The last token is not fed.
    """
    tokens, logits = [], []
    current = first
    for step in range(steps):
        chosen = pick(current, step) if forced is None else torch.from_numpy(forced[:, step])
        tokens.append(chosen)
        logits.append(current)
        so_far = torch.stack(tokens, 1).numpy()
        ended = bool(np.isin(so_far, sorted(ends)).any(axis=1).all())
        if step == steps - 1 or (forced is None and ended):
            break
        current = session.logits(session.step(chosen[:, None]))[:, -1]
        if record is not None:
            record.see()
    return torch.stack(tokens, 1).numpy(), torch.stack(logits, 1).numpy()


class _Record:
    """What the guard of a session showed, call by call."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.scores: list[Tensor] = []
        self.opens: list[Tensor] = []
        self.seen: dict[str, list[Tensor]] = {}

    def see(self) -> None:
        guard = self.session.guard
        if guard is None:
            return
        if guard.scores:
            self.scores.append(torch.stack(guard.scores, -1))
            self.opens.append(torch.stack(guard.opens, -1))
        for prefix, tensors in ((REACHED, guard.reached), (EDITED, guard.edited)):
            for site, tensor in tensors.items():
                self.seen.setdefault(f"{prefix}{site}", []).append(tensor)

    def joined(self, parts: list[Tensor]) -> Array | None:
        return torch.cat(parts, 1).numpy() if parts else None

    def state(self) -> Array | None:
        guard = self.session.guard
        if guard is None or guard.spec.profile != "sequence":
            return None
        return guard.state.numpy()

    def taps(self) -> dict[str, Array]:
        return {name: torch.cat(parts, 1).float().numpy() for name, parts in self.seen.items()}
