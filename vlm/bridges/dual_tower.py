"""The dual tower: what two encoders say, pooled and projected into one space, and how similarity is scaled."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.bridges.canonical import Affine
from vlm.errors import VlmError
from vlm.model_spec import DualTowerSpec, Pool, TowerProjection

MAX_LOG_SCALE = math.log(100)
DEFAULT_WIDTH = 512


class AttentionPool(nn.Module):
    """One learned query that attends over the tokens (Zhai et al. 2022, section 3.3, without its MLP)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens [B,N,D] and mask [B,N] (1: a token, 0: padding) to [B,D]."""
        tokens = self.norm(tokens.to(self.norm.weight.dtype))
        hidden = None if mask is None else ~mask.bool()
        query = self.query.expand(len(tokens), -1, -1)
        return self.attention(query, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0][:, 0]


class TowerHead(nn.Module):
    """One side: an encoder's features to the joint space.

    Pooling without parameters is `pool`, which can be cached with the frozen encoder; the rest is `forward`.
    side: `image` or `text`, for messages. width: D of the tokens. pooled_width: P of the encoder's own embedding, or
    None. has_cls: whether the first token stands for the whole.
    """

    def __init__(
        self,
        side: str,
        pool: Pool,
        projection: TowerProjection,
        width: int,
        pooled_width: int | None,
        has_cls: bool,
        joint_width: int | None,
    ) -> None:
        super().__init__()
        if pool == "pooled" and pooled_width is None:
            raise VlmError(
                f"bridge.{side}_pool: pooled: this encoder has no embedding of its own; set it to mean or attention"
            )
        if pool == "cls" and not has_cls:
            keep = "set image_encoder.drop_cls: false if the encoder has one, else " if side == "image" else "set "
            raise VlmError(f"bridge.{side}_pool: cls: there is no such token; {keep}{side}_pool: mean")
        incoming = pooled_width if pool == "pooled" and pooled_width is not None else width
        self.kind = pool
        self.width_in = incoming
        self.attention = AttentionPool(incoming) if pool == "attention" else None
        self.width = incoming if projection == "none" else joint_width or DEFAULT_WIDTH
        if projection == "none" and joint_width not in (None, incoming):
            raise VlmError(
                f"bridge.{side}_projection: none: the {side} embedding has width {incoming}, the joint space "
                f"{joint_width}; set it to linear"
            )
        self.projection = _projection(projection, incoming, self.width)

    def pool(self, tokens: Tensor, pooled: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """What `forward` takes, of the encoder's tokens [B,N,D] and embedding [B,P]: [B,D], with attention [B,N,D]."""
        if self.kind == "pooled":
            assert pooled is not None
            return pooled
        if self.kind == "cls":
            return tokens[:, 0]
        if self.kind == "attention":
            return tokens
        if mask is None:
            return tokens.mean(1)
        weights = mask[..., None].to(tokens.dtype)  # [B, N, 1]
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit-length embeddings [B,E] in fp32 of what `pool` gave; mask [B,N] for pooling by attention."""
        if self.attention is not None:
            features = self.attention(features, mask)
        first = next(self.projection.parameters(), None)
        if first is not None:
            features = features.to(first.dtype)
        return F.normalize(self.projection(features).float(), dim=-1)


def _projection(kind: TowerProjection, width_in: int, width_out: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    widths = [width_in, width_out] if kind == "linear" else [width_in, width_out, width_out]
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:]):
        layer = nn.Linear(before, after)
        nn.init.normal_(layer.weight, std=before**-0.5)
        nn.init.zeros_(layer.bias)
        layers += [nn.GELU(), layer] if layers else [layer]
    return nn.Sequential(*layers)


class DualTower(nn.Module):
    """Both heads and the logit scale (Radford et al. 2021; bias: Zhai et al. 2023).

    image_width, text_width: (D of tokens, P of the encoder's own embedding or None).
    image_cls, text_cls: whether the first token stands for the whole.
    logit_scale: the logarithm of the factor on the cosine. width: E of the joint space.
    """

    def __init__(
        self,
        spec: DualTowerSpec,
        image_width: tuple[int, int | None],
        text_width: tuple[int, int | None],
        image_cls: bool,
        text_cls: bool = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        joint = spec.width
        for pool, projection, (tokens, pooled) in (
            (spec.image_pool, spec.image_projection, image_width),
            (spec.text_pool, spec.text_projection, text_width),
        ):
            if projection == "none":
                joint = joint or (pooled if pool == "pooled" else tokens)
        self.image = TowerHead("image", spec.image_pool, spec.image_projection, *image_width, image_cls, joint)
        self.text = TowerHead("text", spec.text_pool, spec.text_projection, *text_width, text_cls, joint)
        self.width = self.image.width
        sigmoid = spec.logits == "sigmoid"
        scale = 10.0 if sigmoid else 1 / 0.07  # `published` is filled in by `start_logits`
        scale = spec.logit_scale if isinstance(spec.logit_scale, float) else scale
        bias = -10.0 if spec.logit_bias is None else spec.logit_bias
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(bias)) if sigmoid else None

    @property
    def heads(self) -> tuple[TowerHead, TowerHead]:
        """The image side and the text side."""
        return self.image, self.text

    @property
    def scale(self) -> Tensor:
        """The factor on the cosine, a scalar in fp32."""
        return self.logit_scale.float().exp()

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Scaled similarities [M,N] of unit-length image [M,E] and text [N,E]."""
        scores = self.scale * image.float() @ text.float().T
        return scores if self.logit_bias is None else scores + self.logit_bias.float()

    def probabilities(self, image: Tensor, text: Tensor) -> Tensor:
        """Probabilities [M,N]: over the texts of an image (softmax), or of each pair by itself (sigmoid)."""
        scores = self.logits(image, text)
        return scores.softmax(-1) if self.logit_bias is None else scores.sigmoid()

    @torch.no_grad()
    def start_logits(self, log_scale: float, bias: float | None) -> None:
        """Start from a checkpoint's logarithm of the scale, and its bias.

        Raises VlmError if one of us has a bias and the other has not.
        """
        if (bias is None) != (self.logit_bias is None):
            fitting = "softmax" if bias is None else "sigmoid"
            raise VlmError(f"bridge.logits: {self.spec.logits}: the published model has {fitting} logits")
        self.logit_scale.fill_(log_scale)
        if self.logit_bias is not None and bias is not None:
            self.logit_bias.fill_(bias)

    @torch.no_grad()
    def start_projections(self, image: Affine, text: Affine) -> None:
        """Start both linear projections from these maps."""
        for head, start in zip(self.heads, (image, text)):
            layer = head.projection.get_submodule("0")
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(start.weight)
            layer.bias.copy_(start.bias)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale within 1 to 100; to be called after each optimiser step (Radford et al. 2021, section 2.5)."""
        self.logit_scale.clamp_(0, MAX_LOG_SCALE)
