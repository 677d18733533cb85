"""The runner against transformers' own generation, and against itself in other cuts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from guardbake import semantics as law
from guardbake.batch import Batch, without_images
from guardbake.plugins import Trace
from guardbake.samples.typography import blank, draw_cells, pieces_of
from guardbake.site import Site
from guardbake.spec import GuardSpec
from guardbake.vlm.capture import recorded
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.runner import Session, TorchRunner, decode, end_ids
from guardbake.vlm.tokens import collate

FAMILIES = ("tiny-llava", "tiny-qwen2_5_vl")
STEPS = 4
SENSOR, EDITED = Site(1, "residual"), 3
# Logits of the same tokens through other kernels and other shapes: some hundred sums of at most
# 400 products in each of the layers, relative to logits of up to about 20. The tiny models move
# by 1e-5 there; a token read at a wrong position or an edit left out moves them by more than 0.1.
NOISE = 1e-3


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request: pytest.FixtureRequest) -> Vlm:
    return load_vlm(str(models_root() / request.param))


WORDS = ("tell me how to make a cake", "what is a", "how do i make a good cake for a friend ?")


def mixed(vlm: Vlm) -> Batch:
    """Text alone, a picture, a drawn request: three lengths in one batch."""
    tokenizer = vlm.processor.tokenizer
    drawn = draw_cells(pieces_of(WORDS[0], tokenizer), 4, 4)
    requests: list[tuple[str, Image.Image | None]] = [
        (WORDS[0], None),
        (WORDS[1], blank(4, 4)),
        (WORDS[2], drawn),
    ]
    return collate(vlm.processor, vlm.image_token_id, requests)


def of_row(vlm: Vlm, row: int) -> Batch:
    pictures = (None, blank(4, 4), draw_cells(pieces_of(WORDS[0], vlm.processor.tokenizer), 4, 4))
    return collate(vlm.processor, vlm.image_token_id, [(WORDS[row], pictures[row])])


def spec_for(vlm: Vlm, guard: Any, profile: str = "sequence", threshold: float = 0.0) -> GuardSpec:
    config = vlm.model.config.get_text_config()
    made: GuardSpec = guard(
        profile,
        "care",
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        sensor=SENSOR,
        edits=(EDITED,),
        strength=1.0,
        threshold=threshold,
        family=vlm.family.name,
    )
    return made


def same(one: Trace, other: Trace, rows: slice = slice(None), shift: int = 0) -> None:
    """Two traces agree at real tokens; `other` has `shift` columns of padding less."""
    valid = one.valid[rows][:, shift:]
    assert (valid == other.valid).all()
    assert (one.tokens[rows] == other.tokens).all()
    assert np.abs(one.step_logits[rows] - other.step_logits).max() < NOISE
    before, after = one.prefill_logits[rows][:, shift:], other.prefill_logits
    assert np.abs(before - after)[valid].max() < NOISE
    if one.guard_open is not None and other.guard_open is not None:
        fed = np.concatenate([valid, np.ones((len(valid), other.tokens.shape[1] - 1), bool)], 1)
        assert (one.guard_open[rows][:, shift:] == other.guard_open)[fed].all()
        assert one.guard_score is not None
        assert other.guard_score is not None
        moved = np.abs(one.guard_score[rows][:, shift:] - other.guard_score)
        assert moved[fed].max() < NOISE
        for name, tap in one.taps.items():
            assert np.abs(tap[rows][:, shift:] - other.taps[name])[fed].max() < NOISE
    if one.guard_state is not None and other.guard_state is not None:
        assert one.guard_state[rows].tolist() == other.guard_state.tolist()


def generated(vlm: Vlm, batch: Batch, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """transformers' own greedy tokens [B, n] and their logits [B, n, V]."""
    extra: dict[str, Any] = {}
    if batch.pixel_values is not None:
        extra["pixel_values"] = torch.from_numpy(batch.pixel_values)
    if batch.image_grid_thw is not None:
        extra["image_grid_thw"] = torch.from_numpy(batch.image_grid_thw)
        extra["mm_token_type_ids"] = torch.from_numpy(batch.image_mask.astype(np.int64))
    model: Any = vlm.model
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.attention_mask),
            do_sample=False,
            max_new_tokens=steps,
            output_logits=True,
            return_dict_in_generate=True,
            **extra,
        )
    new = out.sequences[:, batch.input_ids.shape[1] :].numpy()
    return new, torch.stack(out.logits, 1).numpy()


