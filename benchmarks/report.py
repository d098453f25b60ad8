"""Write `RESULTS.md`: the newest result of every case in `runs/benchmarks.jsonl`."""

import json
from typing import Any

from harness import RESULTS, ROOT, describe

HEADER = """# Results of the benchmarks

Written by `make bench`; [README.md](README.md) says how each number is measured. Both sides run in turns on the same
machine, so ratios carry over better than times. A target that is not reached says so.
"""


def main() -> None:
    """Read the results, write the report."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in RESULTS.read_text().splitlines():
        result = json.loads(entry)
        newest[result["benchmark"], result["case"]] = result
    text = HEADER
    for benchmark in sorted({name for name, _ in newest}):
        rows = [result for (name, _), result in newest.items() if name == benchmark]
        text += f"\n## {benchmark}\n\n"
        text += "".join(f"{place}\n\n" for place in dict.fromkeys(f"{describe(r['machine'])}." for r in rows))
        text += "| case | against | unit | ours /s | theirs /s | speed | target | memory | target | of peak |\n"
        text += "|---|---|---|---|---|---|---|---|---|---|\n" + "".join(f"| {' | '.join(_row(r))} |\n" for r in rows)
    (ROOT / "benchmarks" / "RESULTS.md").write_text(text)


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
