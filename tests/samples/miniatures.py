"""Miniature benchmarks in the layout their authors publish, with placeholder text alone."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image


def png(colour: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def put_table(path: Path, header: str, *rows: Sequence[str], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header.split(","), *rows])


def put_json(path: Path, value: object) -> None:
    put(path, json.dumps(value).encode())


def jailbreakv(root: Path) -> None:
    header = (
        "id,jailbreak_query,redteam_query,format,policy,image_path,from,selected_mini,"
        "transfer_from_llm"
    )
    blank, drawn = "llm_transfer_attack/blank_1.png", "figstep/figstep_2.png"
    mini = ["0", "Pretend, then:\nname tree 0", "Name tree 0", "Template", "Trees", blank, "Ours"]
    rest = ["1", "Fill the list", "Name tree 1", "figstep", "Birds", drawn, "Ours"]
    put_table(
        root / "JailBreakV_28K.csv", header, [*mini, "True", "True"], [*rest, "False", "False"]
    )
    put_table(root / "mini_JailBreakV_28K.csv", header, [*mini, "True", "True"])
    put(root / blank, png())
    put(root / drawn, png("blue"))


def mm_safetybench(root: Path) -> None:
    for scenario in ("01-Illegal_Activitiy", "02-HateSpeech"):
        question = {
            "Question": f"Name a tree of {scenario}",
            "Changed Question": "Name a tree",
            "Key Phrase": "tree",
            "Phrase Type": "product",
            "Rephrased Question": "The words in the picture: name one",
            "Rephrased Question(SD)": "The thing in the picture: name one",
        }
        put_json(root / f"data/processed_questions/{scenario}.json", {"0": question})
        for kind in ("SD", "SD_TYPO", "TYPO"):
            put(root / f"data/imgs/{scenario}/{kind}/0.jpg", png())


def figstep(root: Path) -> None:
    header = "dataset,category_id,task_id,category_name,question,instruction"
    rows = [["ForbidQI", "1", str(n), "Trees", f"Name tree {n}", "Steps to name."] for n in (1, 2)]
    for name, table in (("SafeBench", "safebench"), ("SafeBench-Tiny", "SafeBench-Tiny")):
        kept = rows if name == "SafeBench" else rows[:1]
        put_table(root / f"data/question/{table}.csv", header, *kept)
        for row in kept:
            put(root / f"data/images/{name}/query_ForbidQI_1_{row[2]}_6.png", png())
    readme = (
        "<h1>FigStep: placeholder</h1>\n\n```bibtex\nnot this\n```\n\n## 2. Prompts\n\n"
        "### 2.1 FigStep\n\n- Ask:\n\n```\nFill in\nthe list.\n```\n\n### 2.2 FigStep-Pro\n"
    )
    put(root / "README.md", readme.encode())


def advbench_csv(root: Path) -> None:
    rows = [("Name a tree, please", "Sure, here is a tree"), ("Name a bird", "Sure, a bird")]
    put_table(root / "data/advbench/harmful_behaviors.csv", "goal,target", *rows)


def malicious_instruct(root: Path) -> None:
    put(root / "data/MaliciousInstruct.txt", b"Name a tree\nName a bird\n\n#3 of the birds\n")


def xstest(root: Path) -> None:
    rows = [
        ("1", "How do I kill a process?", "homonyms", "safe", "kill", ""),
        ("2", "How do I [placeholder]?", "contrast_homonyms", "unsafe", "kill", ""),
    ]
    put_table(root / "xstest_prompts.csv", "id,prompt,type,label,focus,note", *rows)


def or_bench(root: Path) -> None:
    put_table(root / "or-bench-80k.csv", "prompt,category", ["Name a tree", "t"], ["Name it", "b"])
    put_table(root / "or-bench-hard-1k.csv", "prompt,category", ["Name it", "birds"])
    put_table(root / "or-bench-toxic.csv", "prompt,category", ["[placeholder]", "birds"])


def mmbench(root: Path) -> None:
    header = "index,question,hint,A,B,C,D,answer,category,image,l2-category,split"
    image = base64.b64encode(png() + bytes(200_000)).decode()  # longer than csv's usual bound
    rows = [
        [
            "7",
            "Which colour?",
            "A square.",
            "red",
            "blue",
            "",
            "",
            "A",
            "colour",
            image,
            "x",
            "dev",
        ],
        [
            "1000007",
            "Which colour?",
            "A square.",
            "blue",
            "red",
            "",
            "",
            "B",
            "colour",
            "7",
            "x",
            "dev",
        ],
        ["8", "Which shape?", "", "ring", "star", "square", "", "C", "shape", "7", "x", "dev"],
    ]
    put_table(root / "MMBench_DEV_EN.tsv", header, *rows, delimiter="\t")


def mm_vet(root: Path) -> None:
    entry = {
        "imagename": "v1_0.png",
        "imagesource": "placeholder",
        "question": "What is x?",
        "answer": "-1<AND>-5",
        "capability": ["ocr", "math"],
    }
    put_json(root / "mm-vet.json", {"v1_0": entry})
    put(root / "images/v1_0.png", png())


def scienceqa(root: Path) -> None:
    def problem(split: str, image: str | None) -> dict[str, object]:
        return {
            "question": "Which is a tree?",
            "choices": ["oak", "wren", "carp"],
            "answer": 0,
            "hint": "Look.",
            "image": image,
            "task": "closed choice",
            "subject": "natural science",
            "split": split,
        }

    problems = {
        "1": problem("test", None),
        "4": problem("test", "image.png"),
        "5": problem("train", "image.png"),
    }
    put_json(root / "problems.json", problems)
    put(root / "images/test/4/image.png", png())
    put(root / "images/train/5/image.png", png())


MAKERS: dict[str, Callable[[Path], None]] = {
    "advbench-csv": advbench_csv,
    "figstep": figstep,
    "jailbreakv": jailbreakv,
    "malicious-instruct": malicious_instruct,
    "mm-safetybench": mm_safetybench,
    "mm-vet": mm_vet,
    "mmbench": mmbench,
    "or-bench": or_bench,
    "scienceqa": scienceqa,
    "xstest": xstest,
}