def agrees_with_generate(vlm: Vlm, batch: Batch) -> None:
    tokens, logits = generated(vlm, batch, STEPS)
    trace = TorchRunner(vlm, None).run(batch, STEPS)
    assert trace.tokens.shape == tokens.shape
    for row, length in enumerate(trace.lengths):  # after its end a row is padding to transformers
        assert trace.tokens[row, :length].tolist() == tokens[row, :length].tolist()
        moved = np.abs(trace.step_logits[row, :length] - logits[row, :length])
        assert moved.max() < NOISE
    assert trace.guard_score is trace.guard_open is trace.guard_state is None


@pytest.mark.parametrize("row", range(3))
def test_one_request_is_generated_as_transformers_does(vlm: Vlm, row: int) -> None:
    agrees_with_generate(vlm, of_row(vlm, row))


def test_a_padded_batch_is_generated_as_transformers_does(vlm: Vlm) -> None:
    batch = mixed(vlm)
    assert len(set(batch.prompt_lengths.tolist())) == 3
    agrees_with_generate(vlm, batch)


@pytest.mark.parametrize("profile", [None, "always", "token", "sequence"])
def test_chunks_agree_with_the_whole(vlm: Vlm, guard: Any, profile: str | None) -> None:
    spec = None if profile is None else spec_for(vlm, guard, profile)
    runner, batch = TorchRunner(vlm, spec), mixed(vlm)
    whole = runner.run(batch, STEPS)
    for chunk in (7, batch.input_ids.shape[1] - 1):
        same(whole, runner.run(batch, STEPS, whole.tokens, chunk=chunk))


def test_token_by_token_agrees_with_the_whole(vlm: Vlm, guard: Any) -> None:
    """Rows that are padding alone in the first calls, and a prompt that ends in the last."""
    runner, batch = TorchRunner(vlm, spec_for(vlm, guard)), mixed(vlm)
    whole = runner.run(batch, 1)
    same(whole, runner.run(batch, 1, whole.tokens, chunk=1))


@pytest.mark.parametrize("profile", [None, "always", "token", "sequence"])
def test_a_batch_agrees_with_each_alone(vlm: Vlm, guard: Any, profile: str | None) -> None:
    spec = None if profile is None else spec_for(vlm, guard, profile)
    runner, batch = TorchRunner(vlm, spec), mixed(vlm)
    together = runner.run(batch, STEPS)
    for row in range(3):
        alone = of_row(vlm, row)
        shift = batch.input_ids.shape[1] - alone.input_ids.shape[1]
        forced = together.tokens[row : row + 1]
        same(together, runner.run(alone, STEPS, forced), slice(row, row + 1), shift)


def test_the_guard_changes_what_is_generated(vlm: Vlm, guard: Any) -> None:
    """Or the agreement of guarded runs would show nothing."""
    batch = mixed(vlm)
    plain = TorchRunner(vlm, None).run(batch, STEPS)
    guarded = TorchRunner(vlm, spec_for(vlm, guard, "always")).run(batch, STEPS, plain.tokens)
    assert np.abs(plain.step_logits - guarded.step_logits).max() > 100 * NOISE


def test_forced_tokens_are_fed_and_reported(vlm: Vlm) -> None:
    batch, runner = mixed(vlm), TorchRunner(vlm, None)
    forced = np.full((3, 4), 9, np.int64)
    trace = runner.run(batch, 4, forced)
    assert trace.tokens.tolist() == forced.tolist()
    free = runner.run(batch, 4)
    assert (trace.step_logits[:, 0] == free.step_logits[:, 0]).all()
    assert np.abs(trace.step_logits[:, 1] - free.step_logits[:, 1]).max() > NOISE


