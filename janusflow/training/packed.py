"""The model on packed rows: every kind of place gets its embedding, every head its states back.

Axes: B rows, S tokens of a row, U pictures to look at, G pictures to draw (points of their paths
for the flow head), N image tokens, E language width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from janusflow.data.packing import FLOW, VQ, VQ_TAG, attention_mask
from janusflow.models.flow_head import FlowTokens
from janusflow.models.modeling import JanusFlowForConditionalGeneration


@dataclass(frozen=True)
class PackedStates:
    """States of the language model by what they are for.

    Attributes:
        last: The last layer's, (B, S, E).
        flow: Of time and image tokens of the flow head, (G, 1 + N, E).
        vq: Those that predict the tokens of the VQ head, (G, N, E).
        inner: Of the flow head's image tokens after an inner layer, (G, N, E).
    """

    last: Tensor
    flow: Tensor
    vq: Tensor
    inner: Tensor | None


def packed_states(
    model: JanusFlowForConditionalGeneration,
    rows: Mapping[str, Tensor],
    *,
    flow: FlowTokens | None = None,
    image_tokens: Tensor | None = None,
    idle: Tensor | None = None,
    inner_layer: int | None = None,
) -> PackedStates:
    """Runs the language model over rows of `janusflow.data.packing.Packer`.

    Args:
        model: The model.
        rows: Of `Packer.rows`.
        flow: Of `flow_head.tokens`, in the order of their places, G.
        image_tokens: Of the VQ head, in the order of their places, (G, N).
        idle: A 0 that is added to the embeddings for the sake of what made it.
        inner_layer: After how many layers states are wanted, too.
    """
    kinds = rows["kinds"]
    embeddings = model.embed(rows["ids"], rows.get("pixel_values"))
    if flow is not None:
        embeddings = _placed(embeddings, kinds == FLOW, flow.embeddings)
    if image_tokens is not None:
        embeddings = _placed(embeddings, kinds == VQ, model.vq_head.embed(image_tokens[:, :-1]))
    if idle is not None:
        embeddings = embeddings + idle
    output = model.language_model.model(
        inputs_embeds=embeddings,
        attention_mask=attention_mask(
            rows["samples"], rows["blocks"], kinds, rows["hidden"], embeddings.dtype
        ),
        position_ids=rows["positions"],
        use_cache=False,
        output_hidden_states=inner_layer is not None,
    )
    last = output.last_hidden_state
    length = 0 if flow is None else flow.embeddings.shape[1]
    inner = None
    if inner_layer is not None and flow is not None:
        inner = _taken(output.hidden_states[inner_layer], kinds == FLOW, length)[:, 1:]
    return PackedStates(
        last=last,
        flow=_taken(last, kinds == FLOW, length),
        vq=_taken(last, (kinds == VQ_TAG) | (kinds == VQ), _length_of(image_tokens)),
        inner=inner,
    )


def _length_of(image_tokens: Tensor | None) -> int:
    return 0 if image_tokens is None else image_tokens.shape[1]


def _placed(embeddings: Tensor, places: Tensor, given: Tensor) -> Tensor:
    return embeddings.masked_scatter(places[..., None], given.to(embeddings.dtype))


def _taken(states: Tensor, places: Tensor, length: int) -> Tensor:
    """States (B, S, E) at places, by picture: (G, length, E)."""
    return states[places].unflatten(0, (-1, length)) if length else states[:0, :0]
