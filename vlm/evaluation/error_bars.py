"""The intervals of an evaluation: of every metric, of the headline by every protocol, and of every group of a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.evaluation.intervals import Medians, Parts, bootstrap_each, interval_of, mean_parts
from vlm.evaluation.task import Judged

if TYPE_CHECKING:
    from vlm.evaluation.benchmark import Benchmark

Interval = tuple[float, float]


@dataclass(frozen=True)
class ErrorBars:
    """95 % intervals, in per cent but for ranks: of each metric, of each protocol, and title -> group of each table."""

    metrics: dict[str, Interval]
    protocols: dict[str, Interval]
    tables: dict[str, dict[str, Interval]]


@dataclass(frozen=True)
class _Resampled:
    """What is drawn again. members: the numbers of its samples; factor: from its unit to per cent; most: its limit."""

    parts: Parts | Medians
    members: Sequence[int]
    factor: float = 100.0
    most: float = float("inf")


def error_bars(judged: dict[str, Judged], plan: "Benchmark", unreadable: Sequence[str]) -> ErrorBars:
    """The intervals of scores by several protocols, all from the same resamples of pictures.

    unreadable: ids of records that count as wrong and are no samples.
    """
    headline = judged[plan.protocol]
    clusters = [sample.image or sample.id for sample in headline.samples] + list(unreadable)
    asked: dict[tuple[str, str, str], _Resampled] = {}
    for metric in headline.contributions:
        asked["metric", metric, ""] = _of_metric(headline, metric, len(clusters))
    for protocol, found in judged.items():
        asked["protocol", protocol, ""] = _of_metric(found, plan.metric, len(clusters))
    for title, table in headline.tables.items():
        for group, (members, parts) in table.parts.items():
            asked["table", title, group] = _Resampled(parts, members)
    drawn = bootstrap_each([(one.parts, one.members) for one in asked.values()], clusters)
    found_all = dict(zip(asked, map(_scaled, asked.values(), map(interval_of, drawn)), strict=True))

    def of(kind: str) -> Iterator[tuple[str, str, Interval]]:
        return ((first, second, interval) for (own, first, second), interval in found_all.items() if own == kind)

    tables: dict[str, dict[str, Interval]] = {}
    for title, group, interval in of("table"):
        tables.setdefault(title, {})[group] = interval
    return ErrorBars({name: i for name, _, i in of("metric")}, {name: i for name, _, i in of("protocol")}, tables)


def _of_metric(found: Judged, metric: str, count: int) -> _Resampled:
    """A metric of a protocol; `count` clusters there are, those behind the samples' own could not be read."""
    values, samples = found.contributions[metric], len(found.samples)
    if isinstance(values, Medians):
        return _Resampled(values, range(samples), 1.0)
    if isinstance(values, Parts):
        # What could not be read makes the score less, and the interval as much less.
        point = float(values.metric(values.rows.sum(axis=0)[None])[0])
        return _Resampled(values, range(samples), found.scores[metric] / point if point else 100.0)
    own = {number: value for number, value in enumerate(values) if value is not None}
    lost = dict.fromkeys(range(samples, count), 0.0)
    # Weighted values, as of a mean per class, can pass 1 in a resample.
    return _Resampled(mean_parts([*own.values(), *lost.values()]), [*own, *lost], most=100.0)


def _scaled(one: _Resampled, interval: Interval) -> Interval:
    low, high = (one.factor * end for end in interval)
    return low, min(one.most, high)
