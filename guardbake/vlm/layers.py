"""The decoder layer by layer, from any layer on: what a causal trace resumes from.

Whole sequences and no cache: a residual [B, S, d] enters a layer and leaves it. Mask and positions
are given, so that several continuations of one prompt can stand in one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from guardbake.errors import UnsupportedError
from guardbake.vlm.load import Vlm
from guardbake.vlm.reference import on_output

# A layer adds its two halves to the residual and nothing else, up to rounding in half precision.
ADDS_UP = 1e-2


@dataclass(frozen=True, eq=False)
class Setting:
    """What every layer needs besides the residual: visible [B, 1, S, S] bool, query by key, and
    rotary = (cos, sin), each [B, S, head]."""

    visible: Tensor
    rotary: tuple[Tensor, Tensor]

    def repeated(self, times: int) -> Setting:
        """The same for `times` copies of the batch, one after another."""
        cos, sin = self.rotary
        return Setting(
            self.visible.repeat(times, 1, 1, 1),
            (cos.repeat(times, 1, 1), sin.repeat(times, 1, 1)),
        )


class DecoderLayers:
    """A VLM's decoder, its layers called one by one in eval mode.

    Raises UnsupportedError if a layer attends to a sliding window, if image features join the
    residual between layers, or if a prompt's tokens see later ones.
    """

    def __init__(self, vlm: Vlm) -> None:
        decoder: Any = vlm.model.get_submodule(vlm.family.decoder)
        kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedError(
                found=f"layers of {sorted(kinds)}",
                expected="full attention in every layer",
                where=vlm.family.decoder,
                remedy="trace a model without sliding windows",
            )
        if vlm.family.mask != "causal":
            raise UnsupportedError(
                found=f"tokens that see later ones, mask {vlm.family.mask!r}",
                expected="a causal mask, which several continuations of a prompt can share",
                where=f"the family {vlm.family.name}",
                remedy="trace a model with a causal mask",
            )
        if vlm.family.deepstack:
            raise UnsupportedError(
                found="image features that join the residual between layers",
                expected="layers that hand on to each other",
                where=f"the family {vlm.family.name}",
                remedy="trace a model without deepstack features",
            )
        self._decoder = decoder
        self._layers: Any = vlm.model.get_submodule(vlm.family.layers)
        self._head = vlm.model.get_submodule(vlm.family.head)
        self._attention, self._ffn = vlm.family.attention, vlm.family.feed_forward

    def __len__(self) -> int:
        return len(self._layers)

    def setting(self, embeds: Tensor, positions: Tensor, visible: Tensor) -> Setting:
        """embeds [B, S, d], positions [B, S] or [3, B, S], visible [B, S, S] bool."""
        cos, sin = self._decoder.rotary_emb(embeds, positions)
        return Setting(visible[:, None], (cos, sin))

    def run(self, first: int, residual: Tensor, setting: Setting) -> Tensor:
        """The residual [B, S, d] that leaves the last layer, `residual` having entered `first`."""
        for layer in range(first, len(self)):
            residual = self._call(layer, residual, setting)
        return residual

    def halves(
        self, layer: int, residual: Tensor, setting: Setting
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(attention output, FFN output, residual after the layer), each [B, S, d].

        Raises UnsupportedError if the layer is not residual + attention + FFN.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], None]:
            def see(tensor: Tensor) -> None:
                seen[name] = tensor

            return see

        with ExitStack() as stack:
            for name in (self._attention, self._ffn):
                module = self._layers[layer].get_submodule(name)
                stack.enter_context(on_output(module, keep(name)))
            after = self._call(layer, residual, setting)
        attention, ffn = seen[self._attention], seen[self._ffn]
        missing = (residual + attention + ffn - after).abs().max()
        if not missing <= ADDS_UP * after.abs().max():
            raise UnsupportedError(
                found=f"a layer whose halves miss its output by {float(missing):.3g}",
                expected="residual + attention + FFN",
                where=f"decoder layer {layer}",
                remedy="trace a model with plain residual connections",
            )
        return attention, ffn, after

    def after_attention(
        self, layer: int, residual: Tensor, attention: Tensor, setting: Setting
    ) -> Tensor:
        """The residual after the layer with `attention` [B, S, d] as its attention's output."""
        module = self._layers[layer].get_submodule(self._attention)
        with on_output(module, lambda _: attention):
            return self._call(layer, residual, setting)

    def logits(self, residual: Tensor) -> Tensor:
        """Residuals [..., d] after the last layer to logits [..., V], in the model's dtype."""
        out: Tensor = self._head(self._decoder.norm(residual))
        return out

    def _call(self, layer: int, residual: Tensor, setting: Setting) -> Tensor:
        out: Tensor = self._layers[layer](
            residual,
            attention_mask=setting.visible,
            position_embeddings=setting.rotary,
            use_cache=False,
        )
        return out
