"""onnxruntime-genai asked about pictures in its own loop, and what PyTorch says to the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from PIL import Image

from guardbake.batch import Batch
from guardbake.plugins import Trace
from guardbake.spec import GuardSpec
from guardbake.vlm.load import Vlm
from guardbake.vlm.runner import TorchRunner

TOKENS = 8


@dataclass(frozen=True)
class Said:
    """One sequence as genai ran it: the prompt as its processor made it, the answer, and of each
    call's last token the logits and what the guard's outputs said, of an unguarded folder nothing.
    """

    batch: Batch
    tokens: list[int]
    logits: list[Any]
    scores: list[float]
    opened: list[bool]


def draw(size: tuple[int, int], path: Path) -> Path:
    """A picture of that height and width, all noise, the same for the same size."""
    pixels = np.random.default_rng(size).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ask(folder: Path, prompt: str, pictures: Sequence[Path], vlm: Vlm) -> tuple[Said, Any]:
    """Ask about the pictures; also returns the generator."""
    model = genai.Model(str(folder))
    images = genai.Images.open(*map(str, pictures)) if pictures else None
    asked = model.create_multimodal_processor()(prompt, images=images)
    batch = _batch(asked, bool(pictures), vlm)
    parameters = genai.GeneratorParams(model)
    longest = batch.input_ids.shape[1] + 100  # room for a second turn
    parameters.set_search_options(max_length=longest, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.set_inputs(asked)
    return answer(generator, batch), generator


def _batch(asked: Any, pictured: bool, vlm: Vlm) -> Batch:
    def array(name: str) -> Any:
        return np.array(asked[name].as_numpy())

    ids = array("input_ids").reshape(1, -1).astype(np.int64)
    config: Any = vlm.model.config
    told = ids, np.ones_like(ids), ids == config.image_token_id
    if not pictured:
        return Batch(*told, None, None)
    pixels = array("pixel_values")
    if vlm.family.position != "mrope":
        return Batch(*told, pixels, None)
    grids = array("image_grid_thw").reshape(-1, 3)
    return Batch(*told, pixels.reshape(-1, pixels.shape[-1]), grids)


def answer(generator: Any, batch: Batch) -> Said:
    tokens, logits, scores, opened = [], [], [], []
    while len(tokens) < TOKENS and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        made = np.array(generator.get_output("logits"))  # which chose this token
        logits.append(made.reshape(-1, made.shape[-1])[-1])
        try:  # of the same call
            scores.append(float(generator.get_output("guard_score").ravel()[-1]))
            opened.append(bool(generator.get_output("guard_open").ravel()[-1]))
        except RuntimeError:
            continue
    return Said(batch, tokens, logits, scores, opened)


def require_alike(vlm: Vlm, spec: GuardSpec | None, said: Said, rounding: float) -> Trace:
    """The same tokens, verdicts, logits and scores as PyTorch with the guard's hooks gives."""
    wanted = TorchRunner(vlm, spec).run(said.batch, len(said.tokens))
    assert said.tokens == wanted.tokens[0].tolist()
    assert np.abs(np.array(said.logits) - wanted.step_logits[0]).max() < rounding
    if wanted.guard_score is None or wanted.guard_open is None:
        assert spec is None or spec.profile == "always"
        assert said.scores == []
        return wanted
    first = said.batch.input_ids.shape[1] - 1
    assert said.opened == wanted.guard_open[0, first:, 0].tolist()
    assert np.abs(said.scores - wanted.guard_score[0, first:, 0]).max() < rounding
    return wanted
