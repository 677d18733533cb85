"""The ranges of sizes that one engine serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guardbake.errors import UnsupportedError, UsageError

Range = tuple[int, int, int]
Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]
Phase = Literal["whole", "prefill", "continued", "decode"]
"""What an optimisation profile is tuned for: any call; one on an empty cache; one of several tokens
on what is in the cache; one of a single token. A cache of fixed capacity is as large when it is
empty, so there `prefill` takes the calls of `continued` as well."""


@dataclass(frozen=True)
class EngineProfile:
    """(smallest, best, largest) for each size of a decoder call; the engine is tuned for `best`.

    batch: sequences per call. seq: new tokens per call (the prompt, or 1 in decode). past: tokens
    in the key/value cache before the call; 0 allows a prefill without cache. A static cache has
    one size, its capacity, which must have room for the largest of either.
    phases: the engine's optimisation profiles, in the order in which it has them. inputs: (name,
    smallest, best, largest shape) of dynamic inputs that are none of the decoder's, e.g. a vision
    graph's `pixel_values`.
    Raises UsageError when a range is not ascending or starts below 1 (past: below 0).
    """

    batch: Range
    seq: Range
    past: Range
    phases: tuple[Phase, ...] = ("whole",)
    inputs: tuple[tuple[str, Shape, Shape, Shape], ...] = ()

    def __post_init__(self) -> None:
        for name, sizes, least in (
            ("batch", self.batch, 1),
            ("seq", self.seq, 1),
            ("past", self.past, 0),
        ):
            if len(sizes) != 3 or not least <= sizes[0] <= sizes[1] <= sizes[2]:
                raise UsageError(
                    found=f"{name} range {sizes}",
                    expected=f"{least} <= smallest <= best <= largest",
                    where="the engine profile",
                    remedy="correct the range",
                )

    def shapes(self, phase: Phase, name: str, shape: Shape) -> ShapeRange:
        """Smallest, best and largest shape of input `name` in `phase`.

        shape: as the network has it, -1 where the size is dynamic. Raises UnsupportedError for a
        dynamic input whose meaning is unknown, UsageError where the graph has a fixed size that
        the profile asks to vary.
        """
        for known, *given in self.inputs:
            if known == name:
                wanted = [tuple(each) for each in given]
                break
        else:
            wanted = [self._decoder_shape(name, shape, phase, step) for step in range(3)]
        for each in wanted:
            if len(each) != len(shape) or any(
                fixed not in (-1, size) for fixed, size in zip(shape, each, strict=True)
            ):
                raise UsageError(
                    found=f"input {name!r} of shape {shape} (-1 is dynamic)",
                    expected=f"an input that can take the shape {each}",
                    where="the engine profile",
                    remedy="narrow the profile to the sizes the graph was exported with",
                )
        return wanted[0], wanted[1], wanted[2]

    def _decoder_shape(self, name: str, shape: Shape, phase: Phase, step: int) -> Shape:
        batch, past = self.batch[step], self._past(phase, step)
        seq = 1 if phase == "decode" else self.seq[step]
        if name == "inputs_embeds":
            return (batch, seq, *shape[2:])
        if name == "deepstack_embeds":
            return (shape[0], batch, seq, *shape[3:])
        if name == "attention_mask":
            return (batch, self._cached(name, shape[1], past + seq))
        if name == "write_indices":
            return (batch,)
        if name == "position_ids":
            return (*shape[:-2], batch, seq)
        if name == "guard_state":
            return (batch,)
        if name in ("guard_image_mask", "mutual_mask"):
            return (batch, seq)
        if name == "guard_memory":
            return (batch, *shape[1:])
        if name.startswith("guard_text_") and len(shape) == 2:
            return (batch, shape[1])
        if name.startswith("past_key_values.") and len(shape) == 4:
            return (batch, shape[1], self._cached(name, shape[2], past), shape[3])
        raise UnsupportedError(
            found=f"dynamic input {name!r} of shape {shape}",
            expected="an input of a guarded decoder, or its shapes in EngineProfile.inputs",
            where="the engine profile",
            remedy=f"add ({name!r}, smallest, best, largest) to EngineProfile.inputs",
        )

    def _past(self, phase: Phase, step: int) -> int:
        if phase == "prefill":
            return 0
        return self.past[step] if phase == "whole" else max(self.past[step], 1)

    def _cached(self, name: str, fixed: int, growing: int) -> int:
        """The tokens of a cache, or of its mask: its capacity, or as many as there are."""
        if fixed == -1:
            return growing
        needed = max(self.seq[2], self.past[2] + 1)
        if fixed < needed:
            raise UsageError(
                found=f"input {name!r} of a static cache with room for {fixed} tokens",
                expected=f"room for {needed}: a call's tokens, or a full past and one more",
                where="the engine profile",
                remedy="lower the graph with a larger capacity, or narrow seq and past",
            )
        return fixed
