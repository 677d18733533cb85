"""SPO-VLM (arXiv 2509.00373): steering vectors refined by a preference between whole answers.

What is public says: stage I computes a steering vector a layer from diverse data; stage II refines
them, the model frozen, by sequence-level preference optimisation with rewards for little toxicity
and for answers that fit the picture. No code and no constants are published. Chosen here:

- Stage I is the mean difference of harmful and harmless prompts at each layer (`fit.push`).
- Stage II is the DPO loss (Rafailov et al. 2023, arXiv 2305.18290) on the vectors alone, as in BiPO
  (Cao et al. 2024, arXiv 2406.00045): with p_v the model with vectors and p_0 without them, and
  whole turns as what is preferred, ::

      gain(turn) = ln p_v(turn) - ln p_0(turn)
      loss = -ln sigmoid(BETA * (gain(wanted) - gain(unwanted)))

- In place of the two rewards: after a harmful request a refusing turn is preferred to a compliant
  one, after a harmless request the model's own answer to a refusing turn. No judge of toxicity and
  no captions are needed, and staying with its own answer keeps what the model saw in the picture.
- Vectors are refined where they will act. Behind a gate that is on harmful requests alone: made to
  spare harmless ones as well, which never meet them there, they turned from refusing to complying
  (on the demo's validation split, at every strength).
- Adam, its steps measured in the start's length, so that no rate hangs on the model's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from guardbake.activations import Rows
from guardbake.errors import MalformedError, UnsupportedError
from guardbake.samples import Label
from guardbake.site import Site
from guardbake.vlm.forced import Exchange, drawn, forced
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.reference import on_site
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session

Progress = Callable[[int, int], None]
Vectors = Mapping[Site, Tensor]

BETA = 0.1


@dataclass(frozen=True)
class Descent:
    """steps of Adam, each on `batch` exchanges of each label there is. rate: how far a vector goes
    in a step at most, in its own length at the start. seed: of the order of the exchanges."""

    steps: int
    batch: int
    rate: float
    seed: int


def refine(
    vlm: Vlm,
    exchanges: Sequence[Exchange],
    start: Mapping[Site, Rows],
    whole_prompt: bool,
    asking: Asking,
    descent: Descent,
    progress: Progress,
) -> dict[Site, Rows]:
    """Vectors [d] to add at each site of `start`, refined.

    whole_prompt: they act on every token of the prompt (profile always), or else on its last token
    and on the answer, as behind an open gate. exchanges: of both labels then, of harmful requests
    alone behind a gate. Raises MalformedError for others, and if a vector of the start is zero;
    UnsupportedError for the last token alone where tokens before it see what is added there.
    """
    if not whole_prompt:
        _demand_unseen(vlm)
    origin = {site: torch.tensor(vector, dtype=torch.float32) for site, vector in start.items()}
    lengths = {site: float(vector.norm()) for site, vector in origin.items()}
    _demand(exchanges, lengths, ["harmful", "harmless"] if whole_prompt else ["harmful"])
    moved = {site: torch.zeros_like(v, requires_grad=True) for site, v in origin.items()}

    def vectors() -> dict[Site, Tensor]:
        return {site: origin[site] + lengths[site] * u for site, u in moved.items()}

    width = max(len(vector) for vector in origin.values())
    optimiser = torch.optim.Adam(list(moved.values()), lr=descent.rate / width**0.5)
    some = drawn(exchanges, descent.batch, descent.seed)
    for step in range(descent.steps):
        margin = _margin(vlm, next(some), vectors, whole_prompt, asking)
        loss = -logsigmoid(BETA * margin).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        progress(step + 1, descent.steps)
    return {site: np.asarray(vector.detach().numpy()) for site, vector in vectors().items()}


def _margin(
    vlm: Vlm,
    exchanges: Sequence[Exchange],
    vectors: Callable[[], Vectors],
    whole_prompt: bool,
    asking: Asking,
) -> Tensor:
    """[B]: by how much the vectors prefer the wanted turns more than the model does without."""
    samples = [exchange.sample for exchange in exchanges]
    turns = forced([e.wanted for e in exchanges] + [e.unwanted for e in exchanges])
    ((_, batch),) = batches(vlm, samples * 2, asking, 2 * len(samples))
    with torch.no_grad():
        session = Session(vlm, prepare(vlm, batch), None)
        before = turns.surprise(session).sum(1)
        session.rewind(0 if whole_prompt else session.resumes, None)
    with _adding(vlm, vectors()):
        now = turns.surprise(session).sum(1)
    gained = before - now
    return gained[: len(samples)] - gained[len(samples) :]


@contextmanager
def _adding(vlm: Vlm, vectors: Vectors) -> Iterator[None]:
    layers = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(layers, nn.ModuleList)
    with ExitStack() as stack:
        for site, vector in vectors.items():
            add = partial(_add, vector)
            stack.enter_context(on_site(layers, vlm.family.feed_forward, site, add))
        yield


def _add(vector: Tensor, y: Tensor) -> Tensor:
    return (y + vector).to(y.dtype)


def _demand_unseen(vlm: Vlm) -> None:
    """That no other token of a prompt sees its last one."""
    if vlm.family.mask == "prefix":
        raise UnsupportedError(
            found="vectors on the last token of a prompt whose tokens see each other",
            expected="a causal mask, or vectors on the whole prompt",
            where=f"the family {vlm.family.name}",
            remedy="refine for a guard of profile always, or leave the candidate out",
        )


def _demand(
    exchanges: Sequence[Exchange], lengths: Mapping[Site, float], wanted: Sequence[Label]
) -> None:
    labels = sorted({exchange.sample.label for exchange in exchanges})
    zero = [str(site) for site, length in lengths.items() if not length > 0]
    if labels != wanted or zero or not lengths:
        raise MalformedError(
            found=f"exchanges of {labels}, {len(lengths)} vectors, zero at {zero}",
            expected=f"exchanges of {wanted} and vectors that are not zero",
            where="preference optimisation",
            remedy="give the fit split prompts of these labels, and the candidate other layers",
        )
