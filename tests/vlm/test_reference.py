"""The PyTorch reference against the law, on what the tiny model really computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from guardbake import semantics as law
from guardbake.errors import UsageError
from guardbake.site import Site
from guardbake.spec import GuardSpec, Reading, Sensor, linear_sensor
from guardbake.vlm.catalog import models_root
from guardbake.vlm.load import Vlm, load_vlm
from guardbake.vlm.reference import TorchGuard, on_site

KINDS = ("care", "care parallel", "care sequential", "project", "add", "steer", "astra")
PROFILES = ("always", "token", "sequence")
WIDTH, LAYERS = 128, 6
TEXT_SITES = [Site(2, "ffn_output"), Site(4, "ffn_output")]
SHAPE = {"width": WIDTH, "layers": LAYERS, "sensor": Site(1, "residual"), "edits": (2, 4)}
# The same numbers in torch and in numpy, in another order of summation: d products of numbers up
# to `scale`, each with a relative error of 2**-24, and some margin for the norms and the fusion.
NOISE = 4 * WIDTH * 2**-24


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return load_vlm(str(models_root() / "tiny-llava"))


@pytest.fixture
def layers(vlm: Vlm) -> nn.ModuleList:
    found = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(found, nn.ModuleList)
    return found


@pytest.fixture(autouse=True)
def nothing_stays_behind(vlm: Vlm) -> Iterator[None]:
    """After every test of this file no module of the model has a hook."""
    yield
    assert hooks(vlm.model) == 0


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def inputs(batch: int = 4, tokens: int = 9) -> tuple[Tensor, Tensor]:
    """Token ids and a mask with two left-padded rows."""
    ids = torch.randint(5, 100, (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :1] = 0
    return ids, mask


def forward(vlm: Vlm, guard: TorchGuard | None = None) -> dict[Site, np.ndarray]:
    """One call; every site as the model computed it, before the guard changed it."""
    ids, mask = inputs()
    seen: dict[Site, np.ndarray] = {}

    def keep(site: Site) -> Any:
        def see(tensor: Tensor) -> None:
            seen[site] = tensor.numpy().copy()

        return see

    layers: Any = vlm.model.get_submodule(vlm.family.layers)
    with torch.no_grad(), ExitStack() as stack:
        for layer in range(LAYERS):
            for boundary in ("ffn_output", "residual"):
                site = Site(layer, "residual" if boundary == "residual" else "ffn_output")
                stack.enter_context(on_site(layers, vlm.family.feed_forward, site, keep(site)))
        if guard is not None:
            guard.attention_mask = mask
            stack.enter_context(guard.installed(layers, vlm.family.feed_forward))
        decoder = vlm.model.get_submodule(vlm.family.decoder)
        out = decoder(input_ids=ids, attention_mask=mask)
    seen[Site(99, "residual")] = out.last_hidden_state.numpy().copy()
    return seen


def open_by_law(spec: GuardSpec, seen: dict[Site, np.ndarray]) -> tuple[list[Any], list[Any], Any]:
    """(scores, open) of each gate, and the state of a sequence guard."""
    mask = inputs()[1].numpy()
    scores, opens, states = [], [], []
    for sensor in spec.sensors:
        features = law.features([seen[site] for site in sensor.sites], sensor.readings)
        scores.append(law.score(features, sensor.thresholds))
        if spec.profile == "token":
            opens.append(law.gate_by_token(scores[-1], mask))
        else:
            opened, state = law.gate_by_sequence(scores[-1], mask, -mask.sum(1))
            opens.append(opened)
            states.append(state)
    return scores, opens, law.joint_state(states) if states else None


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_reference_computes_the_law(
    vlm: Vlm, guard: Any, profile: str, kind: str, gains: bool
) -> None:
    strength = 20.0 if kind == "astra" else 0.7  # as small as the FFN outputs are, it has no push
    spec = guard(profile, kind, strength=strength, threshold=0.0, gains=gains, **SHAPE)
    reference = TorchGuard(spec, -inputs()[1].sum(1))
    computes_the_law(spec, reference, forward(vlm, reference))


@pytest.mark.parametrize("kind", ["add", "steer"])
@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_each_gate_opens_its_own_edit(vlm: Vlm, guard: Any, profile: str, kind: str) -> None:
    """The second gate reads behind the first edit: of four prompts two open that, one the other."""
    spec = guard(profile, kind, strength=0.7, later=(Site(3, "residual"),), **SHAPE)
    for gate, opens in ((0, 2), (1, 1)):
        reference = TorchGuard(spec, -inputs()[1].sum(1))
        forward(vlm, reference)
        ends = reference.scores[gate][:, -1].sort(descending=True).values
        limit = float(spec.sensors[gate].thresholds[0] + ends[opens - 1 : opens + 1].mean())
        sensors = list(spec.sensors)
        sensors[gate] = replace(sensors[gate], thresholds=(limit,))
        spec = replace(spec, sensors=tuple(sensors))
    reference = TorchGuard(spec, -inputs()[1].sum(1))
    computes_the_law(spec, reference, forward(vlm, reference))
    assert [int(opened[:, -1].sum()) for opened in reference.opens] == [2, 1]


def computes_the_law(spec: GuardSpec, reference: TorchGuard, seen: dict[Site, np.ndarray]) -> None:
    scores, opens, state = open_by_law(spec, seen)
    scale = max(1.0, *(float(np.abs(array).max()) for array in seen.values()))
    assert len(reference.scores) == len(reference.opens) == len(spec.sensors)
    for gate, (score, opened) in enumerate(zip(scores, opens, strict=True)):
        assert np.abs(reference.scores[gate].numpy() - score).max() < NOISE * scale
        assert (reference.opens[gate].numpy() == opened).all()
        assert 0 < opened.sum() < opened.size
    if state is not None:
        assert reference.state.tolist() == state.tolist()
    for edit in spec.edits:
        y = seen[edit.site]
        opened = opens[edit.gate] if opens else np.ones(y.shape[:2], bool)
        expected = law.gated(y, law.edited(y, edit), opened)
        got = reference.edited[edit.site].numpy()
        assert np.abs(got - expected).max() < NOISE * scale
        assert np.abs(expected - y).max() > 1e3 * NOISE * scale  # the edit is no noise
        assert (got[~opened] == y[~opened]).all()


def test_replace_puts_in_what_the_text_said(vlm: Vlm, guard: Any) -> None:
    spec = guard("sequence", "replace", strength=0.7, threshold=0.0, **SHAPE)
    reference = TorchGuard(spec, -inputs()[1].sum(1))
    with pytest.raises(UsageError, match="text-only"):
        forward(vlm, reference)
    reference = TorchGuard(spec, -inputs()[1].sum(1))
    rng = np.random.default_rng(0)
    rows = {site: rng.standard_normal((4, WIDTH)).astype(np.float32) for site in TEXT_SITES}
    assert reference.text_sites == list(rows)
    reference.hear({site: torch.from_numpy(row) for site, row in rows.items()})
    seen = forward(vlm, reference)
    _, (opened,), _ = open_by_law(spec, seen)
    assert 0 < opened.sum() < opened.size
    for edit in spec.edits:
        y, branch = seen[edit.site], edit.branches[0]
        text = law.coordinates(rows[edit.site], branch)
        expected = law.gated(y, law.edited(y, edit, text), opened)
        got = reference.edited[edit.site].numpy()
        assert np.abs(got - expected).max() < NOISE * 10  # rows and centres reach 4
        assert np.abs(expected - y).max() > 0.1
        assert (got[~opened] == y[~opened]).all()


def test_the_model_goes_on_from_the_edited_tensor(vlm: Vlm, guard: Any) -> None:
    spec = guard("always", "steer", **SHAPE)
    reference = TorchGuard(spec, torch.zeros(4, dtype=torch.long))
    plain, guarded = forward(vlm), forward(vlm, reference)
    first = Site(2, "ffn_output")
    assert (plain[first] == guarded[first]).all()  # nothing before the first edit changes
    assert np.abs(plain[Site(3, "ffn_output")] - guarded[Site(3, "ffn_output")]).max() > 0.01
    moved = guarded[Site(2, "residual")] - plain[Site(2, "residual")]
    push = spec.edits[0].push
    assert push is not None
    assert np.abs(moved - push).max() < NOISE * max(1.0, np.abs(plain[Site(2, "residual")]).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_closed_is_the_undefended_model_bit_for_bit(
    vlm: Vlm, guard: Any, profile: str, kind: str
) -> None:
    spec = guard(profile, kind, threshold=1e30, strength=4.5, **SHAPE)
    reference = TorchGuard(spec, -inputs()[1].sum(1))
    plain, guarded = forward(vlm), forward(vlm, reference)
    assert all(guarded[site].tobytes() == plain[site].tobytes() for site in plain)
    if profile == "sequence":
        assert reference.state.tolist() == [law.CLOSED] * 4


def test_hooks_are_there_inside_and_gone_after(vlm: Vlm, layers: nn.ModuleList, guard: Any) -> None:
    spec = guard("sequence", "care", **SHAPE)
    with TorchGuard(spec, torch.zeros(1)).installed(layers, vlm.family.feed_forward):
        assert hooks(vlm.model) == 3
    assert hooks(vlm.model) == 0


def test_hooks_are_gone_after_an_error(vlm: Vlm, layers: nn.ModuleList, guard: Any) -> None:
    reference = TorchGuard(guard("sequence", "care", **SHAPE), torch.zeros(1))
    with (
        pytest.raises(RuntimeError, match="stop"),
        reference.installed(layers, vlm.family.feed_forward),
    ):
        raise RuntimeError("stop")
    assert hooks(vlm.model) == 0


# ---- the gate, fed with scores


def plain_sensor(guard: Any, profile: str) -> GuardSpec:
    """A sensor whose score is the first number of a token."""
    spec = guard(profile, "steer", width=2)
    one, none = np.array([1, 0], np.float32), np.zeros(2, np.float32)
    return replace(spec, sensors=(linear_sensor(Site(0, "residual"), one, none, 0.0),))


@st.composite
def calls(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """(scores [B, T], mask [B, T] with any padding left and right, state [B], call ends)."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    value = st.sampled_from([-2.0, 0.0, 1.0, np.nan, np.inf])
    scores = np.array([[draw(value) for _ in range(tokens)] for _ in range(batch)])
    mask = np.ones((batch, tokens), np.int64)
    for row in mask:
        row[: draw(st.integers(0, tokens))] = 0
        row[tokens - draw(st.integers(0, 2)) :] = 0
    state = np.array([draw(st.integers(-8, 2)) for _ in range(batch)], np.int64)
    cuts = draw(st.sets(st.integers(1, tokens), max_size=4))
    return scores.astype(np.float32), mask, state, sorted(cuts | {tokens})


