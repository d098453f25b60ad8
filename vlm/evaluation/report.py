"""report.html: one file that opens anywhere, with the scores beside others' and the pictures beside the answers."""

import base64
import io
import json
import math
from collections import Counter
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from vlm.evaluation.baselines import BASELINES
from vlm.evaluation.result import EvaluationResult, Sample
from vlm.evaluation.tasks import TASKS

_TEMPLATE = Path(__file__).with_name("report_template.html")
_MAX_PICTURES = 300
_MAX_CHARACTERS = 4_500_000
_THUMBNAIL = 128
_FOLDED = 40  # a table with more rows opens on a click


def render_report(result: EvaluationResult) -> str:
    """The report as HTML: no network, every text escaped, each picture embedded once, under about 5 MB."""
    pictures = _by_picture(result.samples)
    chosen = _choose(pictures, _MAX_PICTURES)
    cards: list[str] = []
    room = _MAX_CHARACTERS
    for samples in chosen:
        card = _card(samples)
        room -= len(card)
        if room < 0 and cards:
            break
        cards.append(card)
    shown = sum(len(samples) for samples in chosen[: len(cards)])
    low, high = result.interval
    noun = TASKS[result.task].noun
    said = "" if noun == "pictures" else f", {shown:,} of {result.count:,} {noun}"
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{result.benchmark}: {result.model}"),
        description=escape(result.description),
        score=_number(result.score),
        metric=escape(result.metric),
        protocol=escape(result.protocol),
        low=_number(low),
        high=_number(high),
        count=f"{result.count:,}",
        limited=_limited(result),
        broken=_broken(result),
        comparison="\n".join(_comparison(result)),
        comparison_note="Ours with its 95 % interval. "
        + ("Blind baselines are measured here, on the same questions, without the pictures. " * bool(result.baselines))
        + "Published scores may rest on other protocols: follow their source.",
        noun=noun,
        tables="\n".join(_tables(result)),
        shown_note=f"Shown: {len(cards):,} of {len(pictures):,} pictures{said}"
        + ("." if len(cards) == len(pictures) else ", wrong ones preferred; samples.jsonl holds all."),
        samples="\n".join(cards),
    )


def _limited(result: EvaluationResult) -> str:
    """What part of the data set the score is about, where it is not the whole."""
    limit, partial, total = (result.settings.get(key) for key in ("limit", "partial", "records_in_data_set"))
    first = "" if limit is None else f" (only the first {limit:,} of {total:,})"
    missing = "" if not partial else f" (partial: predictions are missing for {partial['missing']:,} of {total:,})"
    return first + missing


def kind_of(score: float) -> str:
    """`right`, `partly` or `wrong`. Soft accuracy gives .9 where three of ten humans agree: as good as right."""
    return "right" if score >= 0.9 - 1e-9 else "partly" if score > 0 else "wrong"


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞" if value > 0 else "none"


def _with_interval(score: float, interval: tuple[float, float] | None) -> str:
    return _number(score) + (f" ({_number(interval[0])} to {_number(interval[1])})" if interval else "")


def _broken(result: EvaluationResult) -> str:
    if not result.broken:
        return ""
    first = "".join(f"<li>{escape(str(b['id']))}: {escape(str(b['error']))}</li>" for b in result.broken[:20])
    more = "" if len(result.broken) <= 20 else f"<li>... and {len(result.broken) - 20:,} more</li>"
    text = f"{len(result.broken):,} samples could not be asked and count as wrong"
    return f"<details><summary>{text}</summary><ul>{first}{more}</ul></details>"


def _comparison(result: EvaluationResult) -> list[str]:
    rows = [_bar(escape(result.model), result.score, "", "ours", result.interval)]
    rows += [_bar(escape(BASELINES.get(key, key)), score, "measured here") for key, score in result.baselines.items()]
    for entry in result.published:
        source = str(entry["source"])
        link = source.startswith(("https://", "http://"))
        cell = f'<a href="{escape(source)}" rel="noopener noreferrer">source</a>' if link else escape(source)
        if entry.get("differs"):
            cell += f"<br>another setting: {escape('; '.join(entry['differs']))}"
        rows.append(_bar(escape(str(entry["model"])), float(entry["score"]), cell))
    return rows


def _bar(name: str, score: float, note: str, kind: str = "other", interval: tuple[float, float] | None = None) -> str:
    width = min(100.0, max(0.0, score))
    whisker = ""
    if interval is not None:
        whisker = f'<div class="whisker" style="left:{interval[0]:.2f}%;right:{100 - interval[1]:.2f}%"></div>'
    track = f'<div class="track"><div class="fill" style="width:{width:.2f}%"></div>{whisker}</div>'
    return (
        f'<tr class="{kind}"><td>{name}</td><td class="number">{_number(score)}</td><td class="bar">{track}</td>'
        f'<td class="soft">{note}</td></tr>'
    )


