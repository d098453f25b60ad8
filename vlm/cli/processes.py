"""What every command does that runs in several processes (torchrun, accelerate)."""

import os


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
