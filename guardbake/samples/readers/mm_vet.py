"""MM-Vet: open questions about pictures that need several abilities (arXiv 2308.02490).

Layout: github.com/yuweihao/MM-Vet, release v1, mm-vet.zip unpacked: mm-vet.json, an object of
questions by id (v1_0, ...), and images/. Used: imagename, question, answer, capability. In an
answer "<AND>" joins what must all be said and "<OR>" what each suffices. The official score is
GPT-4's, which reads answer and reference; offline there is a proxy (`guardbake.evaluate.utility`).
Part: the capabilities, sorted and joined with '+'.
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples.questions import Question
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import first_of, inside, malformed, objects_of, words_of

FILE = "mm-vet.json"


def _read(path: Path) -> list[Entry]:
    file = path if path.is_file() else first_of(path, (FILE, f"mm-vet/{FILE}"))
    if file is None:
        raise missing(path, FILE)
    entries = []
    for index, (key, item) in enumerate(objects_of(file)):
        needed = item.get("capability")
        if not isinstance(needed, list) or not all(isinstance(one, str) for one in needed):
            raise malformed(file, f"{key} without a list 'capability'", "its names in every entry")
        name = words_of(item, "imagename", file, key)
        question = Question(
            words_of(item, "question", file, key),
            "harmless",
            "",
            index,
            image=inside(file.parent, f"images/{name}", f"{file.name} {key}"),
            answer=words_of(item, "answer", file, key),
        )
        entries.append(Entry(question, {"capabilities": "+".join(sorted(needed))}))
    return entries


MM_VET = Benchmark(
    name="MM-Vet",
    home="https://github.com/yuweihao/MM-Vet/releases/tag/v1",
    layout=f"the unpacked mm-vet.zip: a folder with {FILE} and images/",
    read=_read,
)
