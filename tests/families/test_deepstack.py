"""Features that join the residual between layers, and what the residual stream makes of them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from guardbake.batch import Batch
from guardbake.errors import SiteError
from guardbake.passes.locate import locate
from guardbake.site import Site

from guardbake_onnx.decoding import Decoding
from tests.onnx.conftest import Exported, largest_difference
from tests.onnx.undefended import LOGITS

pytestmark = pytest.mark.parametrize("member", ["qwen3_vl"], indirect=True)


def test_what_no_token_is_computed_into_may_join_the_stream_and_nothing_else(
    member: Exported,
) -> None:
    """A planted fault: a second path of the tokens in the place of the image features."""
    graph = ir.load(member.folder / "decoder.onnx").graph
    last = Site(member.runner.description.layers - 1, "ffn_output")
    assert locate(graph, [last])[last].confirmed
    fed = {value.name: value for value in graph.inputs}
    first = next(use.node for use in fed["deepstack_embeds"].uses()).outputs[0]
    ir.convenience.replace_all_uses_with(first, fed["inputs_embeds"])
    with pytest.raises(SiteError):
        locate(graph, [last])


def test_features_of_the_first_layers_reach_the_answer(
    member: Exported, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the decoder is not shown them."""
    right = member.runner.run(mixed, 1).step_logits
    monkeypatch.setattr(Decoding, "show", lambda _decoding, _levels: None)
    blind = member.runner.run(mixed, 1).step_logits
    assert largest_difference(blind[[0, 2]], right[[0, 2]]) > 100 * LOGITS
    assert largest_difference(blind[1], right[1]) <= LOGITS