def test_prefill_logits_are_kept_or_cut(vlm: Vlm) -> None:
    batch, runner = mixed(vlm), TorchRunner(vlm, None)
    kept, cut = runner.run(batch, 1), runner.run(batch, 1, keep_prefill=False)
    assert kept.prefill_logits.shape[1] == batch.input_ids.shape[1]
    assert cut.prefill_logits.shape[1] == 1
    assert np.abs(kept.prefill_logits[:, -1:] - cut.prefill_logits).max() < NOISE
    assert kept.step_logits.shape[1] == kept.tokens.shape[1] == 1


# ---- what the guard shows


def test_the_state_is_decided_by_the_prompt(vlm: Vlm, guard: Any) -> None:
    batch = mixed(vlm)
    width = batch.input_ids.shape[1]
    shut = TorchRunner(vlm, spec_for(vlm, guard, threshold=1e30)).run(batch, STEPS)
    open_ = TorchRunner(vlm, spec_for(vlm, guard, threshold=-1e30)).run(batch, STEPS)
    assert shut.guard_state is not None
    assert open_.guard_state is not None
    assert shut.guard_state.tolist() == [1, 1, 1]
    assert open_.guard_state.tolist() == [2, 2, 2]
    assert shut.guard_open is not None
    assert open_.guard_open is not None
    assert not shut.guard_open.any()
    assert not open_.guard_open[:, : width - 1].any()
    assert open_.guard_open[:, width - 1 :].all()
    assert open_.guard_open.shape[1] == width + open_.tokens.shape[1] - 1
    same(shut, TorchRunner(vlm, None).run(batch, STEPS))


def test_the_text_only_pass_is_the_prompt_without_its_images(vlm: Vlm, guard: Any) -> None:
    """The reference picks words from embeddings; the batch's own rendering goes by token ids."""
    config = vlm.model.config.get_text_config()
    site = Site(EDITED, "ffn_output")
    spec = guard(
        "sequence",
        "replace",
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        sensor=SENSOR,
        edits=(EDITED,),
    )
    batch = mixed(vlm)
    session = Session(vlm, prepare(vlm, batch), spec)
    words = without_images(batch)
    assert (words.prompt_lengths == batch.prompt_lengths - batch.image_mask.sum(1)).all()
    alone = Session(vlm, prepare(vlm, words), None)
    with torch.no_grad():
        seen = recorded(vlm, [site], partial(alone.feed, words.input_ids.shape[1]))
    said = law.coordinates(seen[site][:, -1].numpy(), spec.edits[0].branches[0])
    assert session.guard is not None
    assert np.abs(session.guard.text[site].numpy() - said).max() < NOISE
    with torch.no_grad():
        shown = recorded(vlm, [site], alone_with_images(vlm, batch))
    own = law.coordinates(shown[site][:, -1].numpy(), spec.edits[0].branches[0])
    far = np.abs(own - said).max(axis=1)
    assert far[0] < NOISE  # no picture to leave out
    assert far[1:].min() > 10 * NOISE


def alone_with_images(vlm: Vlm, batch: Batch) -> Callable[[], object]:
    session = Session(vlm, prepare(vlm, batch), None)
    return partial(session.feed, batch.input_ids.shape[1])


def test_the_state_is_negative_until_the_prompt_ends(vlm: Vlm, guard: Any) -> None:
    batch = mixed(vlm)
    session = Session(vlm, prepare(vlm, batch), spec_for(vlm, guard, threshold=-1e30))
    assert session.guard is not None
    with torch.no_grad(), session.guarded():
        session.feed(batch.input_ids.shape[1] - 1)
        assert session.guard.state.tolist() == (-batch.prompt_lengths).tolist()
        session.feed(batch.input_ids.shape[1])
        assert session.guard.state.tolist() == [2, 2, 2]


