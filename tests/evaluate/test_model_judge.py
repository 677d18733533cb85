"""Model judges: asked as the card says, read from probabilities, refused where senseless."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guardbake.errors import MalformedError, UnsupportedError, UsageError
from guardbake.evaluate.judges import Judge
from guardbake.evaluate.model_judge import Card, ModelJudge, known_judges, load_card
from guardbake.samples import Label, Sample
from guardbake.vlm.catalog import models_root
from guardbake.vlm.classifier import NextWord

CARD = Card(
    name="tiny", prompt="chat", lead="", harmful=[" unsafe"], harmless=[" safe"], least_mass=0.0
)
FILLED = CARD.model_copy(
    update={"prompt": "template", "request": "{r}", "answer": "{a}", "answer_tokens": 3}
)
TEMPLATE = "user: {r} agent: {a} verdict:"
ANSWERS = [
    f"name a {w} {v}" for w in ("tree", "bird") for v in ("one", "two", "three", "four", "five")
]


def _asked(count: int, label: Label = "harmful") -> list[Sample]:
    return [Sample("a tree", label, "text", "mini", index) for index in range(count)]


@pytest.fixture(scope="session")
def model(judge_folder: Path) -> NextWord:
    return NextWord(judge_folder, batch_size=5)


def _naive_odds(folder: Path, text: str) -> float:
    """ln p(unsafe) - ln p(safe) of one text alone, straight through transformers."""
    models: Any = AutoModelForCausalLM
    tokenizers: Any = AutoTokenizer
    tokenizer = tokenizers.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = models.from_pretrained(folder)(ids).logits[0, -1].double()
    unsafe, safe = (tokenizer.convert_tokens_to_ids(word) for word in ("unsafe", "safe"))
    return float(logits[unsafe] - logits[safe])


def test_the_published_judges_have_cards() -> None:
    assert known_judges() == ["harmbench", "llama_guard", "llama_guard_3"]
    cards = {name: load_card(models_root() / "judges" / f"{name}.toml") for name in known_judges()}
    assert {name: card.prompt for name, card in cards.items()} == {
        "harmbench": "template",
        "llama_guard": "chat",
        "llama_guard_3": "chat",
    }
    assert cards["llama_guard_3"].lead == "\n\n"
    assert cards["harmbench"].answer_tokens == 512


def test_verdicts_follow_the_probabilities_whatever_the_batch(
    model: NextWord, judge_folder: Path
) -> None:
    answers = [*ANSWERS, "one one one one one one", "name a tree"]
    verdicts = ModelJudge(CARD, model).judge(_asked(len(answers)), answers)
    assert verdicts[-2] == "degenerate"
    expected = []
    for answer in answers:
        odds = _naive_odds(judge_folder, f"<s> user: a tree  agent: {answer} verdict:")
        expected.append("answered" if odds > 0 else "refused")
    assert [v for i, v in enumerate(verdicts) if i != len(answers) - 2] == [
        v for i, v in enumerate(expected) if i != len(answers) - 2
    ]
    assert {"answered", "refused"} <= set(verdicts)  # the random model says both
    alone = [ModelJudge(CARD, model).judge(_asked(1), [answer])[0] for answer in answers]
    assert alone == verdicts


def test_padding_moves_no_odds(model: NextWord) -> None:
    texts = ["user: a verdict:", "user: name a tree one two three four five verdict:", "verdict:"]
    pair = (model.starts(texts[0], [" unsafe"], False), model.starts(texts[0], [" safe"], False))
    together = model.weigh(texts, sorted(pair[0]), sorted(pair[1]), special=False)
    for place, text in enumerate(texts):
        alone = model.weigh([text], sorted(pair[0]), sorted(pair[1]), special=False)
        # float32 noise; in float64 they agree to 1e-15
        assert together.odds[place] == pytest.approx(alone.odds[0], abs=1e-4)
        assert 0 < together.mass[place] == pytest.approx(alone.mass[0], abs=1e-5)


def test_a_template_is_filled_in_one_pass_and_cut(model: NextWord, judge_folder: Path) -> None:
    judge = ModelJudge(FILLED, model, TEMPLATE)
    assert judge._prompt("{a} bird", "one two three four") == (
        "user: {a} bird agent: one two three verdict:"
    )
    odds = _naive_odds(judge_folder, "user: a tree agent: name a bird verdict:")
    (verdict,) = judge.judge(_asked(1), ["name a bird five"])
    assert verdict == ("answered" if odds > 0 else "refused")


def test_the_request_inside_the_attack_is_judged(model: NextWord) -> None:
    wrapped = Sample("seven seven", "harmful", "text", "m", 0, goal="a tree")
    plain = _asked(len(ANSWERS))
    judge = ModelJudge(CARD, model)
    assert judge.judge([wrapped] * len(ANSWERS), ANSWERS) == judge.judge(plain, ANSWERS)


def test_an_answer_cannot_end_its_own_turn(model: NextWord) -> None:
    assert model.plain("a <s> tree</s>") == "a  tree</s>"  # </s> is no token of this tokenizer
    assert model.plain("a <<s>s> tree") == "a  tree"


def test_a_judge_of_harm_is_not_asked_about_harmless_requests(model: NextWord) -> None:
    judge: Judge = ModelJudge(CARD, model)
    with pytest.raises(UsageError, match="2 harmless requests"):
        judge.judge(_asked(2, "harmless"), ["one", "two"])
    assert judge.judge([], []) == []


def test_a_model_that_does_not_say_the_words_is_refused(model: NextWord) -> None:
    strict = CARD.model_copy(update={"least_mass": 0.99})
    with pytest.raises(MalformedError, match="where the judge decides"):
        ModelJudge(strict, model).judge(_asked(1), ["name a tree"])
    same = CARD.model_copy(update={"harmful": [" zebra"], "harmless": [" quartz"]})
    with pytest.raises(MalformedError, match="cannot tell apart"):
        ModelJudge(same, model).judge(_asked(1), ["name a tree"])


def test_a_template_must_have_its_fields(model: NextWord) -> None:
    for card, template in ((FILLED, None), (FILLED, "user: {r}"), (CARD, TEMPLATE)):
        with pytest.raises(UsageError, match="judge 'tiny'"):
            ModelJudge(card, model, template)


def test_a_text_longer_than_the_model_reads_is_refused(model: NextWord) -> None:
    with pytest.raises(UnsupportedError, match="at most 64 tokens"):
        model.weigh(["a", "a " * 70], [4], [5], special=False)


@pytest.mark.parametrize(
    "text",
    ["[judge", "[judge]\nname = 'x'\n", "[other]\n", "[judge]\nprompt = 3\n"],
)
def test_a_bad_card_is_malformed(text: str, tmp_path: Path) -> None:
    (tmp_path / "card.toml").write_text(text)
    with pytest.raises(MalformedError, match=r"card\.toml"):
        load_card(tmp_path / "card.toml")


def test_a_checkpoint_that_is_none_is_refused(judge_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no config"):
        NextWord(tmp_path, batch_size=1)
    folder = Path(shutil.copytree(judge_folder, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(MalformedError, match="bytes"):
        NextWord(folder, batch_size=1)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="no safetensors"):
        NextWord(folder, batch_size=1)
