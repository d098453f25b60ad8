"""What a training step of the Q-Former's first stage costs, known from its sizes."""

from vlm.bridges.qformer_layers import QFormerSizes


def stage1_operations(
    sizes: QFormerSizes, image_tokens: int, images: int, texts: int, tokens: int, encoder_learns: bool = False
) -> float:
    """Floating-point operations of the matrix products of contrast, matching and captions, forward and backward.

    image_tokens: of each image. texts, tokens: of the batch; texts count as if all had the mean length, three pairs
    each. encoder_learns: whether the image's tokens need gradients. The image encoder counts as nothing.
    """
    width, layers, queries = sizes.width, sizes.layers, sizes.num_queries
    looking = sum(map(sizes.looks_at_image, range(layers)))
    square, ffn, length = width**2, 2 * width * sizes.ffn, tokens / max(texts, 1)
    said, pairs = tokens - texts, 3 * texts
    # Multiplications of one row, in one layer and in all: what it projects, and what it sees of `seen` others.
    block = 4 * square + ffn
    look = looking * (2 * square + 2 * width * image_tokens)

    def attend(seen: float) -> float:
        return 2 * width * seen

    alone = images * queries * (layers * (block + attend(queries)) + look)
    matched = pairs * queries * (layers * (block + attend(queries + length)) + look)
    # Behind the last layer only [CLS] is read in contrast, and no text in matching.
    contrasted = tokens * ((layers - 1) * (block + attend(length)) + 2 * square)
    contrasted += texts * (2 * square + ffn + attend(length))
    matched += 3 * tokens * ((layers - 1) * (block + attend(queries + length)) + 2 * square)
    captioned = said * (layers * (block + attend(queries + length - 1)) + square + width * sizes.vocabulary)
    learned = alone + matched + contrasted + captioned
    # Keys and values of image tokens: no gradient of the tokens where the encoder is frozen.
    seen = images * image_tokens * looking * 2 * width * sizes.image_width
    return 6.0 * learned + (6.0 if encoder_learns else 4.0) * seen
