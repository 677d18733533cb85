"""What the rivals measure and train inside the model, on tiny-llava."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guardbake.errors import MalformedError, UsageError
from guardbake.samples import Form, Label, Sample
from guardbake.site import Site
from guardbake.spec import Edit, GuardSpec, ModelIdentity
from guardbake.vlm.behaviour import Questions
from guardbake.vlm.capture import capture, capture_answers
from guardbake.vlm.catalog import models_root
from guardbake.vlm.forced import Exchange, drawn, forced, turn_ids
from guardbake.vlm.image_ablation import Ablation, capture_ablated, capture_turns
from guardbake.vlm.likelihood import log_likelihoods
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.low_rank import (
    LowRank,
    Tuning,
    load_low_rank,
    merged,
    save_low_rank,
    tune,
)
from guardbake.vlm.preference import Descent, refine
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Typography, batches
from guardbake.vlm.runner import Session

ASKING = Typography(4, 4, "answer the request in the image .")
REFUSING, COMPLIANT = "sorry , i can not help with that .", "sure , first get the parts"
FOUR, FIVE = Site(4, "ffn_output"), Site(5, "ffn_output")


def quiet(_done: int, _total: int) -> None:
    """Nobody watches."""


def read(name: str, label: Label, count: int, form: Form) -> list[Sample]:
    lines = (models_root() / "tiny-prompts" / name).read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line and not line.startswith("#")][:count]
    return [Sample(text, label, form, name, i) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


@pytest.fixture(scope="module")
def exchanges(vlm: Vlm) -> list[Exchange]:
    refusing, compliant = turn_ids(vlm, REFUSING, ends=True), turn_ids(vlm, COMPLIANT, ends=False)
    harmless = read("harmless_fit.txt", "harmless", 6, "typographic")
    own = Questions(vlm, harmless, ASKING, 6, quiet).ask(None, 10, quiet)
    return [
        Exchange(sample, refusing, compliant)
        for sample in read("harmful_fit.txt", "harmful", 6, "typographic")
    ] + [
        Exchange(sample, turn_ids(vlm, text, ends=False), refusing)
        for sample, text in zip(harmless, own, strict=True)
    ]


# ---- forced turns


def test_a_forced_turn_is_as_likely_as_its_opening(vlm: Vlm) -> None:
    samples = read("harmful_fit.txt", "harmful", 3, "text")
    turns = [turn_ids(vlm, text, ends=False) for text in (REFUSING, COMPLIANT)]
    expected = log_likelihoods(vlm, samples, ASKING, None, turns, 3)
    ((_, batch),) = batches(vlm, samples, ASKING, 3)
    padded = forced([turns[0], turns[1], turns[0]])
    with torch.no_grad():
        seen = padded.surprise(Session(vlm, prepare(vlm, batch), None)).sum(1)
    wanted = [expected[0, 0], expected[1, 1], expected[2, 0]]
    np.testing.assert_allclose(-seen.numpy(), wanted, atol=1e-4)


def test_a_turn_that_ends_says_so(vlm: Vlm) -> None:
    whole, cut = (turn_ids(vlm, COMPLIANT, ends) for ends in (True, False))
    assert whole[:-1] == cut
    assert whole[-1] == vlm.processor.tokenizer.eos_token_id


def test_every_exchange_has_its_turn_before_any_comes_again(exchanges: list[Exchange]) -> None:
    threes, again = drawn(exchanges, 3, 0), drawn(exchanges, 3, 0)
    first, second = next(threes), next(threes)
    assert [e.sample.label for e in first] == ["harmful"] * 3 + ["harmless"] * 3
    assert {e.sample for e in first + second} == {e.sample for e in exchanges}
    assert next(again) == first
    assert next(drawn(exchanges, 3, 1)) != first


# ---- ASTRA's measurements


def plan(choose: Callable[..., Any], times: int = 6) -> Ablation:
    return Ablation(times, 0.5, 0, choose)


def test_all_tokens_ablated_is_a_white_picture(vlm: Vlm) -> None:
    samples = read("harmful_fit.txt", "harmful", 3, "typographic")
    seen: list[np.ndarray] = []

    def every(kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(scores)
        return np.ones(kept.shape[1], bool)

    turns = [turn_ids(vlm, COMPLIANT, ends=False)]
    found = capture_ablated(vlm, samples, turns, [FOUR], ASKING, 4, plan(every), quiet)
    whole = capture(vlm, samples, [FOUR], ASKING, 3, quiet).last[FOUR]

    class White:
        def request(self, sample: Sample, tokenizer: Any) -> Any:
            text, image = ASKING.request(sample, tokenizer)
            assert image is not None
            return text, image.point(lambda _: 255)

    white = capture(vlm, samples, [FOUR], White(), 3, quiet).last[FOUR]
    np.testing.assert_allclose(found[FOUR], whole - white, atol=1e-4)
    assert np.abs(whole - white).max() > 0.1
    assert all(np.isfinite(scores).all() and np.ptp(scores) > 0 for scores in seen)
    again = capture_ablated(vlm, samples, turns, [FOUR], ASKING, 5, plan(every), quiet)
    np.testing.assert_allclose(again[FOUR], found[FOUR], atol=1e-5)


def test_a_picture_that_hangs_on_no_token_leaves_no_row(vlm: Vlm) -> None:
    samples = read("harmful_fit.txt", "harmful", 2, "typographic")
    turns = [turn_ids(vlm, COMPLIANT, ends=False)]
    answers = iter([True, False])
    some = plan(lambda kept, _: np.full(kept.shape[1], next(answers)))
    found = capture_ablated(vlm, samples, turns, [FOUR], ASKING, 6, some, quiet)
    assert found[FOUR].shape == (1, 128)
    none = plan(lambda kept, _: np.zeros(kept.shape[1], bool))
    assert capture_ablated(vlm, samples, turns, [FOUR], ASKING, 6, none, quiet) == {}


def test_words_alone_have_nothing_to_ablate(vlm: Vlm) -> None:
    samples = read("harmful_fit.txt", "harmful", 1, "text")
    with pytest.raises(UsageError, match="without a picture"):
        capture_ablated(vlm, samples, [(1,)], [FOUR], ASKING, 6, plan(lambda k, _: k[0]), quiet)


def test_turns_are_read_as_answers_are(vlm: Vlm) -> None:
    samples = read("harmless_fit.txt", "harmless", 3, "typographic")
    turn = turn_ids(vlm, COMPLIANT, ends=False)
    found = capture_turns(vlm, samples, [turn] * 3, [FOUR], ASKING, 2, quiet)
    expected = capture_answers(vlm, samples, [COMPLIANT], [FOUR], ASKING, 3, quiet)
    np.testing.assert_allclose(found[FOUR], expected.mean[FOUR], atol=1e-5)


# ---- SPO-VLM


def starts(scale: float = 1.0) -> dict[Site, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s: scale * rng.standard_normal(128).astype(np.float32) for s in (FOUR, FIVE)}


def preference(vlm: Vlm, exchanges: list[Exchange], vectors: dict[Site, np.ndarray]) -> float:
    """Mean over exchanges of ln p(wanted) - ln p(unwanted), by the reference guard."""
    edits = tuple(
        Edit(site, "steer", (), np.float32(vectors[site])) for site in sorted(vectors, key=str)
    )
    spec = GuardSpec(ModelIdentity("llava", 6, 128, "0" * 64), "spo", "always", (), edits)
    rows = []
    for some in filter(None, (exchanges[:6], exchanges[6:])):
        samples = [exchange.sample for exchange in some]
        turns = sorted({turn for e in some for turn in (e.wanted, e.unwanted)})
        likely = log_likelihoods(vlm, samples, ASKING, spec, turns, 6)
        for row, e in zip(likely, some, strict=True):
            rows.append(row[turns.index(e.wanted)] - row[turns.index(e.unwanted)])
    return float(np.mean(rows))


@pytest.mark.parametrize("whole", [True, False])
def test_refined_vectors_prefer_what_they_should(
    vlm: Vlm, exchanges: list[Exchange], whole: bool
) -> None:
    descent = Descent(6, 3, 0.15, 0)
    exchanges = exchanges if whole else exchanges[:6]
    before = {site: vector.copy() for site, vector in starts().items()}
    after = refine(vlm, exchanges, before, whole, ASKING, descent, quiet)
    assert preference(vlm, exchanges, after) > preference(vlm, exchanges, before) + 1
    for site, vector in starts().items():
        np.testing.assert_array_equal(before[site], vector)
        moved = np.linalg.norm(after[site] - vector) / np.linalg.norm(vector)
        assert 0 < moved < 6 * 0.15 * 1.1
    again = refine(vlm, exchanges, before, whole, ASKING, descent, quiet)
    assert all(again[site].tobytes() == after[site].tobytes() for site in after)


def test_vectors_that_cannot_be_refined_are_named(vlm: Vlm, exchanges: list[Exchange]) -> None:
    descent = Descent(1, 4, 0.1, 0)
    with pytest.raises(MalformedError, match="zero at"):
        refine(vlm, exchanges, starts(0.0), True, ASKING, descent, quiet)
    with pytest.raises(MalformedError, match=r"exchanges of \['harmful'\]"):
        refine(vlm, exchanges[:6], starts(), True, ASKING, descent, quiet)
    with pytest.raises(MalformedError, match=r"expected exchanges of \['harmful'\]"):
        refine(vlm, exchanges, starts(), False, ASKING, descent, quiet)


# ---- the fine-tune


@pytest.fixture(scope="module")
def tuned(vlm: Vlm, exchanges: list[Exchange]) -> LowRank:
    return tune(vlm, exchanges, ASKING, Tuning(4, 8, 3, 6e-3, 0), quiet)


def harmful_refusals(vlm: Vlm, change: LowRank | None) -> np.ndarray:
    samples = read("harmful_validate.txt", "harmful", 12, "typographic")
    with merged(vlm, change):
        turns = [turn_ids(vlm, text, ends=False) for text in (REFUSING, COMPLIANT)]
        return log_likelihoods(vlm, samples, ASKING, None, turns, 12)


def test_a_fine_tune_refuses_more_and_leaves_no_trace(vlm: Vlm, tuned: LowRank) -> None:
    weights = dict(vlm.model.named_parameters())
    bytes_before = {name: weight.numpy().tobytes() for name, weight in weights.items()}
    before = harmful_refusals(vlm, None)
    after = harmful_refusals(vlm, tuned)
    assert (after[:, 0] - after[:, 1]).mean() > (before[:, 0] - before[:, 1]).mean() + 1
    assert harmful_refusals(vlm, None).tobytes() == before.tobytes()
    for name, weight in vlm.model.named_parameters():
        assert weight is weights[name]
        assert weight.numpy().tobytes() == bytes_before[name]


def test_the_model_is_itself_again_after_an_error(vlm: Vlm, tuned: LowRank) -> None:
    weights = list(vlm.model.parameters())

    def fail() -> None:
        with merged(vlm, tuned):
            inside = list(vlm.model.parameters())
            assert sum(a is not b for a, b in zip(weights, inside, strict=True)) == 6 * 7
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(a is b for a, b in zip(weights, vlm.model.parameters(), strict=True))


def test_what_is_merged_is_what_was_trained(
    vlm: Vlm, exchanges: list[Exchange], tuned: LowRank
) -> None:
    """A rate of nothing keeps a second path beside the layers that says what merging says."""
    ((_, batch),) = batches(vlm, [exchanges[0].sample], ASKING, 1)
    turn = forced([exchanges[0].wanted])
    weight = vlm.model.get_submodule(f"{vlm.family.layers}.0.mlp.up_proj").weight
    name = next(n for n in tuned.up if n.endswith("layers.0.mlp.up_proj"))
    with merged(vlm, tuned), torch.no_grad():
        inside = turn.surprise(Session(vlm, prepare(vlm, batch), None))
        module = vlm.model.get_submodule(name)
        expected = weight + 2.0 * tuned.up[name] @ tuned.down[name]
        assert torch.equal(module.weight, expected)
    with torch.no_grad():
        outside = turn.surprise(Session(vlm, prepare(vlm, batch), None))
    assert float((inside - outside).abs().max()) > 0.1


def test_gradients_pass_the_changed_weights_even_after_they_are_gone(
    vlm: Vlm, exchanges: list[Exchange], tuned: LowRank
) -> None:
    ((_, batch),) = batches(vlm, [exchanges[0].sample], ASKING, 1)
    turn = forced([exchanges[0].wanted])
    slopes = []
    for late in (False, True):
        pixels = torch.tensor(batch.pixel_values, requires_grad=True)
        with merged(vlm, tuned):
            loss = turn.surprise(Session(vlm, prepare(vlm, batch, pixels), None)).sum()
            if not late:
                loss.backward()
        if late:
            loss.backward()
        assert pixels.grad is not None
        slopes.append(pixels.grad)
    assert torch.equal(*slopes)


def test_the_same_exchanges_tune_the_same_way_and_survive_a_file(
    vlm: Vlm, exchanges: list[Exchange], tuned: LowRank, tmp_path: Path
) -> None:
    short = [tune(vlm, exchanges, ASKING, Tuning(2, 2, 2, 1e-3, s), quiet) for s in (0, 0, 1)]
    assert short[0].digest == short[1].digest != short[2].digest
    save_low_rank(tuned, tmp_path / "factors.safetensors")
    assert load_low_rank(tmp_path / "factors.safetensors").digest == tuned.digest


def test_factors_that_do_not_fit_are_refused(
    vlm: Vlm, exchanges: list[Exchange], tuned: LowRank, tmp_path: Path
) -> None:
    with pytest.raises(MalformedError, match="exchanges of"):
        tune(vlm, exchanges[6:], ASKING, Tuning(2, 2, 2, 1e-3, 0), quiet)
    name = next(iter(tuned.down))
    other = LowRank({name: tuned.down[name][:, 1:]}, {name: tuned.up[name]})
    with pytest.raises(MalformedError, match="this model's linear layers"), merged(vlm, other):
        pass
    (tmp_path / "cut.safetensors").write_bytes(b"no factors")
    with pytest.raises(MalformedError, match="factors of a fine-tune"):
        load_low_rank(tmp_path / "cut.safetensors")
    save_low_rank(LowRank(tuned.down, {}), tmp_path / "half.safetensors")
    with pytest.raises(MalformedError, match="other half"):
        load_low_rank(tmp_path / "half.safetensors")
