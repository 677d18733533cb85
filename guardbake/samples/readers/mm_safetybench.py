"""MM-SafetyBench: harmful questions whose key phrase stands in a picture (arXiv 2311.17600).

Layout: github.com/isXinLiu/MM-SafetyBench, with data/processed_questions/<scenario>.json from the
repository and data/imgs/<scenario>/<kind>/<id>.jpg from the archive that its README links. Thirteen
scenarios, 01-Illegal_Activitiy (spelt so) to 13-Gov_Decision. Every file is an object of questions
by id; used are "Question" (the plain request), "Rephrased Question" and "Rephrased Question(SD)".

Kinds: SD (a generated picture of the key phrase), TYPO (the phrase drawn) and SD_TYPO (both); SD is
asked with "Rephrased Question(SD)", the others with "Rephrased Question". The benchmark holds every
scenario for unsafe to answer; 08 and 10 to 13 (lobbying, legal, financial and health advice,
government decisions) are often left out because refusing them is a policy, not safety.
Family: mm-safetybench/<kind>. Parts: scenario, kind.
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples import Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import first_of, inside, objects_of, words_of

ASKED = {
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
}


def _read(path: Path) -> list[Entry]:
    questions = first_of(path, ("processed_questions", "data/processed_questions"))
    files = sorted(questions.glob("*.json")) if questions else []
    if questions is None or not files:
        raise missing(path, "data/processed_questions/<scenario>.json")
    entries: list[Entry] = []
    for file in files:
        for key, item in objects_of(file):
            goal = words_of(item, "Question", file, f"question {key}")
            for kind, asked in ASKED.items():
                place = f"{file.name} question {key}"
                prompt = Prompt(
                    words_of(item, asked, file, f"question {key}"),
                    "harmful",
                    "",
                    len(entries),
                    image=inside(questions.parent, f"imgs/{file.stem}/{kind}/{key}.jpg", place),
                    family=f"mm-safetybench/{kind}",
                    goal=goal,
                )
                entries.append(Entry(prompt, {"scenario": file.stem, "kind": kind}))
    return entries


MM_SAFETYBENCH = Benchmark(
    name="MM-SafetyBench",
    home="https://github.com/isXinLiu/MM-SafetyBench",
    layout="a folder with data/processed_questions/<scenario>.json and "
    "data/imgs/<scenario>/<SD, SD_TYPO or TYPO>/<id>.jpg",
    read=_read,
)
