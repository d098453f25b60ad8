"""An embedding made of several layers: the means over their tokens, side by side.

Early layers tell colours, strokes and the words themselves, late ones what they mean; a linear layer behind can use
both.
"""

from collections.abc import Sequence

import torch

from vlm.backbones.image_encoder import Tower
from vlm.backbones.image_timm import TimmTower, count_layers
from vlm.backbones.layers import check_layer
from vlm.backbones.text import HfTextTower, TextTower, pool_mean
from vlm.errors import VlmError


class JoinedTimmTower(Tower):
    """A timm model whose embedding is the means of several layers (of a convolutional network: stages).

    layers: from the end, ascending; -1 is what `forward_features` gives.
    """

    def __init__(self, tower: TimmTower, layers: Sequence[int], name: str) -> None:
        super().__init__()
        count = count_layers(tower.model)
        if count is None or not hasattr(tower.model, "forward_intermediates"):
            raise VlmError(f"{name}: pool_layers: timm cannot read several layers of this model")
        for layer in layers:
            check_layer(name, layer, count)
        self.model = tower.model
        self.channels_last = tower.channels_last
        self.num_prefix_tokens, self.patch_grid = tower.num_prefix_tokens, tower.patch_grid
        self.with_last = layers[-1] == -1
        self.indices = [count + layer for layer in layers if layer != -1]

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features, found = self.model.forward_intermediates(pixels, indices=self.indices, output_fmt="NCHW")
        means = [layer.mean((2, 3)) for layer in found]  # [B, D] each
        if features.ndim == 4 and self.channels_last:
            features = features.permute(0, 3, 1, 2)
        if self.with_last:
            last = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, self.num_prefix_tokens :]
            means.append(last.mean(1))
        return features, torch.cat(means, dim=1)


class JoinedHfTextTower(TextTower):
    """A bidirectional transformers encoder whose embedding is the means of several layers.

    layers: from the end, ascending; before the first block lie the token embeddings.
    """

    def __init__(self, model: torch.nn.Module, layers: Sequence[int], name: str) -> None:
        super().__init__()
        for layer in layers:
            check_layer(name, layer, model.config.num_hidden_layers + 1)
        self.model = model
        self.layers: tuple[int, ...] = tuple(layers)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        seen = torch.ones_like(ids) if mask is None else mask  # None: of one length, for plans
        means = [pool_mean(output.hidden_states[layer], ids, seen) for layer in self.layers]
        return output.last_hidden_state, torch.cat(means, dim=1)


def join_image_layers(tower: Tower, layers: Sequence[int] | None, name: str) -> Tower:
    """The tower with an embedding of these layers, or as it is for None. Raises VlmError unless it is timm's."""
    if layers is None:
        return tower
    if not isinstance(tower, TimmTower):
        raise VlmError(f"{name}: pool_layers: only timm's image encoders can be read at several layers")
    return JoinedTimmTower(tower, sorted(layers), name)


def join_text_layers(tower: TextTower, layers: Sequence[int] | None, name: str) -> TextTower:
    """The tower with an embedding of these layers, or as it is for None. Raises VlmError unless it is a BERT."""
    if layers is None:
        return tower
    if not isinstance(tower, HfTextTower):
        raise VlmError(f"{name}: pool_layers: only BERT and its kin can be read at several layers")
    return JoinedHfTextTower(tower.model, sorted(layers), name)
