"""What every command does that runs in several processes (torchrun, accelerate)."""

import os

# What gloo, NCCL and the store say where the other side of a connection has ended.
_ENDED = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "connection refused",
    "broken pipe",
    "remote process exit",
)


def leave_the_group() -> None:
    """End communication between processes before Python ends: its threads may not outlive the interpreter."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import gc

    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a sharded model holds on to the group
        distributed.barrier()
        distributed.destroy_process_group()


def lost_process(error: BaseException) -> str | None:
    """What to tell where an exchange with another process failed because that has ended; None of any other error."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    text = str(error).lower()
    if world == 1 or not any(sign in text for sign in _ENDED):
        return None
    reason = str(error).strip().splitlines()[0]
    return (
        f"another of the {world} processes has ended or cannot be reached ({reason}); its own output says why. Start "
        "all of them again: vlm-train goes on from the newest checkpoint with --resume, vlm-eval with what was answered"
    )
