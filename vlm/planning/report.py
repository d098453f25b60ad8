"""A plan in words."""

from vlm.planning.plan import Plan


def plan_text(plan: Plan) -> str:
    """What `vlm-train RECIPE --plan` prints."""
    lines = ["parameters                        all         trained"]
    trained = dict(plan.trained)
    for name, count in plan.parameters.items():
        own = sum(value for key, value in trained.items() if key.partition(".")[0] == name)
        lines.append(f"  {name:<20}{count:>16,}{own:>16,}")
    lines.append(f"  {'together':<20}{sum(plan.parameters.values()):>16,}{sum(trained.values()):>16,}")

    guess = ", estimated by the kind of data (--tokens says better)" if plan.assumed else ""
    lines += ["", f"operations of a sample: {plan.text_tokens} text tokens, {plan.labels} trained{guess}"]
    lines.append(f"  {'GFLOP':<20}{'forward':>16}{'backward':>16}")
    for name, (forward, backward) in plan.flops.items():
        lines.append(f"  {name:<20}{forward / 1e9:>16,.2f}{backward / 1e9:>16,.2f}")
    lines.append(f"  {'together':<20}{plan.flops_per_sample / 1e9:>16,.2f}")

    each = f"{plan.gpus} x {plan.gpu}, {plan.precision}, micro-batches of {plan.micro_batch_size}"
    lines += ["", f"memory of one GPU in GB: {each}"]
    for name in ("weights", "gradients", "optimizer", "activations", "buffers"):
        lines.append(f"  {name:<20}{getattr(plan.memory, name) / 1e9:>16,.2f}")
    lines.append(f"  {'together':<20}{plan.memory.total / 1e9:>16,.2f}  of {plan.limit / 1e9:,.1f} that can be used")
    for name, total in plan.options.items():
        lines.append(f"  with {name}: {total / 1e9:,.2f}")
    if plan.fits:
        lines.append("it fits")
    elif plan.levers:
        lines.append(f"it does not fit; it would with {' '.join(plan.levers)}")
    else:
        lines.append(
            "it does not fit, whatever the micro-batches: use more or larger GPUs (--gpus with train.fsdp=true)"
        )

    lines.append("")
    if plan.cache is not None:
        per = "" if plan.samples is not None else " a picture"
        used = "kept" if plan.cached else "not kept (data.cache_features=false)"
        lines.append(f"feature cache: {_size(plan.cache)}{per}, {used}")
    if plan.steps is None or plan.hours is None:
        lines.append("steps and hours: the number of samples is not known; give it with --samples")
    else:
        time = f"{plan.hours:,.1f} hours" if plan.hours >= 1 else f"{plan.hours * 60:,.1f} minutes"
        lines.append(f"{plan.steps:,} steps: {time} at {plan.share:.0%} of the GPU's peak")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
