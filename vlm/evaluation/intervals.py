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
    return interval_of(bootstrap(values, clusters, seed, resamples))


def interval_of(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of a metric's resamples [R]; those that hold nothing of it are NaN and do not count."""
    there = drawn[~np.isnan(drawn)]
    if not len(there):
        return float("nan"), float("nan")
    # Between ranks that nothing has (inf) there is no middle.
    low, high = np.quantile(there, [0.025, 0.975], method="linear" if np.isfinite(there).all() else "nearest")
    return float(low), float(high)


def bootstrap(
    values: Sequence[float] | Parts | Medians, clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000
) -> np.ndarray:
    """The metric [R] of each resample; the same clusters and seed draw the same, so that two runs can be compared."""
    parts = values if isinstance(values, (Parts, Medians)) else mean_parts(values)
    return bootstrap_each([(parts, range(len(clusters)))], clusters, seed, resamples)[0]


def bootstrap_each(
    metrics: Sequence[tuple[Parts | Medians, Sequence[int]]],
    clusters: Sequence[Hashable],
    seed: int = 0,
    resamples: int = 1000,
) -> list[np.ndarray]:
    """Several metrics [R] of the same resamples, each of some of the samples; NaN where a resample holds none of them.

    metrics: what samples add, and the numbers of these samples in `clusters` [N].
    """
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)  # [N]
    n = len(numbers)
    counts = [len(parts.rows if isinstance(parts, Parts) else parts.values) for parts, _ in metrics]
    for count, (_, chosen) in zip(counts, metrics):
        if count != len(chosen) or not count or not n:
            raise ValueError(f"{count} values for {len(chosen)} clusters: give as many of both, at least one")
    summed = [_summed(parts, member[np.asarray(chosen)]) for parts, chosen in metrics]
    rng = np.random.default_rng(seed)
    found: list[list[np.ndarray]] = [[] for _ in metrics]
    rows = max(1, _BLOCK // max([n, *counts]))
    for start in range(0, resamples, rows):
        # How often each cluster is drawn: the same as drawing n cluster numbers, without holding them.
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start))  # [R, C]
        times = np.ascontiguousarray(drawn.T, dtype=float)  # [C, R]: a metric reads few of the rows
        for (parts, _), (own, sums), values in zip(metrics, summed, found):
            mine = times[own]  # [c, R], of Medians [N, R]
            with np.errstate(invalid="ignore", divide="ignore"):
                of = parts.metric((sums.T @ mine).T) if sums is not None else parts.of(mine.T)  # type: ignore[union-attr]
            values.append(np.where(mine.any(axis=0), of, np.nan))
    return [np.concatenate(values) for values in found]


def _summed(parts: Parts | Medians, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The clusters [c] that a metric's samples [N] lie in, and what the samples of each add [c, K]; of Medians, which
    are no sums, the cluster of each sample and None."""
    if isinstance(parts, Medians):
        return clusters, None
    own, place = np.unique(clusters, return_inverse=True)
    columns = [np.bincount(place.reshape(-1), weights=column, minlength=len(own)) for column in parts.rows.T]
    return own, np.stack(columns, axis=1)


def mean_parts(values: Sequence[float] | np.ndarray) -> Parts:
    """A mean as a function of sums."""
    column = np.asarray(values, dtype=float)
    return Parts(np.stack([column, np.ones_like(column)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])
