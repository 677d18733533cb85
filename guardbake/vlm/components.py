"""Rows of every component of every layer at the prompt's last token, for diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from guardbake.activations import Parts, Rows
from guardbake.component import NAMES, Component
from guardbake.samples import Sample
from guardbake.vlm.load import Vlm
from guardbake.vlm.prompt import prepare
from guardbake.vlm.reference import on_output
from guardbake.vlm.requests import Asking, batches
from guardbake.vlm.runner import Session

Progress = Callable[[int, int], None]


def component_module(vlm: Vlm, component: Component) -> nn.Module:
    """The module whose output the component is."""
    path = vlm.family.layer_path(component.layer)
    inside = {"attention_output": vlm.family.attention, "ffn_output": vlm.family.feed_forward}
    name = inside.get(component.name)
    return vlm.model.get_submodule(path if name is None else f"{path}.{name}")


@torch.no_grad()
def capture_components(
    vlm: Vlm,
    samples: Sequence[Sample],
    asking: Asking,
    batch_size: int,
    progress: Progress,
) -> dict[Component, Rows]:
    """rows[component] [N, d] float32, one a sample: at the last prompt token, nothing generated."""
    layers = vlm.model.get_submodule(vlm.family.layers)
    assert isinstance(layers, nn.ModuleList)
    components = [Component(layer, name) for layer in range(len(layers)) for name in NAMES]
    parts = Parts[Component]()
    done = 0
    for some, batch in batches(vlm, samples, asking, batch_size):
        session = Session(vlm, prepare(vlm, batch), None)
        with ExitStack() as stack:
            for component in components:

                def keep(tensor: Tensor, component: Component = component) -> None:
                    parts.add(component, tensor[:, -1].float().numpy())

                stack.enter_context(on_output(component_module(vlm, component), keep))
            session.feed(batch.input_ids.shape[1])
        done += len(some)
        progress(done, len(samples))
    return parts.joined()
