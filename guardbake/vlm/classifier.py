"""A causal language model used as a classifier: which of a few words would it say next?

For model judges (HarmBench's classifier, Llama Guard), which are plain transformers checkpoints.
Nothing is generated: one forward pass a text, and the probabilities of the words that decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from guardbake.errors import MalformedError, UnsupportedError, UsageError
from guardbake.vlm.files import check_weights, digest_checkpoint

Floats = npt.NDArray[np.float64]


class Weighed(NamedTuple):
    """odds [N] float64: ln p(first words) - ln p(second words). mass [N]: p of all the words."""

    odds: Floats
    mass: Floats


class NextWord:
    """A causal language model and its tokenizer, loaded from a folder; nothing is fetched."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        """The weights keep the dtype they are stored in; no code of the checkpoint is run.

        Raises UsageError (no checkpoint), UnsupportedError (pickled weights), MalformedError (cut
        or incomplete weights).
        """
        if not (folder / "config.json").is_file():
            raise UsageError(
                found="no config.json",
                expected="a folder with a causal language model",
                where=str(folder),
                remedy="point at the folder that save_pretrained wrote, or download the checkpoint",
            )
        check_weights(folder)
        disable_progress_bar()  # type: ignore[no-untyped-call]
        loader: Any = AutoModelForCausalLM  # its stubs do not know output_loading_info
        model, report = loader.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise MalformedError(
                found="tensors missing, or of another shape",
                expected="every tensor of the model",
                where=str(folder),
                remedy="fetch or save the checkpoint again",
            )
        self.folder = folder
        self.digest = digest_checkpoint(folder)
        self._model: Any = model.eval()
        self._tokenizer: Any = _tokenizer(folder)
        known = {*self._tokenizer.all_special_tokens, *self._tokenizer.added_tokens_encoder}
        self._marks = sorted(mark for mark in known if mark)
        self._batch_size = batch_size

    def plain(self, text: str, tokens: int | None = None) -> str:
        """The text without the tokenizer's control tokens, cut to so many tokens.

        Whoever writes the text to be judged must not end the turn in which it is quoted.
        """
        while found := [mark for mark in self._marks if mark in text]:
            text = text.replace(found[0], "")  # again, for what this may have joined
        if tokens is None:
            return text
        ids = self._ids(text, False)
        return text if len(ids) <= tokens else str(self._tokenizer.decode(ids[:tokens]))

    def chat(self, request: str, answer: str) -> str:
        """A turn of each side in the tokenizer's own chat template, special tokens in words."""
        if not self._tokenizer.chat_template:
            raise UnsupportedError(
                found="a tokenizer without a chat template",
                expected="the template that the judge was trained with",
                where=str(self.folder),
                remedy="add its chat_template.jinja, or judge with a template file",
            )
        turns = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))

    def starts(self, text: str, words: Sequence[str], special: bool) -> set[int]:
        """The first token of each word where it follows the text. special: as for `weigh`."""
        before, found = self._ids(text, special), set()
        for word in words:
            after = self._ids(text + word, special)
            if after[: len(before)] == before and len(after) > len(before):
                found.add(after[len(before)])
        return found

    @torch.no_grad()
    def weigh(
        self, texts: Sequence[str], first: Sequence[int], second: Sequence[int], special: bool
    ) -> Weighed:
        """Which of two sets of tokens follows each text; a batch holds texts of like length.

        special: whether the tokenizer adds its special tokens (not if the text has them in words).
        Raises UnsupportedError naming the place of a text that is longer than the model reads.
        """
        encoded = [self._ids(text, special) for text in texts]
        limit = getattr(self._model.config, "max_position_embeddings", None)
        odds, mass = np.zeros(len(texts)), np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda i: (len(encoded[i]), i))
        if order and limit is not None and len(encoded[order[-1]]) > limit:
            raise UnsupportedError(
                found=f"a text of {len(encoded[order[-1]])} tokens, the {order[-1]}th",
                expected=f"at most {limit} tokens",
                where=str(self.folder),
                remedy="let the judge read fewer tokens of an answer",
            )
        for start in range(0, len(order), self._batch_size):
            some = order[start : start + self._batch_size]
            logs = self._last_log_probabilities([encoded[i] for i in some])
            one, two = (logs[:, list(ids)].logsumexp(-1) for ids in (first, second))
            odds[some] = (one - two).numpy()
            mass[some] = (one.exp() + two.exp()).numpy()
        return Weighed(odds, mass)

    def _last_log_probabilities(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """[B, V] float64 after the last token of each row; rows are padded on the left."""
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, longest - len(row) :] = torch.tensor(row)
            mask[place, longest - len(row) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits.double().log_softmax(-1)

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])


def _tokenizer(folder: Path) -> Any:
    tokenizers: Any = AutoTokenizer  # untyped
    return tokenizers.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
