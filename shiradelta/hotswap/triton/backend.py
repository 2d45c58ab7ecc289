"""The fused backend: every tensor of a device in one launch.

Kernels handle contiguous tensors.  Strided tensors, and tensors on which several deltas do more than add values of one
codec, are done by plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shiradelta.format import arithmetic
from shiradelta.format.codecs.base import Bytes, TorchDecoder
from shiradelta.hotswap.bits_there import sent
from shiradelta.hotswap.layers import Held, Layer, LayerPatch, Patch, only_strengths_differ
from shiradelta.hotswap.resident import Resident
from shiradelta.hotswap.torch import TorchBackend, flat
from shiradelta.hotswap.triton import elements, kernels
from shiradelta.hotswap.triton.batches import ToRead, residents_together
from shiradelta.hotswap.triton.from_base import TritonFromBase
from shiradelta.hotswap.triton.plan import REGION, Launch, Overlaps, Plan, Shared, new_plan, prepare
from shiradelta.io.reader import StoredTensor
from shiradelta.models.live import Target

#: Warps per program of 2,048 lanes.  This is the fastest of 4 to 32; fewer registers, cache hints and programmatic
#: dependent launches gained nothing (H100).
_WARPS = 16
#: Programs per multiprocessor, few enough that their data stays in the cache.
_PROGRAMS = 2
#: A pointer for kernels that are compiled but not run.
_ALIGNED = 1 << 40
#: No limit to the programs of a launch.
_ALL = 1 << 31
#: Number of plans that a delta keeps: the most recently used ones.
_PLANS = 16
#: Bytes per nonzero that the overlaps of a tensor may take.  Eight deltas of 1 % at independent positions take 0.43.
_OVERLAP = 0.5


class TritonBackend(TorchBackend):
    """A CUDA or ROCm device (or, in Triton's interpreter, the CPU)."""

    name = "triton"
    from_base = TritonFromBase()

    def __init__(self, device: str) -> None:
        super().__init__(device)
        on_gpu = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 1
        self._programs = _PROGRAMS * processors
        self._compiled: dict[tuple[object, ...], Any] = {}
        self._refused = torch.zeros(1, dtype=torch.int32, device=self.device)

    def arrange(self, held: Held) -> None:
        held.data = prepare(held, self._there)
        self._compile(held)

    def decodes(self, codec: TorchDecoder) -> bool:
        return codec.id in elements.CODECS

    def read_on_base(self, tensors: Sequence[tuple[Bytes, StoredTensor, Target, TorchDecoder]]) -> list[Resident]:
        given = [ToRead(source, tensor, flat(target), codec) for source, tensor, target, codec in tensors]
        found = residents_together(given, self.from_base, self._upload) if given else []
        return super().read_on_base(tensors) if found is None else found

    def _compile(self, held: Held) -> None:
        """Compiles the switch kernels now, not during the first switch.

        It may take half a second, once per machine.
        """
        for x in self._plan([Layer(held, 1, None)]).alone:
            onto = held.data.table, x.entries, _ALIGNED
            self._compile_for(kernels.apply_kernel, x, *onto, 1.0, self._refused, FILLED=False, **x.kind.put())
            self._compile_for(kernels.restore_kernel, x, *onto, **x.kind.elements())

    def _compile_for(self, kernel: Any, launch: Launch, *arguments: Any, **kind: Any) -> None:
        """Compiles a kernel as `_launch` needs it, unless it has launched such a one."""
        if (kernel.fn.__name__, *kind.values()) not in self._compiled:
            self._run(kernel, launch, *arguments, most=0, **kind)

    def fingerprints(self, held: Held, below: Sequence[Layer]) -> Callable[[], list[int]]:
        """Uses a kernel if no delta is on the tensors yet."""
        if below:
            return super().fingerprints(held, below)
        sums = torch.zeros(len(held.patches), dtype=torch.int64, device=self.device)
        plan = self._plan([Layer(held, 1, None)])
        for x in plan.alone:
            self._launch(kernels.fingerprint_kernel, x, held.data.table, x.entries, sums, **x.kind.elements())

        def read() -> list[int]:
            found = [value % (1 << 64) for value in sums.tolist()]
            for stack in plan.plain:
                for _, number in stack:
                    found[number] = self._fingerprint_of(held.patches[number], [])
            return found

        return read

    # ------------------------------------------------------------------------------------- switching

    def replace(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        """Usually two launches: restore the base, then apply the new deltas.  One if only the strength changes.

        Three ways to do both in one launch were slower:

        - Apply the new blocks between the old ones: this decodes each new block twice.
        - Alternate old and new blocks, with waits where they meet: 0.90 x a copy of the weights, against 0.82 x.
        - The same without waits, with corrections where they meet: 0.90 x against 0.80 x, by the device's clock.
        """
        if not after:
            self.restore(before)
            return
        filled = only_strengths_differ(before, after)
        if not filled:
            self.restore(before)
        plan = self._plan(after)  # while the device restores the base
        if filled and plan.plain:
            self.restore(before)
            filled = False
        shifts = any(x.kind.order != elements.NO_ORDER.value for x in plan.alone)
        if shifts:
            self._refused.zero_()  # a switch may have failed before it was asked
        for x in plan.alone:
            new = after[x.layer]
            onto = new.held.data.table, x.entries, new.room.data_ptr(), float(np.float32(new.strength)), self._refused
            self._launch(kernels.apply_kernel, x, *onto, FILLED=filled, **x.kind.put())
            new.filled[x.patches] = True
        if shifts and self._refused.item():
            raise arithmetic.out_of_range("an element")
        if plan.sums or plan.overlaps:
            self._add_up(plan, after, filled)
        for stack in plan.plain:
            self.apply([LayerPatch(after[layer], number) for layer, number in stack])
        self._used([*before, *after])

    def restore(self, layers: Sequence[Layer]) -> None:
        """Restores in one launch if every patch of the layer is applied.

        The last layer goes first: until `overlap_kernel` has run, it may have saved the results of earlier layers.
        """
        for layer in reversed(layers):
            if not layer.filled.all():
                super().restore([layer])
                continue
            plan = self._plan([layer])
            for x in plan.alone:
                held = layer.held.data.table, x.entries, layer.room.data_ptr()
                self._launch(kernels.restore_kernel, x, *held, **x.kind.elements())
            for stack in plan.plain:
                for _, number in stack:
                    self.restore_one(LayerPatch(layer, number))
        self._used(layers)

    def _add_up(self, plan: Plan, layers: Sequence[Layer], filled: bool) -> None:
        strengths = np.array([layer.strength for layer in layers], np.float32).view(np.int32).tolist()
        rooms = [layer.room.data_ptr() for layer in layers]
        memory = self._there(np.array([rooms, strengths], np.int64).T.copy())
        for x in plan.overlaps:
            assert x.lists is not None
            where = plan.table, x.entries, x.lists, memory
            self._run(kernels.overlap_kernel, x, *where, FILLED=filled, **x.kind.values())
        if not plan.sums:
            return
        size = self._programs * REGION
        sums = torch.full((size,), kernels.EMPTY.value, dtype=torch.int32, device=self.device)
        for x in plan.sums:
            work = plan.table, x.entries, len(x.entries), memory, sums
            self._run(
                kernels.stack_kernel, x, *work, most=self._programs, REGION=REGION, FILLED=filled, **x.kind.values()
            )
            for layer, number in x.patches.tolist():
                layers[layer].filled[number] = True

    def _launch(self, kernel: Any, launch: Launch, *arguments: Any, **kind: Any) -> None:
        """As `_run`, for kernels that are compiled once per kind: pointers are multiples of 16, rooms take 64 bits.

        Skips Triton's inspection of the arguments, which takes longer than the rest of a launch.
        """
        key = kernel.fn.__name__, *kind.values()
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._run(kernel, launch, *arguments, **kind)
            return
        named = dict(zip(kernel.arg_names, arguments, strict=False), **kind)
        # The signatures of Triton before 3.3 leave out constants.
        with self._current():
            compiled[len(launch.entries), 1, 1](*[named[name] for name in compiled.src.signature])

    def _run(self, kernel: Any, launch: Launch, *arguments: Any, most: int = _ALL, **kind: Any) -> Any:
        """Runs one program per entry, but at most `most` programs.  With `most` = 0 the kernel is only compiled.

        Returns:
            The compiled kernel; None from the interpreter.
        """
        grid = (min(len(launch.entries), most),)
        with self._current():
            # A fused multiply-add would round differently.
            return kernel[grid](*arguments, **kind, num_warps=_WARPS, enable_fp_fusion=False)

    def _current(self) -> AbstractContextManager[Any]:
        """Makes the device current, since Triton launches there.  `ordered` of another backend may have set another."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # -------------------------------------------------------------------------------------- planning

    def _plan(self, layers: Sequence[Layer]) -> Plan:
        """The plan for these deltas, made once.  At its second use, overlaps are searched for."""
        plans: dict[tuple[int, ...], Plan] = layers[0].held.data.plans
        key = tuple(layer.held.data.serial for layer in layers)
        plan = plans.pop(key, None)
        if plan is None:
            plan = new_plan(layers, self._there)
        elif plan.searchable:
            plan = new_plan(layers, self._there, self._overlaps(plan, layers))
        if len(plans) >= _PLANS:
            del plans[next(iter(plans))]
        plans[key] = plan
        return plan

    def _overlaps(self, plan: Plan, layers: Sequence[Layer]) -> Overlaps:
        """What the patches of each stack share, where that takes little memory."""
        found: dict[tuple[tuple[int, int], ...], Shared] = {}
        for stack in plan.searchable:
            shared = self._shared([layers[layer].held.patches[number] for layer, number in stack])
            if shared is not None:
                found[tuple(stack)] = shared
        return found

    def _shared(self, patches: Sequence[Patch]) -> Shared | None:
        """The elements that patches of one tensor share; None if they take too much memory."""
        parts = [self.positions(patch) for patch in patches]
        ranks = [torch.arange(len(part), device=self.device) for part in parts]
        words = torch.cat([rank | (number << kernels.RANK_BITS.value) for number, rank in enumerate(ranks)])
        positions, order = torch.cat(parts).sort(stable=True)
        starts = torch.cat([positions.new_ones(1, dtype=torch.bool), positions[1:] != positions[:-1]]).nonzero()[:, 0]
        counts = torch.diff(starts, append=starts.new_tensor([len(positions)]))
        found, left = [], _OVERLAP * len(positions)
        for count in range(2, len(patches) + 1):
            at = starts[counts == count]
            left -= 4 * (1 + count) * len(at)
            if left < 0:
                return None
            if len(at):
                rows = [positions[at], *(words[order[at + number]] for number in range(count))]
                found.append(torch.stack(rows).int())
        return found

    def _there(self, array: NDArray[Any]) -> torch.Tensor:
        """`sent` to this device."""
        return sent(array, self.device)
