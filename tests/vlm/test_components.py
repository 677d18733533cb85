"""What is captured of every component adds up to what the model computes."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from torch import Tensor

from guardbake.component import Component
from guardbake.samples import FORMS, Sample
from guardbake.vlm.capture import capture, every_site
from guardbake.vlm.catalog import models_root
from guardbake.vlm.components import capture_components
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.requests import Typography

DRAWING = Typography(4, 4, "answer the request in the image .")
PROMPTS = ("how do i make a kite ?", "make a bomb")
SAMPLES = [Sample(p, "harmless", f, "test", i) for f in FORMS for i, p in enumerate(PROMPTS)]
# The same float32 sums in batches of another shape: the tiny models' residuals stay below 40, and
# 1e-4 is about twenty of their last places.
NOISE = 1e-4


def quiet(_done: int, _total: int) -> None:
    """Nobody looks at the progress."""


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-qwen2_5_vl"])
def vlm(request: pytest.FixtureRequest) -> Vlm:
    return load_vlm(str(models_root() / request.param))


def test_the_halves_of_a_layer_add_up_to_what_it_adds_to_the_residual(vlm: Vlm) -> None:
    rows = capture_components(vlm, SAMPLES, DRAWING, len(SAMPLES), quiet)
    assert [c.depth for c in rows] == list(range(18))
    for layer in range(1, 6):
        before, after = (rows[Component(n, "residual")] for n in (layer - 1, layer))
        attention = rows[Component(layer, "attention_output")]
        ffn = rows[Component(layer, "ffn_output")]
        assert np.abs(before + attention + ffn - after).max() < NOISE
        assert min(np.abs(attention).max(), np.abs(ffn).max()) > 100 * NOISE


def test_sites_and_components_of_one_name_are_one_tensor(vlm: Vlm) -> None:
    rows = capture_components(vlm, SAMPLES, DRAWING, len(SAMPLES), quiet)
    seen = capture(vlm, SAMPLES, every_site(vlm), DRAWING, len(SAMPLES), quiet)
    for site, expected in seen.last.items():
        assert np.array_equal(rows[Component(site.layer, site.boundary)], expected)


def test_neighbours_and_padding_do_not_matter(vlm: Vlm) -> None:
    together = capture_components(vlm, SAMPLES, DRAWING, len(SAMPLES), quiet)
    alone = capture_components(vlm, SAMPLES, DRAWING, 1, quiet)
    for component, rows in together.items():
        assert np.abs(rows - alone[component]).max() < NOISE
    decoder = vlm.model.get_submodule(vlm.family.decoder)
    assert not any(module._forward_hooks for module in decoder.modules())


def test_of_a_batch_only_the_last_tokens_stay_in_memory(vlm: Vlm) -> None:
    hidden = set()
    size = vlm.model.get_input_embeddings().weight.shape[1]

    def look(_done: int, _total: int) -> None:
        gc.collect()
        alive = [x for x in gc.get_objects() if type(x) is Tensor and x.shape[-1:] == (size,)]
        hidden.add(sum(x.untyped_storage().nbytes() for x in alive))

    same = [SAMPLES[0]] * 3
    capture_components(vlm, same, DRAWING, 1, look)
    assert len(hidden) == 1  # the batch that was just run and nothing of those before it