@given(calls())
@settings(max_examples=25)
@pytest.mark.parametrize("profile", ["token", "sequence"])
def test_the_gate_is_the_law_s(
    guard: Any, profile: str, case: tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]
) -> None:
    scores, mask, state, stops = case
    reference = TorchGuard(plain_sensor(guard, profile), torch.from_numpy(state.copy()))
    start = 0
    for stop in stops:
        part, so_far = scores[:, start:stop], mask[:, :stop]
        reference.attention_mask = torch.from_numpy(so_far)
        x = np.stack([part, np.zeros_like(part)], axis=-1)
        reference.read(0, reference.spec.sensors[0].readings[0], torch.from_numpy(x))
        if profile == "token":
            expected = law.gate_by_token(part, so_far)
        else:
            expected, state = law.gate_by_sequence(part, so_far, state)
            assert reference.state.tolist() == state.tolist()
        assert reference.opens[0].tolist() == expected.tolist()
        start = stop


def test_a_prompt_whose_end_was_missed_opens(guard: Any) -> None:
    """As in the law: four tokens are in the mask alone, the first row's end is among them."""
    scores, mask = np.full((3, 2), -1.0, np.float32), np.ones((3, 6), np.int64)
    state = np.array([-3, -5, -7])
    reference = TorchGuard(plain_sensor(guard, "sequence"), torch.from_numpy(state.copy()))
    reference.attention_mask = torch.from_numpy(mask)
    reference.read(
        0,
        reference.spec.sensors[0].readings[0],
        torch.from_numpy(np.stack([scores, np.zeros_like(scores)], axis=-1)),
    )
    expected, after = law.gate_by_sequence(scores, mask, state)
    assert reference.opens[0].tolist() == expected.tolist()
    assert reference.state.tolist() == after.tolist() == [2, 1, -7]


