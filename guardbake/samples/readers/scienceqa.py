"""ScienceQA: school questions with options (Lu et al., arXiv 2209.09513); those with a picture.

Layout: github.com/lupantech/ScienceQA, data/scienceqa/problems.json, an object of questions by id,
and the pictures as its tools/download.sh unpacks them: images/<split>/<id>/<image>. Used: question,
hint, choices, answer (an index from 0), image, split, subject. Questions without a picture are left
out, as in the subset the literature on VLMs calls ScienceQA-IMG.
Parts: split (test, unless named), subject.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardbake.samples.questions import LETTERS, Question, asked_with_options
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import first_of, inside, malformed, objects_of, words_of

FILE = "problems.json"


def _read(path: Path) -> list[Entry]:
    file = path if path.is_file() else first_of(path, (FILE, f"data/scienceqa/{FILE}"))
    if file is None:
        raise missing(path, f"data/scienceqa/{FILE}")
    entries = [
        _entry(item, index, key, file)
        for index, (key, item) in enumerate(objects_of(file))
        if item.get("image") is not None
    ]
    if not entries:
        raise malformed(file, "no question with a picture", "the benchmark's own file")
    return entries


def _entry(item: dict[str, Any], index: int, key: str, file: Path) -> Entry:
    place = f"question {key}"
    choices, right, hint = item.get("choices"), item.get("answer"), item.get("hint") or ""
    split, name = (words_of(item, field, file, place) for field in ("split", "image"))
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise malformed(file, f"{place} without a list 'choices'", "texts in every list")
    if not isinstance(right, int) or not 0 <= right < len(choices) or not isinstance(hint, str):
        raise malformed(file, f"{place} with an answer out of range", "an index into 'choices'")
    options = tuple(choice.strip() for choice in choices)
    asked = words_of(item, "question", file, place)
    question = Question(
        asked_with_options(asked, hint, options, f"{file.name} {place}"),
        "harmless",
        "",
        index,
        image=inside(file.parent, f"images/{split}/{key}/{name}", f"{file.name} {place}"),
        options=options,
        answer=LETTERS[right],
    )
    return Entry(question, {"split": split, "subject": words_of(item, "subject", file, place)})


SCIENCEQA = Benchmark(
    name="ScienceQA",
    home="https://github.com/lupantech/ScienceQA",
    layout=f"a folder with {FILE} and images/<split>/<id>/image.png (tools/download.sh)",
    read=_read,
    usual=("test",),
)
