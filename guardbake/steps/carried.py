"""A guard whose state the decoding loop carries, against itself with the state fed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from guardbake.check.law import Agreement, require_identical
from guardbake.passes.carry import EMBEDS, IDS, Slot
from guardbake.passes.insert import IMAGES_IN, MEMORY_IN, MEMORY_OUT, STATE_IN, STATE_OUT
from guardbake.plugins import Session
from guardbake.steps.feeds import PROMPT, Feeds

Array = npt.NDArray[Any]


class Carried:
    """The graph as it is written, in a session. inputs: what its loop feeds."""

    def __init__(self, session: Session, graph: ir.Graph, slot: Slot) -> None:
        self.inputs = list(graph.inputs)
        self._outputs = [str(value.name) for value in graph.outputs]
        self._session, self._slot = session, slot

    def agree(
        self, bare: Session, graph: ir.Graph, feeds: Feeds, thresholds: Mapping[str, Array]
    ) -> Agreement:
        """A prompt, one more token and a second turn: the same bits as `bare` gives.

        bare, graph: the guarded graph that is fed its state, with the thresholds as inputs. feeds:
        for this graph, its loop's slot zero at the start. Raises ParityError.
        """
        taken = {str(value.name) for value in graph.inputs}
        same = [name for name in self._outputs if not name.startswith(self._slot.present)]
        given, before = self._with_images(feeds.prompt()), dict[str, Array]()
        for following in (1, PROMPT, 1):
            by_hand = self._bare(given, before) | dict(thresholds)
            outside = self._session.run(given)
            inside = bare.run({name: by_hand[name] for name in taken})
            require_identical(outside, inside, same)
            given = self._with_images(feeds.step(given, outside, following))
            before = {} if following > 1 else inside
        return Agreement("outputs while the loop carries the state", 0.0, 0.0, 3 * len(same))

    def _with_images(self, given: dict[str, Array]) -> dict[str, Array]:
        """Every other token of a prompt stands for an image feature."""
        if self._slot.marked:
            given[EMBEDS][..., -1] = np.arange(given[EMBEDS].shape[1]) % 2
        elif IDS in given and self._slot.image_token is not None:
            given[IDS][:, 1::2] = self._slot.image_token
        return given

    def _bare(self, given: Mapping[str, Array], before: Mapping[str, Array]) -> dict[str, Array]:
        """What the caller of a bare graph feeds; before: what the last call of this turn gave."""
        rows = len(given["attention_mask"])
        images = np.zeros(0, bool)
        fed = dict(given)
        if self._slot.marked:
            fed[EMBEDS], images = given[EMBEDS][..., :-1], given[EMBEDS][..., -1] != 0
        elif IDS in given:
            images = given[IDS] == self._slot.image_token
        fed[IMAGES_IN] = images
        fed[STATE_IN] = before.get(STATE_OUT, np.zeros(rows, np.int64))
        fed[MEMORY_IN] = before.get(MEMORY_OUT, np.zeros((rows, 3), np.float32))
        return fed