@given(calls(), st.integers(0, 2**16), st.booleans())
@settings(max_examples=25)
def test_the_pooled_score_is_the_law_s(
    guard: Any,
    case: tuple[np.ndarray, np.ndarray, np.ndarray, list[int]],
    seed: int,
    careless: bool,
) -> None:
    """Two readings whose features are the tokens' own numbers; a careless caller loses memory."""
    scores, mask, state, stops = case
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *scores.shape, 2)).astype(np.float32)
    eye, none = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    readings = tuple(Reading(Site(layer, "residual"), eye, none) for layer in (0, 1))
    limits = (0.2, -0.1, 0.1)
    spec = replace(guard("sequence", "steer", width=2), sensors=(Sensor(readings, limits),))
    reference = TorchGuard(spec, torch.from_numpy(state.copy()))
    memory, start = np.zeros((len(mask), 3)), 0
    for stop in stops:
        if careless:
            memory, reference.memory = np.zeros_like(memory), torch.zeros_like(reference.memory)
        so_far, parts = mask[:, :stop], list(x[:, :, start:stop])
        reference.attention_mask = torch.from_numpy(so_far)
        image = rng.random(so_far[:, start:].shape) < 0.4
        reference.image_mask = torch.from_numpy(image)
        for reading, part in zip(readings, parts, strict=True):
            reference.read(0, reading, torch.from_numpy(part))
        f = law.features(parts, readings)
        expected, after = law.pooled_score(f, limits, so_far, image, memory)
        opened, state = law.gate_by_sequence(expected, so_far, state, memory)
        memory, start = after, stop
        assert np.abs(reference.scores[0].numpy() - expected).max() < 1e-5  # float32 sums of a few
        assert reference.opens[0].tolist() == opened.tolist()
        assert reference.state.tolist() == state.tolist()


