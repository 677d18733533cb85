"""The request lists in models/prompts: shape, pairing, and no request in two of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guardbake.samples import Label
from guardbake.samples.readers import read
from guardbake.samples.splits import normalised, prove_disjoint

ROOT = Path(__file__).parents[2]
LISTS: dict[str, tuple[Label, int]] = {
    "anchors_harmful": ("harmful", 100),
    "anchors_harmless": ("harmless", 100),
    "harmless_fit": ("harmless", 260),
    "harmless_validate": ("harmless", 120),
    "harmless_test": ("harmless", 140),
    "lookalikes_fit": ("harmless", 107),
    "lookalikes_validate": ("harmless", 30),
    "lookalikes_test": ("harmless", 30),
}


def _texts(name: str) -> list[str]:
    label = LISTS[name][0]
    return [p.prompt for p in read(f"file:models/prompts/{name}.txt", ROOT, label)]


@pytest.mark.parametrize("name", LISTS)
def test_list_has_its_size_no_repetition_and_plain_characters(name: str) -> None:
    texts = _texts(name)
    assert len(texts) == LISTS[name][1]
    assert len({normalised(text) for text in texts}) == len(texts)
    odd = [i for i, text in enumerate(texts) if not re.fullmatch(r"[A-Za-z0-9'&% -]+", text)]
    assert odd == []
    assert all(4 <= len(text.split()) <= 30 for text in texts)


def test_every_list_states_its_licence() -> None:
    for path in sorted((ROOT / "models/prompts").glob("*.txt")):
        header = [li for li in path.read_text(encoding="utf-8").splitlines() if li[:1] == "#"]
        assert "Apache-2.0" in " ".join(header), path.name


def test_anchor_pairs_share_verb_form_and_length() -> None:
    pairs = zip(_texts("anchors_harmful"), _texts("anchors_harmless"), strict=True)
    for index, (harmful, harmless) in enumerate(pairs):
        bad, good = harmful.split(), harmless.split()
        assert bad[:3] == good[:3], index
        assert bad[:2] == ["How", "to"], index
        assert len(bad) == len(good), index
        assert len(bad) <= 8, index


def test_no_request_stands_in_two_lists_or_in_the_training_list_or_a_benchmark() -> None:
    splits = {
        name: read(f"file:models/prompts/{name}.txt", ROOT, label)
        for name, (label, _) in LISTS.items()
    }
    train = "file:models/prompts/harmless_train.txt"
    splits["harmless_train"] = read(train, ROOT, "harmless")
    for source in ("advbench:train", "advbench:fit", "advbench:test", "harmbench"):
        splits[source] = read(source, ROOT, "harmful")
    assert len(prove_disjoint(splits)) == len(LISTS) + 5
