"""Error bars: bootstrap intervals that resample pictures, since the questions of one picture stand or fall together."""

from collections.abc import Hashable, Sequence

import numpy as np

# Pictures' draw counts held at once: 4M int64 are 32 MB.
_BLOCK = 1 << 22


def bootstrap_interval(
    values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values`, resampling whole clusters with replacement.

    values, clusters: [N] scores, and what they belong to (a question's picture). The result has the unit of `values`.
    Cluster bootstrap: Davison and Hinkley (1997), section 3.8; Miller (2024) on why evaluations need it.

    Raises ValueError on no values, or on lists of different length.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values for {len(clusters)} clusters: give as many of both, at least one")
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])  # [N]
    sums = np.bincount(member, weights=np.asarray(values, dtype=float))  # [C]
    sizes = np.bincount(member)  # [C]
    n = len(numbers)
    rng = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    rows = max(1, _BLOCK // n)
    for start in range(0, resamples, rows):
        # How often each cluster is drawn: the same as drawing n cluster numbers, without holding them.
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start))  # [R, C]
        means.append((drawn @ sums) / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