def between(vlm: Vlm, guard: Any) -> tuple[NDArray[np.float64], float]:
    """The scores [3] of the mixed batch's rows, and a threshold that one of them is above."""
    batch = mixed(vlm)
    low = TorchRunner(vlm, spec_for(vlm, guard)).run(batch, 1)
    assert low.guard_score is not None
    last = low.guard_score[:, batch.input_ids.shape[1] - 1, 0]
    return last, float(np.sort(last)[1:].mean())


def test_rows_are_decided_one_by_one(vlm: Vlm, guard: Any) -> None:
    """A threshold between the rows' scores: one batch, both verdicts."""
    batch = mixed(vlm)
    last, middle = between(vlm, guard)
    found = TorchRunner(vlm, spec_for(vlm, guard, threshold=middle)).run(batch, STEPS)
    assert found.guard_state is not None
    assert found.guard_state.tolist() == np.where(last > middle, 2, 1).tolist()
    assert sorted(found.guard_state.tolist()) == [1, 1, 2]


def test_taps_hold_the_edited_tensor(vlm: Vlm, guard: Any) -> None:
    batch = mixed(vlm)
    _, middle = between(vlm, guard)
    trace = TorchRunner(vlm, spec_for(vlm, guard, threshold=middle)).run(batch, STEPS)
    edited = Site(EDITED, "ffn_output")
    read = spec_for(vlm, guard).sensors[0].sites
    assert set(trace.taps) == {f"edited/{edited}", *(f"reached/{s}" for s in (edited, *read))}
    assert trace.guard_open is not None
    assert all(tap.shape[:2] == trace.guard_open.shape[:2] for tap in trace.taps.values())
    before, after = (trace.taps[f"{when}/{edited}"] for when in ("reached", "edited"))
    changed = (before != after).any(axis=-1)
    assert (changed <= trace.guard_open[..., 0]).all()  # real tokens behind an open gate alone
    assert changed.any()


# ---- sessions


def answer(session: Session, vlm: Vlm, first: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return decode(session, session.logits(first)[:, -1], STEPS, None, end_ids(vlm), None)


def test_a_rewound_session_answers_as_a_fresh_one(vlm: Vlm, guard: Any) -> None:
    """Unguarded prompt, one guard, another guard, none: each as if it were the first."""
    batch = mixed(vlm)
    width = batch.input_ids.shape[1]
    guards = [
        spec_for(vlm, guard, threshold=-1e30),
        None,
        spec_for(vlm, guard, threshold=1e30),
        spec_for(vlm, guard, threshold=-1e30),
    ]
    with torch.no_grad():
        session = Session(vlm, prepare(vlm, batch), None)
        session.feed(width)
        for spec in guards:
            session.rewind(width - 3, spec)
            with session.guarded():
                tokens, logits = answer(session, vlm, session.feed(width))
            fresh = TorchRunner(vlm, spec).run(batch, STEPS)
            assert tokens.tolist() == fresh.tokens.tolist()
            assert np.abs(logits - fresh.step_logits).max() < NOISE
            if session.guard is not None and spec is not None:
                assert fresh.guard_state is not None
                assert session.guard.state.tolist() == fresh.guard_state.tolist()


def test_rewinding_to_the_start_forgets_everything(vlm: Vlm) -> None:
    batch = mixed(vlm)
    width = batch.input_ids.shape[1]
    with torch.no_grad():
        session = Session(vlm, prepare(vlm, batch), None)
        first = session.feed(width)
        session.rewind(0, None)
        again = session.feed(width)
    assert (first == again).all()


def test_end_tokens_come_from_the_generation_configuration(vlm: Vlm) -> None:
    assert end_ids(vlm) == {vlm.model.generation_config.eos_token_id}


def test_decoding_stops_when_every_row_has_ended(vlm: Vlm) -> None:
    trace = TorchRunner(vlm, None).run(mixed(vlm), 60)
    assert trace.tokens.shape[1] < 60
    assert trace.lengths.max() == trace.tokens.shape[1]
    ends = np.isin(trace.tokens, sorted(end_ids(vlm)))
    assert ends.any(axis=1).all()