def _tables(result: EvaluationResult) -> list[str]:
    tables = []
    if len(result.metrics) > 1:
        tables.append(_table("All metrics", _scored(_named(result.metrics), _named(result.intervals)), "number"))
    rows = _scored(result.scores, result.score_intervals)
    tables.append(_table("The same answers by each protocol", rows, "number"))
    for title, scores in result.tables.items():
        name = title.replace("_", " ").capitalize()
        rows = _scored(scores, result.table_intervals[title])
        tables.append(_table(name, rows, "number", by=result.table_groups[title]))
    settings = [*_flat(result.settings), ("seconds", str(result.seconds)), ("git commit", result.git_commit or "none")]
    tables.append(_table("Settings", settings))
    tables.append(_table("Versions", list(result.versions.items())))
    return tables


def _named(scores: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): score for name, score in scores.items()}


def _scored(scores: dict[str, float], intervals: dict[str, tuple[float, float]]) -> list[tuple[str, str]]:
    return [(name, _with_interval(score, intervals.get(name))) for name, score in scores.items()]


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys, what is not set left out."""
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != []:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def _table(title: str, rows: list[tuple[str, str]], kind: str = "", by: str = "") -> str:
    """A table of names and values; where its rows are groups of samples (`by`), a click shows a group's samples."""
    names = [escape(name) for name, _ in rows]
    if by:
        names = [
            f'<button data-by="{escape(by)}" data-group="{name}" aria-pressed="false">{name}</button>' for name in names
        ]
    cells = "".join(f'<tr><td>{k}</td><td class="{kind}">{escape(v)}</td></tr>' for k, (_, v) in zip(names, rows))
    table = f"<table><tbody>{cells}</tbody></table>"
    if len(rows) > _FOLDED:
        table = f"<details><summary>{len(rows):,} rows</summary>{table}</details>"
    return f"<section><h2>{escape(title)}</h2>{table}</section>"


def _by_picture(samples: list[Sample]) -> list[list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.image or f"id:{sample.id}", []).append(sample)
    return list(groups.values())


def _choose(pictures: list[list[Sample]], most: int) -> list[list[Sample]]:
    """At most `most` pictures in their order, evenly spread: five in six with something wrong, or the worst."""
    if len(pictures) <= most:
        return pictures
    wrong = [i for i, samples in enumerate(pictures) if any(kind_of(s.score) == "wrong" for s in samples)]
    right = sorted(set(range(len(pictures))) - set(wrong))
    anywhere = min(len(right), most // 6)
    picked = _spread(wrong, most - anywhere)
    picked += _spread(right, anywhere)
    # Where few are wrong, those that score least: captions are better or worse.
    rest = sorted(set(right) - set(picked), key=lambda i: _mean(pictures[i]))
    return [pictures[index] for index in sorted(picked + rest[: most - len(picked)])]


def _mean(samples: list[Sample]) -> float:
    return sum(sample.score for sample in samples) / len(samples)


def _spread(items: list[int], count: int) -> list[int]:
    if count >= len(items):
        return items
    return [items[position * len(items) // count] for position in range(count)]


def _card(samples: list[Sample]) -> str:
    image = samples[0].image
    picture = _thumbnail(image) if image else None
    name = escape(Path(image).name) if image else ""
    if picture:
        shown = f'<img src="{picture}" alt="{name}" title="{escape(str(image))}" loading="lazy">'
    else:
        shown = f"<p>{name} cannot be read</p>" if image else "<p>no picture</p>"
    questions = "".join(map(_question, samples))
    return f'<article data-score="{_mean(samples):.4f}"><div>{shown}</div><div>{questions}</div></article>'


def _question(sample: Sample) -> str:
    said = sample.prediction if sample.prediction is not None else f"({sample.error})"
    truth = ", ".join(
        answer if times == 1 else f"{answer} ×{times}" for answer, times in Counter(sample.answers).most_common()
    )
    rest = f"what the model said: {', '.join(sample.ranking) or said}"
    groups = f' data-groups="{escape(json.dumps(sample.groups, ensure_ascii=False))}"' if sample.groups else ""
    return (
        f'<div class="q {kind_of(sample.score)}" data-id="{escape(sample.id)}"{groups}>'
        f"<span>{escape(sample.question or '')}</span>"
        f'<span class="p" title="{escape(rest)}">{escape(said)}</span>'
        f'<span class="soft" title="what is right">{escape(truth)}</span><span>{100 * sample.score:.0f}</span></div>'
    )


def _thumbnail(path: str) -> str | None:
    """The picture as a data URL of at most 128 pixels a side, as PNG or JPEG, whichever is smaller."""
    from vlm.data.images import BrokenImage, load_image

    try:
        image = load_image(path)
    except (BrokenImage, OSError):
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    candidates = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        candidates.append((kind, buffer.getvalue()))
    kind, content = min(candidates, key=lambda candidate: len(candidate[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