# ---- other dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_edited_in_float32(guard: Any, dtype: torch.dtype) -> None:
    spec = guard("always", "care", edits=(0,))
    reference = TorchGuard(spec, torch.zeros(2))
    y = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Identity()})])
    with reference.installed(layers, "mlp"):
        got = layers[0].get_submodule("mlp")(y)
    assert got.dtype == dtype
    exact = torch.from_numpy(law.edited(y.float().numpy(), spec.edits[0]))
    # one rounding at the end: half a unit in the last place of numbers below 8
    half = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
    assert float((got.float() - exact).abs().max()) <= half + NOISE


def test_a_float16_edit_saturates(guard: Any) -> None:
    spec = guard("always", "steer", edits=(0,), strength=1e6)
    reference = TorchGuard(spec, torch.zeros(1))
    layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Identity()})])
    with reference.installed(layers, "mlp"):
        got = layers[0].get_submodule("mlp")(torch.zeros(1, 1, 16, dtype=torch.float16))
    assert torch.isfinite(got).all()
    assert got.min() == -65504
    assert got.max() == 65504


def test_a_layer_that_returns_a_tuple_keeps_the_rest_of_it() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "cache"

    layers = nn.ModuleList([Pair()])
    with on_site(layers, "mlp", Site(0, "residual"), lambda x: x + 1):
        assert layers[0](torch.zeros(1))[0].item() == 1
        assert layers[0](torch.zeros(1))[1] == "cache"
    assert layers[0](torch.zeros(1))[0].item() == 0
