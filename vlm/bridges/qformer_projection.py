"""The Q-Former as a bridge to a language model: queries read the image, one linear layer gives the model's width."""

from torch import Tensor, nn

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_init import bert_state, qformer_sizes, start_from_bert
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.model_spec import QFormerBridgeSpec


class QFormerProjection(QFormer):
    """Image tokens [B,N,D_image] to [B,Q,D_out], one token a query (Li et al. 2023, section 3.2).

    Parameters have the names of stage 1's bridge, without its text side; `language_projection` is new.
    num_tokens: Q. width_out: D of the language model.
    """

    def __init__(self, sizes: QFormerSizes, width_out: int) -> None:
        super().__init__(sizes)
        self.num_tokens = sizes.num_queries
        self.language_projection = nn.Linear(sizes.width, width_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Image tokens [B,N,D_image] in any float type to [B,Q,D_out]."""
        return self.language_projection(self.queries(self.image(tokens)).states)


def build_qformer_projection(spec: QFormerBridgeSpec, image_width: int, width_out: int) -> QFormerProjection:
    """The bridge that `spec` describes, its layers started from `spec.init`. Raises VlmError as `build_qformer`."""
    sizes = qformer_sizes(spec, image_width, text=False)
    bridge = QFormerProjection(sizes, width_out)
    start_from_bert(bridge, None, bert_state(spec, sizes), spec.init)
    return bridge
