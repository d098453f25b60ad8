"""How many operations something makes and how many bytes of tensors are alive at one time, with or without values."""

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """torch's counter, which also knows attention as a CPU computes it."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


class StepMeter(TorchDispatchMode):
    """Counts matrix operations, and the storages that are made while it is on, until they are freed.

    flops: by torch's own formulas, without its counter's bookkeeping, which takes most of the time where tensors have
    no values. peak: the most bytes alive at one time, within 1 %, of what was made since it was switched on. now: those
    alive now.
    Work space inside a kernel is not seen. Tensors that only wait for Python's cycle collector do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.now = 0
        self.peak = 0
        self._formulas = flop_counter().flop_registry
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> "StepMeter":
        gc.collect()
        gc.freeze()  # so that later collections look at what is new alone
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **options, out_val=result)
        if func.is_view:
            return result
        given: set[int] | None = None
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            if given is None:
                given = {t.untyped_storage()._cdata for t in tree_leaves((args, options)) if isinstance(t, Tensor)}
            if key not in given:  # else what was there before, changed in place
                self._note(storage, key)
        return result

    def _note(self, storage: torch.UntypedStorage, key: int) -> None:
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        if self.now > self.peak * 1.01:
            gc.collect()
            self.peak = max(self.peak, self.now)  # only now: what waits for the collector would add up
