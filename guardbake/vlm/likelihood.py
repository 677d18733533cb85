"""How likely a VLM, guarded or not, is to begin its answer with given tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from guardbake.samples import Sample
from guardbake.spec import GuardSpec
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session


@torch.no_grad()
def log_likelihoods(
    vlm: Vlm,
    samples: Sequence[Sample],
    asking: Asking,
    spec: GuardSpec | None,
    openings: Sequence[Sequence[int]],
    batch_size: int,
) -> npt.NDArray[np.float64]:
    """[N, openings] float64: ln p(opening | prompt), over all tokens of the opening.

    openings: token ids, at least one each; `guardbake.diagnose.openings` makes them of turns. The
    prompt is fed once a batch up to its last token; every opening goes on from there with a
    guard of its own, so that none is judged by what another one said.
    """
    ids = [torch.tensor(opening) for opening in openings]
    parts = []
    for some, batch in batches(vlm, samples, asking, batch_size):
        session = Session(vlm, prepare(vlm, batch), spec)
        columns = batch.input_ids.shape[1]
        rows = [_log_likelihood(session, opening, columns, spec, len(some)) for opening in ids]
        parts.append(np.stack(rows, axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, len(openings)))


def _log_likelihood(
    session: Session, opening: torch.Tensor, columns: int, spec: GuardSpec | None, rows: int
) -> npt.NDArray[np.float64]:
    # before its last token a prompt is edited by guards other than `sequence`: those start anew
    reusable = spec is None or spec.profile == "sequence"
    session.rewind(min(session.fed, session.resumes) if reusable else 0, spec)
    with session.guarded():
        hidden = session.feed(columns)[:, -1:]
        if len(opening) > 1:
            later = session.step(opening[:-1].expand(rows, -1))
            hidden = torch.cat([hidden, later], 1)
        logs = session.logits(hidden).double().log_softmax(-1)
    said = logs.gather(-1, opening.expand(rows, -1)[..., None])
    return np.asarray(said.sum((1, 2)).numpy())
