"""Two sides that do the same work, timed in turns and weighed apart.

A script gives cases by name; a case has two sides, each a function that builds what is needed and returns the step to
measure. Time: both sides are built in one process and take turns (A B A B ...), so that whatever else the machine does
falls on both; the median of each counts. Memory: each side alone in a fresh process; the step runs once to settle, the
kernel's high-water mark of resident memory is reset, and the step runs again: the mark less what was resident before is
what the step needs above its inputs, weights and gradients that are there already. (glibc is told to give freed memory
back at once; measured on Linux, left out elsewhere.)

Results are printed and appended to `runs/benchmarks.jsonl`; `report.py` makes `RESULTS.md` of them. A case that fails
is named at the end, and the others run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Step = Callable[[], Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "benchmarks.jsonl"
_SIZE, _PRODUCTS = 1536, 8  # of the products that show the machine's peak
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


@dataclass(frozen=True)
class Case:
    """ours, theirs: build a side and return its step. amount: units of work in a step, for the rate.

    speed_target: how many times faster ours is meant to be. memory_target: the largest share of their memory that ours
    may need. measure_memory: also without a target. check: given what the two steps returned, raises if they differ.
    operations: given our step, the floating-point operations of its matrix products, for their share of the machine's
    peak, which is meant to be at least peak_target. The peak is that of large products that take turns with both sides.
    repeats: turns of each side behind a first one, which warms up and is checked; 0: that first one is timed, for steps
    so long that nothing else counts.
    keeps_memory: keep the memory that a step frees, as our training does; both sides, but one with its own process.
    A step that has a `pid` runs in that process, which is weighed instead of this one.
    """

    ours: Callable[[], Step]
    theirs: Callable[[], Step]
    peer: str
    amount: float = 1.0
    unit: str = "step"
    repeats: int = 5
    speed_target: float | None = None
    memory_target: float | None = None
    measure_memory: bool = False
    check: Callable[[Any, Any], None] | None = None
    operations: Callable[[Any], float] | None = None
    peak_target: float | None = None
    keeps_memory: bool = False


def main(cases: Mapping[str, Case], packages: Sequence[str] = ()) -> None:
    """Run the cases of the calling script, all or those named on its command line.

    packages: distributions whose versions decide the numbers, besides torch.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", help=f"of: {', '.join(cases)}")
    parser.add_argument("--repeats", type=int, help="turns each side takes")
    parser.add_argument("--peak", choices=("ours", "theirs"), help="print a side's peak memory in bytes and stop")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(cases):
        parser.error(f"no case {', '.join(sorted(unknown))}; known: {', '.join(cases)}")
    names = options.cases or list(cases)
    if options.peak:
        print(json.dumps(peak_memory(getattr(cases[names[0]], options.peak)())))
        return
    script = Path(sys.argv[0]).resolve()
    where = machine(packages)
    print(f"{script.stem} on {describe(where)}")
    failed = []
    for name in names:
        try:
            result = {"benchmark": script.stem, "case": name, **_measure(script, name, cases[name], options.repeats)}
        except Exception:  # an absent peer, or one that fails, ends its case alone
            traceback.print_exc()
            failed.append(name)
            continue
        print(line(result), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps({**result, "machine": where}) + "\n")
    if failed:
        sys.exit(f"{script.stem}: failed: {'; '.join(failed)}")


def _measure(script: Path, name: str, case: Case, repeats: int | None) -> dict[str, Any]:
    result = {"peer": case.peer, **_run(case, repeats)}
    if case.measure_memory and sys.platform == "linux":
        peaks = {side: _peak_apart(script, name, side) for side in ("ours", "theirs")}
        result["memory"] = {**peaks, "share": peaks["ours"] / max(peaks["theirs"], 1)}
        result["memory_target"] = case.memory_target
    return result


