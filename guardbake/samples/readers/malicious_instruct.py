"""MaliciousInstruct: 100 harmful instructions of ten kinds (Huang et al., arXiv 2310.06987).

Layout: github.com/Princeton-SysML/Jailbreak_LLM, data/MaliciousInstruct.txt, one instruction a
line, ten lines a kind. The kinds are not named in the file.
"""

from __future__ import annotations

from pathlib import Path

from guardbake.samples import Prompt
from guardbake.samples.readers.benchmark import Benchmark, Entry, missing
from guardbake.samples.readers.files import first_of, malformed, text_of

FILE = "MaliciousInstruct.txt"


def _read(path: Path) -> list[Entry]:
    file = path if path.is_file() else first_of(path, (FILE, f"data/{FILE}"))
    if file is None:
        raise missing(path, FILE)
    lines = [line.strip() for line in text_of(file).splitlines()]
    texts = [line for line in lines if line]
    if not texts:
        raise malformed(file, "no prompt at all", "one instruction a line")
    return [Entry(Prompt(t, "harmful", "", index), {}) for index, t in enumerate(texts)]


MALICIOUS_INSTRUCT = Benchmark(
    name="MaliciousInstruct",
    home="https://github.com/Princeton-SysML/Jailbreak_LLM",
    layout=f"{FILE}, or a folder with it",
    read=_read,
)
