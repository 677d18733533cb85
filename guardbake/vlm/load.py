"""Load a VLM from an ordinary transformers checkpoint folder; nothing is fetched unless asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from guardbake.errors import EnvironmentFault, MalformedError, UnsupportedError
from guardbake.plugins import Number
from guardbake.vlm.catalog import Family, family_of
from guardbake.vlm.files import (
    CONFIG,
    check_weights,
    checkpoint_folder,
    digest_checkpoint,
    family_at,
    malformed,
)

_UNREADABLE = (AttributeError, LookupError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class Vlm:
    """A loaded VLM.

    model: in eval mode, attention "sdpa", parameters in the dtype asked for, on the CPU, without
      gradients of their own: whoever differentiates here does so by activations or pixels.
    processor: the checkpoint's own processor; untyped because transformers builds it at run time.
    model_digest: sha256 of the checkpoint's weight, configuration and tokenizer files.
    """

    model: PreTrainedModel
    processor: Any
    family: Family
    folder: Path
    model_digest: str

    @property
    def image_token_id(self) -> int:
        """The token that stands for one image feature in input_ids."""
        return int(getattr(self.model.config, self.family.image_token))


def load_vlm(
    path_or_id: str, dtype: torch.dtype = torch.float32, *, allow_network: bool = False
) -> Vlm:
    """Load the model and its processor.

    path_or_id: a checkpoint folder, or a hub id that is cached here (or fetched, if allow_network).
    Raises UsageError (no such folder), UnsupportedError (family, or weights that are not
    safetensors), MalformedError (a truncated or incomplete checkpoint), EnvironmentFault (its
    processor wants a package that is not there).
    """
    folder = checkpoint_folder(path_or_id, allow_network)
    config = read_config(folder)
    family = family_of(config)
    check_weights(folder)
    processor = _load_processor(folder)  # which may not be possible here, before the weights
    loader: Any = AutoModelForImageTextToText  # its stubs do not know output_loading_info
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a bake shows its own
    model, report = loader.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills what it does not find with random numbers and only warns
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise MalformedError(
            found=f"{len(absent)} tensors missing or of another shape, first {absent[0]}",
            expected="every tensor of the model",
            where=str(folder),
            remedy="fetch or save the checkpoint again",
        )
    model.eval().requires_grad_(False)
    return Vlm(model, processor, family, folder, digest_checkpoint(folder))


def _load_processor(folder: Path) -> Any:
    """Where a package is missing, transformers says so by one of two errors; other errors come of
    its files."""
    try:
        return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True
        )
    except (ImportError, *_UNREADABLE) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        if not isinstance(error, ImportError) and "to be installed" not in said:
            raise malformed(said, "a processor of transformers", folder) from error
        raise EnvironmentFault(
            found=said,
            expected="the packages that the checkpoint's processor is made of",
            where=str(folder),
            remedy="install them; a Qwen's part for videos wants torchvision, in the release that "
            "belongs to the installed torch",
        ) from error


def load_rounded(vlm: Vlm, number: Number) -> Vlm:
    """The same checkpoint once more, its weights and its arithmetic in `number`."""
    return load_vlm(str(vlm.folder), getattr(torch, number))


def read_config(folder: Path) -> Any:
    """transformers' own configuration; raises what `family_at` does, and MalformedError."""
    family_at(folder)
    path = folder / CONFIG
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except StrictDataclassError as error:
        raise malformed(str(error).strip()[-300:], "a consistent configuration", path) from error
    _require_text_model(config, path)
    return config


def _require_text_model(config: Any, path: Path) -> None:
    family = family_of(config)
    if family.text and config.text_config.model_type != family.text:
        raise UnsupportedError(
            found=f"a {family.name} whose text model is a {config.text_config.model_type}",
            expected=f"a {family.text}",
            where=str(path),
            remedy=f"use a checkpoint of this family with a {family.text}",
        )
