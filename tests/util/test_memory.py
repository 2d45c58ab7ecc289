"""What counts as running out of memory."""

from __future__ import annotations

import pytest
import torch

from shiradelta.errors import ShiraDeltaError
from shiradelta.util.memory import advising_on_memory, gpu_peak


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_becomes_advice(error: Exception):
    with pytest.raises(ShiraDeltaError, match=r"^out of memory: take less$"), advising_on_memory(": take less"):
        raise error


def test_other_errors_stay():
    with pytest.raises(RuntimeError, match=r"illegal memory access"), advising_on_memory(": take less"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_a_gpu_held_is_said_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda:1"): 38_900_000_000}.__getitem__)
    assert gpu_peak([torch.device("cuda:1")]) == ", in 38.9 GB of its memory so far"
    assert gpu_peak(["cuda:1", "cpu", "cuda:1"]) == ", in 38.9, 38.9 GB of theirs so far"
    assert gpu_peak(["cpu"]) == ""