def _run(case: Case, repeats: int | None) -> dict[str, Any]:
    if case.keeps_memory:
        from vlm.training.memory import keep_freed_memory

        keep_freed_memory()
    ours, theirs = case.ours(), case.theirs()
    first: tuple[list[float], list[float]] = ([], [])
    results = [_timed(step, into) for step, into in zip((ours, theirs), first)]  # also warms both up
    if case.check is not None:
        case.check(*results)
    del results
    turns = case.repeats if repeats is None else repeats
    sides = [ours, theirs, *([_large_products()] if case.operations else [])]
    times = take_turns(sides, turns) if turns else first
    seconds = {"ours": median(times[0]), "theirs": median(times[1])}
    extra: dict[str, Any] = {}
    if case.operations:
        peak = _PRODUCTS * 2 * _SIZE**3 / median(times[2])
        share = case.operations(ours) / seconds["ours"] / peak
        extra = {"peak_share": share, "peak_target": case.peak_target, "peak": peak}
    return {
        **extra,
        "seconds": seconds,
        "all_seconds": {"ours": times[0], "theirs": times[1]},
        "amount": case.amount,
        "unit": case.unit,
        "speed": seconds["theirs"] / seconds["ours"],
        "speed_target": case.speed_target,
    }


def take_turns(sides: Sequence[Step], repeats: int) -> list[list[float]]:
    """Seconds of each of `repeats` turns of every side, one side after the other."""
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(repeats):
        order = list(zip(sides, times))
        for step, into in order if turn % 2 == 0 else reversed(order):
            _timed(step, into)
    return times


def _timed(step: Step, into: list[float]) -> Any:
    start = time.perf_counter()
    result = step()
    into.append(time.perf_counter() - start)
    return result


def _large_products() -> Step:
    """What the machine can do at best, as a side that takes turns: matrix products, one after the other."""
    import torch

    square = torch.randn(_SIZE, _SIZE)

    def step() -> None:
        for _ in range(_PRODUCTS):
            square @ square

    return step


def peak_memory(step: Step) -> int:
    """Bytes by which a second run of `step` raises its process's resident memory at its highest (Linux)."""
    process = Path("/proc", str(getattr(step, "pid", "self")))
    step()
    before = _status(process, "VmRSS")
    (process / "clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    step()
    return max(_status(process, "VmHWM") - before, 0)


def _status(process: Path, key: str) -> int:
    for entry in (process / "status").read_text().splitlines():
        if entry.startswith(f"{key}:"):
            return int(entry.split()[1]) * 1024
    raise RuntimeError(f"{process}/status has no {key}")


def _peak_apart(script: Path, case: str, side: str) -> int:
    command = [sys.executable, str(script), case, "--peak", side]
    environment = {**os.environ, **_RETURN_FREED_MEMORY}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch

    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    """The processor's name, and the vector and matrix units that torch's kernels would use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    entries = dict(part.split(":", 1) for part in text.replace("\t", "").splitlines() if ":" in part)
    flags = entries.get("flags", "").split()
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return " ".join([entries.get("model name", platform.machine()).strip(), *units])


def describe(where: Mapping[str, Any]) -> str:
    """`machine` in words."""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    place = f"{where['cpu']}, {where['threads']} threads" + (f", {where['gpu']}" if where["gpu"] else "")
    return f"{place}; Python {where['python']}, {versions}"


def line(result: Mapping[str, Any]) -> str:
    """One result as a line of text."""
    seconds, memory = result["seconds"], result.get("memory")
    rates = [f"{result['amount'] / seconds[side]:,.4g}" for side in ("ours", "theirs")]
    target = result["speed_target"]
    text = f"{result['case']}: {rates[0]} against {rates[1]} {result['unit']}/s of {result['peer']}: "
    text += f"{result['speed']:.2f}x as fast{_verdict(target, target is None or result['speed'] >= target, 'x')}"
    if memory:
        sizes = [f"{memory[side] / 2**20:,.0f}" for side in ("ours", "theirs")]
        allowed = result["memory_target"]
        met = allowed is None or memory["share"] <= allowed
        text += f"; {sizes[0]} against {sizes[1]} MiB: {memory['share']:.3f} of the memory{_verdict(allowed, met, '')}"
    if share := result.get("peak_share"):
        met = result["peak_target"] is None or share >= result["peak_target"]
        text += f"; {share:.0%} of the matrix-multiplication peak{_verdict(result['peak_target'], met, '')}"
    return text


def _verdict(target: float | None, met: bool, unit: str) -> str:
    return "" if target is None else f" (target {target:g}{unit}: {'reached' if met else 'NOT reached'})"
