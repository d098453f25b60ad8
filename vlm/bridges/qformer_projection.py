"""The Q-Former as a bridge to a language model: queries read the image, one linear layer gives the model's width."""

from collections.abc import Sequence

from torch import Tensor, nn

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_init import qformer_sizes, start_qformer
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.data.text_batch import TextBatch
from vlm.model_spec import QFormerProjectionSpec


class QFormerProjection(QFormer):
    """Image tokens [B,N,D_image] to [B,Q,D_out], one token a query (Li et al. 2023, section 3.2).

    Parameters have the names of stage 1's bridge, without its text side unless the queries read instructions;
    `language_projection` is new. num_tokens: Q. width_out: D of the language model.
    """

    def __init__(self, sizes: QFormerSizes, width_out: int) -> None:
        super().__init__(sizes)
        self.num_tokens = sizes.num_queries
        self.language_projection = nn.Linear(sizes.width, width_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Image tokens [B,N,D_image] in any float type to [B,Q,D_out]."""
        return self.language_projection(self.queries(self.image(tokens)).states)

    def read(self, tokens: Tensor, slots: Sequence[int], instructions: TextBatch) -> Tensor:
        """Image tokens [U,N,D_image] to [S,Q,D_out]: instruction i is about the image of number `slots[i]`.

        Dai et al. 2023 (InstructBLIP), section 2.3. Each image's keys and values are computed once.
        """
        return self.language_projection(self.pairs(self.image(tokens), slots, instructions))


def build_qformer_projection(spec: QFormerProjectionSpec, image_width: int, width_out: int) -> QFormerProjection:
    """The bridge that `spec` describes, its layers started from `spec.init`. Raises VlmError as `build_qformer`."""
    bridge = QFormerProjection(qformer_sizes(spec, image_width, text=spec.instruction), width_out)
    start_qformer(spec, bridge, None)
    return bridge
