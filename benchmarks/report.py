"""Write `RESULTS.md` of the newest result of every case, and the README's table of it.

Results are those of `runs/benchmarks.jsonl` and, of cases that were not run here, of `results.jsonl`, which travels
with the report and is written anew with it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, describe

HEADER = """# Results of the benchmarks

Written by `make bench`; [README.md](README.md) says how each number is measured. Both sides run in turns on the same
machine, so ratios carry over better than times. A target that is not reached says so.
"""


START, END = "<!-- benchmarks: written by `make bench` -->", "<!-- end of benchmarks -->"
NOTHING = "Nothing has been measured yet: run `make bench`."


def main() -> None:
    """Read the results, write the report and the README's table."""
    write(RESULTS, ROOT)


def write(here: Path, root: Path) -> None:
    """Write the report and the README's table under `root`. here: the results of this machine, where there are any."""
    kept, report = root / "benchmarks" / "results.jsonl", root / "benchmarks" / "RESULTS.md"
    results = newest([line for file in (kept, here) if file.is_file() for line in file.read_text().splitlines()])
    if results:
        kept.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
        report.write_text(text_of(results), encoding="utf-8")
    if report.is_file():
        fill_readme(root / "README.md", summary_in(report.read_text(encoding="utf-8")))


def newest(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The last result of every case, by benchmark."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in lines:
        result = json.loads(entry)
        found[result["benchmark"], result["case"]] = result
    return sorted(found.values(), key=lambda result: str(result["benchmark"]))


def text_of(results: Sequence[dict[str, Any]]) -> str:
    """The whole report: the summary, and for each benchmark machine, versions and all numbers."""
    text = f"{HEADER}\n{START}\n{summary(results)}{END}\n"
    for benchmark in sorted({result["benchmark"] for result in results}):
        rows = [result for result in results if result["benchmark"] == benchmark]
        text += f"\n## {benchmark}\n\n"
        text += "".join(f"{place}\n\n" for place in dict.fromkeys(f"{describe(r['machine'])}." for r in rows))
        text += "| case | against | unit | ours /s | theirs /s | speed | target | memory | target | of peak |\n"
        text += "|---|---|---|---|---|---|---|---|---|---|\n" + "".join(f"| {' | '.join(_row(r))} |\n" for r in rows)
    return text


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One line a case: how many times as fast, and which share of the memory."""
    text = "| benchmark | case | against | speed | memory |\n|---|---|---|---|---|\n"
    for result in results:
        memory = result.get("memory")
        share = "" if memory is None else f"{memory['share']:.2f}"
        cells = [result["benchmark"], result["case"], result["peer"], f"{result['speed']:.2f}x", share]
        text += f"| {' | '.join(cells)} |\n"
    return text


def summary_in(text: str) -> str:
    """What stands between the markers of a report or README."""
    return text.partition(f"{START}\n")[2].partition(END)[0]


def fill_readme(readme: Path, table: str) -> None:
    """Put the table between the README's markers, where it has them."""
    text = readme.read_text(encoding="utf-8")
    if START in text:
        before, _, rest = text.partition(f"{START}\n")
        readme.write_text(f"{before}{START}\n{table}{END}{rest.partition(END)[2]}", encoding="utf-8")


def _row(result: dict[str, Any]) -> list[str]:
    rates = [f"{result['amount'] / result['seconds'][side]:,.4g}" for side in ("ours", "theirs")]
    target, allowed = result["speed_target"], result.get("memory_target")
    memory = result.get("memory")
    return [
        result["case"],
        result["peer"],
        result["unit"],
        *rates,
        f"**{result['speed']:.2f}x**",
        "" if target is None else f"{target:g}x {_mark(result['speed'] >= target)}",
        "" if memory is None else _sizes(memory),
        "" if memory is None or allowed is None else f"{allowed:.3g} {_mark(memory['share'] <= allowed)}",
        "" if "peak_share" not in result else _peak(result["peak_share"], result["peak_target"]),
    ]


def _sizes(memory: dict[str, float]) -> str:
    return f"{memory['share']:.3f} ({memory['ours'] / 2**20:,.0f} / {memory['theirs'] / 2**20:,.0f} MiB)"


def _peak(share: float, target: float | None) -> str:
    return f"{share:.0%}" + ("" if target is None else f" (target {target:.0%} {_mark(share >= target)})")


def _mark(met: bool) -> str:
    return "reached" if met else "**not reached**"


if __name__ == "__main__":
    main()
