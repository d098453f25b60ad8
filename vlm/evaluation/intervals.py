"""Error bars: bootstrap intervals that resample pictures, since the questions of one picture stand or fall together."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

# Pictures' draw counts held at once: 4M int64 are 32 MB.
_BLOCK = 1 << 22


@dataclass(frozen=True, eq=False)
class Parts:
    """A metric that is no mean over samples but a function of sums over them, as BLEU or F1.

    rows: [N,K] what each sample adds to each sum. metric: sums [R,K] -> values [R].
    """

    rows: np.ndarray
    metric: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Medians:
    """The mean over groups of the median of their samples, as of ranks.

    values: [N], NaN for samples that have no part. groups: [N] numbers of the groups (folds).
    """

    values: np.ndarray
    groups: np.ndarray

    def of(self, times: np.ndarray) -> np.ndarray:
        """The metric [R] where sample i occurs times[r, i] times."""
        found = []
        for group in np.unique(self.groups[~np.isnan(self.values)]):
            chosen = np.flatnonzero((self.groups == group) & ~np.isnan(self.values))
            chosen = chosen[np.argsort(self.values[chosen], kind="stable")]
            up_to = times[:, chosen].cumsum(axis=1)  # [R, n]
            total = up_to[:, -1:]
            last = len(chosen) - 1
            lower, upper = ((up_to <= at).sum(axis=1).clip(max=last) for at in ((total - 1) // 2, total // 2))
            found.append((self.values[chosen[lower]] + self.values[chosen[upper]]) / 2)
        return np.mean(found, axis=0)


def bootstrap_interval(
    values: Sequence[float] | Parts | Medians, clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values`, resampling whole clusters with replacement.

    values, clusters: [N] scores (or `Parts`, or `Medians`), and what they belong to (a question's picture). The result
    has the unit of `values`.
    Cluster bootstrap: Davison and Hinkley (1997), section 3.8; Miller (2024) on why evaluations need it.

    Raises ValueError on no values, or on lists of different length.
    """
    drawn = bootstrap(values, clusters, seed, resamples)
    # Between ranks that nothing has (inf) there is no middle.
    low, high = np.quantile(drawn, [0.025, 0.975], method="linear" if np.isfinite(drawn).all() else "nearest")
    return float(low), float(high)


def bootstrap(
    values: Sequence[float] | Parts | Medians, clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000
) -> np.ndarray:
    """The metric [R] of each resample; the same clusters and seed draw the same, so that two runs can be compared."""
    parts = values if isinstance(values, (Parts, Medians)) else mean_parts(values)
    count = len(parts.rows if isinstance(parts, Parts) else parts.values)
    if count != len(clusters) or not len(clusters):
        raise ValueError(f"{count} values for {len(clusters)} clusters: give as many of both, at least one")
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])  # [N]
    n = len(numbers)
    sums = np.zeros((n, parts.rows.shape[1] if isinstance(parts, Parts) else 0))  # [C, K]
    if isinstance(parts, Parts):
        np.add.at(sums, member, parts.rows)
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    rows = max(1, _BLOCK // (n if isinstance(parts, Parts) else count))
    for start in range(0, resamples, rows):
        # How often each cluster is drawn: the same as drawing n cluster numbers, without holding them.
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start))  # [R, C]
        found.append(parts.metric(drawn @ sums) if isinstance(parts, Parts) else parts.of(drawn[:, member]))
    return np.concatenate(found)


def mean_parts(values: Sequence[float]) -> Parts:
    """A mean as a function of sums."""
    column = np.asarray(values, dtype=float)
    return Parts(np.stack([column, np.ones_like(column)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])
