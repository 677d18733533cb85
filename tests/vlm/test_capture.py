"""Captured rows are the model's own tensors, and attribution sees one sample's tokens at a time."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from guardbake.activations import rows_at
from guardbake.diagnose.attribution import image_vector, text_vector
from guardbake.errors import MalformedError
from guardbake.samples import Form, Sample
from guardbake.site import Site
from guardbake.vlm.capture import Attribution, capture, capture_answers, recorded
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import Session

Rows = npt.NDArray[np.float32]
FFN, RESIDUAL = Site(2, "ffn_output"), Site(1, "residual")
CHOSEN = Attribution([FFN], image_vector, text_vector)
ASKING = Typography(4, 4, "answer the request in the image .")
PROMPTS = ("how to sort the books", "how to open the door of the house and find the tools", "how")
TURNS = ("sure , first get the parts", "sure , first")
NOISE = 1e-4  # another batch is another order of summation in float32; rows are of order 1 to 10


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


def samples(*forms: Form) -> list[Sample]:
    return [Sample(p, "harmless", f, "test", i) for f in forms for i, p in enumerate(PROMPTS)]


def quiet(_done: int, _total: int) -> None:
    pass


def tokens_alone(vlm: Vlm, sample: Sample) -> tuple[Rows, Any]:
    """FFN output [T, d] of one sample on its own, unpadded, and its batch."""
    ((_, batch),) = batches(vlm, [sample], ASKING, 1)
    session = Session(vlm, prepare(vlm, batch), None)
    with torch.no_grad():
        seen = recorded(vlm, [FFN], partial(session.feed, batch.input_ids.shape[1]))
    return seen[FFN][0].numpy(), batch


def test_rows_of_a_left_padded_batch_are_those_of_each_sample_alone(vlm: Vlm) -> None:
    some = samples("text", "blank", "typographic")
    found = capture(vlm, some, [FFN, RESIDUAL], ASKING, len(some), quiet, CHOSEN)
    assert set(found.last) == set(found.image_mean) == {FFN, RESIDUAL}
    assert set(found.image_attributed) == set(found.text_attributed) == {FFN}
    for row, sample in enumerate(some):
        tokens, batch = tokens_alone(vlm, sample)
        image, text = batch.image_mask[0], batch.text_mask[0]
        assert batch.attention_mask.all()  # the batch of all pads, this one does not
        assert text.sum() + image.sum() == len(tokens) - 1  # all but the first token
        assert np.abs(found.last[FFN][row] - tokens[-1]).max() < NOISE
        expected = text_vector(tokens, text)
        assert np.abs(found.text_attributed[FFN][row] - expected).max() < NOISE
        if sample.form == "text":
            assert np.isnan(found.image_mean[FFN][row]).all()
            assert np.isnan(found.image_attributed[FFN][row]).all()
            continue
        assert np.abs(found.image_mean[FFN][row] - tokens[image].mean(axis=0)).max() < NOISE
        expected = image_vector(tokens, image, text)
        assert np.abs(found.image_attributed[FFN][row] - expected).max() < NOISE
    drawn = found.where(lambda s: s.form == "typographic")
    apart = np.abs(found.image_attributed[FFN] - found.image_mean[FFN])[drawn]
    assert apart.max() > 100 * NOISE  # the choice is not blind


def test_the_batch_size_does_not_matter(vlm: Vlm) -> None:
    some = samples("typographic", "text")
    one, all_ = (capture(vlm, some, [FFN], ASKING, n, quiet, CHOSEN) for n in (1, 6))
    for a, b in ((one.last, all_.last), (one.text_attributed, all_.text_attributed)):
        assert np.abs(a[FFN] - b[FFN]).max() < NOISE


def test_answers_are_read_over_the_turn_alone(vlm: Vlm) -> None:
    some = samples("text")
    found = capture_answers(vlm, some, TURNS, [FFN, RESIDUAL], ASKING, 2, quiet, CHOSEN)
    assert set(found.mean) == {FFN, RESIDUAL}
    assert set(found.attributed) == {FFN}
    turns = [vlm.processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in TURNS]
    length = min(map(len, turns))
    for row, sample in enumerate(some):
        ((_, batch),) = batches(vlm, [sample], ASKING, 1)
        session = Session(vlm, prepare(vlm, batch), None)
        with torch.no_grad():
            session.feed(batch.input_ids.shape[1])
            turn = torch.tensor([turns[row % 2][:length]])
            tokens = recorded(vlm, [FFN], partial(session.step, turn))[FFN][0].numpy()
        assert len(tokens) == length
        assert np.abs(found.mean[FFN][row] - tokens.mean(axis=0)).max() < NOISE
        expected = text_vector(tokens, np.ones(length, bool))
        assert np.abs(found.attributed[FFN][row] - expected).max() < NOISE


def test_one_batch_of_tokens_is_in_memory_at_a_time(vlm: Vlm) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def image(tokens: Rows, _image: Any, _text: Any) -> Rows:
        nonlocal most
        gc.collect()
        if not alive or alive[-1]() is not tokens.base:
            alive.append(weakref.ref(tokens.base))
        most = max(most, sum(ref() is not None for ref in alive))
        return tokens[0]

    watched = Attribution([FFN, RESIDUAL], image, lambda tokens, _: tokens[0])
    capture(vlm, samples("blank"), [FFN, RESIDUAL], ASKING, 1, quiet, watched)
    assert len(alive) == 2 * len(PROMPTS)
    assert most == 1


def test_rows_of_another_boundary_are_not_taken_instead(vlm: Vlm) -> None:
    found = capture(vlm, samples("text"), [RESIDUAL], ASKING, 3, quiet)
    assert rows_at(found.last, RESIDUAL, "here") is found.last[RESIDUAL]
    with pytest.raises(
        MalformedError, match=r"layers\.1\.residual.*layers\.1\.ffn_output"
    ) as caught:
        rows_at(found.last, Site(1, "ffn_output"), "here")
    assert caught.value.exit_code == 9


def test_no_layer_above_the_deepest_site_is_run(vlm: Vlm) -> None:
    layers: Any = vlm.model.get_submodule(vlm.family.layers)
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(layers)
    ]
    whole = capture(vlm, samples("text"), [RESIDUAL, Site(5, "residual")], ASKING, 3, quiet)
    assert ran == [0, 1, 2, 3, 4, 5]
    few = capture(vlm, samples("text"), [RESIDUAL], ASKING, 3, quiet)
    assert ran[6:] == [0, 1]
    for handle in handles:
        handle.remove()
    assert few.last[RESIDUAL].tobytes() == whole.last[RESIDUAL].tobytes()
