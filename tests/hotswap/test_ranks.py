"""HotSwap on models that are spread over processes: all have the adapter, bit for bit as one process, or none has."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import ShiraDeltaError, TargetError
from shiradelta.format.codecs import FROM_BASE
from shiradelta.format.digest import tensor_digest
from shiradelta.hotswap import groups
from shiradelta.io.writer import writing_to
from tests import BRIEF
from tests.hotswap.ranks_at_random import LAYOUTS, at_random, delta, net, spread, whole
from tests.ranks import Ended, run
from tests.reference import make_vectors
from tests.swapping import adapter, bits, random_delta

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo here", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("kind", "count"), LAYOUTS)
def test_bits_are_those_of_one_process(kind: str, count: int, tmp_path: Path):
    for done, differ, _ in run(at_random, count, tmp_path, kind, 12, 5):
        assert (done, differ) == (12, 0)


def refusal_of(call: Any, *arguments: Any, **options: Any) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(ShiraDeltaError) as caught:
        call(*arguments, **options)
    return f"{type(caught.value).__name__}: {caught.value}"


def refusals(rank: int, good: bytes, damaged: bytes, other: bytes, strange: bytes) -> list[str]:
    model = spread("tp")
    base = whole(model)
    swap = HotSwap(model, timeout=30)
    said = [refusal_of(swap.load, "a", damaged if rank == 1 else good)]  # one rank's file is damaged
    said.append(refusal_of(swap.load, "a", other if rank == 1 else good))
    said.append(refusal_of(swap.load, "a", strange))  # a name that no rank has
    assert swap.loaded == {}
    swap.load("a", good)
    said.append(refusal_of(swap.switch, "a", 0.5 + rank))  # different calls
    said.append(refusal_of(swap.switch, "b"))
    assert swap.active == {}
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())
    swap.switch("a")
    if rank == 1:  # something else writes one rank's part of a weight
        with torch.no_grad():
            model.up.weight.to_local().add_(1)
    said.append(refusal_of(swap.switch, None))
    assert swap.active == {"a": 1.0}
    with pytest.raises(sd.DeltaError, match="load_async cannot keep the order"):
        swap.load_async("b", good)
    return said


def outside(rank: int) -> str | None:
    first = dist.new_group([0])
    return refusal_of(HotSwap, {"w": torch.zeros(4)}, group=first) if rank else None


def test_a_process_outside_the_group_is_refused(tmp_path: Path):
    _, said = run(outside, 2, tmp_path)
    assert said == "ArgumentError: this process is not in the group; make a HotSwap in its processes only"


def test_where_one_rank_refuses_none_changes(tmp_path: Path):
    good, at = delta(1), 700
    damaged = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    strange = adapter({"elsewhere": random_delta((4, 4), 3, 1)})
    one, two = run(refusals, 2, tmp_path, good, damaged, delta(2), strange)
    assert two[0].startswith("FormatError")
    assert one[0].startswith("TargetError: rank 1 refuses load('a'), so that no rank changes: FormatError")
    for said in (one, two):
        assert said[1] == "BaseMismatchError: delta: another rank has loaded another file; give all ranks the same one"
    assert all("'elsewhere'" in said[2] and said[2].startswith("BaseMismatchError") for said in (one, two))
    assert one[3].startswith("TargetError: rank 1 calls switch({'a': 1.5}) where rank 0 calls switch({'a': 0.5})")
    assert all("adapter 'b' is not loaded" in said[4] for said in (one, two))
    assert "tensor 'up.weight' was changed from outside" in two[5]
    assert one[5].startswith("TargetError: rank 1 refuses switch({})")


def other_base(rank: int, data: bytes) -> str:
    model = spread("tp")
    if rank == 1:
        with torch.no_grad():
            model.norm.weight.add_(1)
    return refusal_of(HotSwap(model).load, "a", data)


def test_fingerprints_are_summed_and_copies_compared(tmp_path: Path):
    """The norm is whole in both processes, and is not the same there."""
    for said in run(other_base, 2, tmp_path, delta(1)):
        assert said.startswith("BaseMismatchError: tensor 'norm.weight' is in several places, and its elements are not")


def part_of_base(rank: int, data: bytes) -> str:
    model = spread("tp")
    base = whole(model)
    swap = HotSwap(model, timeout=30)
    said = refusal_of(swap.load, "a", data)
    assert swap.loaded == {}
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())
    return said


def test_no_rank_takes_its_part_for_the_base(tmp_path: Path):
    """A file that is read with its base only, where no rank has all of a tensor."""
    tensor = net().up.weight.detach()
    at = np.flatnonzero(tensor.abs().float().numpy().reshape(-1) < 0.1)
    step = sd.TensorDelta(
        tuple(tensor.shape), at, np.ones(at.size, int), "bfloat16", "ulp", bits(tensor).reshape(-1)[at]
    )
    sd.save_delta(tmp_path / "plain.shd", {"up.weight": step})
    on_base = io.BytesIO()  # by hand: the tensor is so small that `recode` would keep the plain form
    with sd.open_delta(tmp_path / "plain.shd") as delta, writing_to(on_base, "f32") as writer:
        stored = delta["up.weight"]
        section = FROM_BASE.encode_on(at, stored.shape, bits(tensor).reshape(-1))
        assert section is not None
        record = stored.record._replace(index_codec=FROM_BASE.id)
        writer.add_sections(record, tensor_digest(stored), section, stored.section(record.values).tobytes())
    for said in run(part_of_base, 2, tmp_path, on_base.getvalue()):
        assert "a part of it only" in said
        assert "shiradelta recode" in said


def killed(rank: int, data: bytes, seed: int) -> tuple[bool, str]:
    model = spread("tp")
    base = {name: bits(own(tensor)) for name, tensor in model.state_dict().items()}
    swap = HotSwap(model, timeout=30)
    swap.load("a", data)
    swap.switch("a")
    target = {name: bits(own(tensor)) for name, tensor in model.state_dict().items()}
    swap.revert()
    if rank == 1:
        signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(0, 0.05))
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    said = ""
    for wanted in ["a", None] * 10_000:
        try:
            swap.switch(wanted)
        except TargetError as error:
            said = str(error)
            break
    now = {name: bits(own(tensor)) for name, tensor in model.state_dict().items()}
    expected = target if swap.active else base
    assert all(np.array_equal(now[name], bits_) for name, bits_ in expected.items())
    assert "a rank has ended" in refusal_of(swap.switch, {"a": 0.5})
    swap.revert()
    assert all(np.array_equal(bits(own(tensor)), base[name]) for name, tensor in model.state_dict().items())
    return True, said


def own(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("seed", range(2 if BRIEF else 4))
def test_a_rank_that_is_killed_leaves_base_or_target(seed: int, tmp_path: Path):
    one, two = run(killed, 2, tmp_path, delta(1), seed)
    assert isinstance(two, Ended)
    assert "a rank has ended, or did not answer" in one[1]


def late(rank: int, data: bytes) -> None:
    model = spread("tp")
    base = whole(model)
    swap = HotSwap(model, timeout=1)
    swap.load("a", data)
    if rank == 0:
        assert "did not answer within 1 s" in refusal_of(swap.switch, "a")
    dist.barrier()
    if rank == 1:
        assert "a rank has ended, or did not answer" in refusal_of(swap.switch, "a")
    assert all(np.array_equal(now, base[name]) for name, now in whole(model).items())


def test_a_rank_that_does_not_answer(tmp_path: Path):
    run(late, 2, tmp_path, delta(1))


def patient(rank: int, data: bytes) -> None:
    """Connecting and the first votes: one rank is late for each by more than connecting may take by itself."""
    model = spread("tp")
    groups._LEAST_TO_CONNECT = 0.1
    time.sleep(2 * rank)  # gloo waits a second longer than it is told
    swap = HotSwap(model, timeout=3)
    time.sleep(1 - rank)
    swap.load("a", data)
    swap.switch("a")


def test_a_rank_that_is_late(tmp_path: Path):
    run(patient, 2, tmp_path, delta(1))


class Deadly(dist.Store):
    """The store of a rank that is killed when it has told there where it listens for others to connect."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)
        if not key.startswith("shiradelta/"):
            os.kill(os.getpid(), signal.SIGKILL)

    def wait(self, *arguments: Any) -> None:
        self._store.wait(*arguments)

    def has_extended_api(self) -> bool:
        return False


def connecting(rank: int) -> float:
    model = spread("tp")
    groups._LEAST_TO_CONNECT = 0.1
    stores = dist.distributed_c10d._world.pg_map
    default = dist.distributed_c10d._get_default_group()
    if rank == 1:
        backend, store = stores[default]
        stores[default] = backend, Deadly(store)
    dist.barrier()
    start = time.monotonic()
    assert "a rank has ended, or did not answer within 2 s" in refusal_of(HotSwap, model, timeout=2)
    return time.monotonic() - start


def test_a_rank_that_is_killed_while_others_connect(tmp_path: Path):
    """gloo's own patience is five timeouts, in the ranks to which the killed one was to connect."""
    took = run(connecting, 4, tmp_path)
    assert isinstance(took.pop(1), Ended)
    assert max(took) < 7


def example(rank: int, folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    switching, training, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    os.chdir(folder)
    for block in (switching, training):
        exec(compile(block, "distributed.md", "exec"), {})
    dist.barrier()  # the first process writes
    assert sd.open_delta("trained.shd").nnz


def test_the_examples_of_the_page_run(tmp_path: Path):
    run(example, 2, tmp_path, tmp_path)


def peak() -> int:
    """The most memory that this process has had since `forget_peak`, in bytes: of NumPy, of torch and of C alike."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def forget_peak() -> int:
    """Counts from now on; what the process has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def lean(rank: int, path: Path, gathers: bool) -> int:
    """A weight of 67 MB of which each process has a half: what loading and switching take beside it at most."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    own = torch.ones(4096, 2048).sub_(1)  # written, so that its memory is there
    model = {"w": DTensor.from_local(own, mesh, [Shard(1)], run_check=False)}
    swap = HotSwap(model)
    swap.load("warm", path)
    before = forget_peak()
    report = swap.load("a", path)
    swap.switch("a")
    if gathers:
        model["w"].full_tensor()
    most = peak() - before
    assert own.count_nonzero() > 0.45 * report.nonzeros
    assert report.nbytes < 0.55 * 6 * report.nonzeros  # this process's part of the values and positions
    swap.revert()
    assert not own.any()
    return most


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of memory")
def test_no_process_makes_a_whole_tensor(tmp_path: Path):
    made = random_delta((4096, 4096), 83_886, 1, "float32")
    sd.save_delta(tmp_path / "a.shd", {"w": made})
    for most in run(lean, 2, tmp_path, tmp_path / "a.shd", False):
        assert most < 20e6  # of 67 MB; positions of the nonzeros alone are 0.7 MB
    for most in run(lean, 2, tmp_path, tmp_path / "a.shd", True):
        assert most > 60e6  # a whole tensor is seen


def experts(rank: int, folder: Path, data: bytes, how: dict[str, Any]) -> dict[str, np.ndarray]:
    """Mixtral as transformers distributes it: experts are stacked in memory, and sharded by rows or by expert."""
    import transformers

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    plan = transformers.distributed.DistributedConfig(**how)
    model = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=plan)
    assert hasattr(model.lm_head.weight, "placements")
    stacked = model.model.layers[0].mlp.experts.down_proj
    assert ("ep_size" in how) == (stacked.to_local().shape[0] < stacked.shape[0])
    base = whole(model)
    swap = HotSwap(model)
    assert swap.load("a", data).unchecked == ()
    with sd.open_delta(data) as delta:
        records = {name: tensor.record for name, tensor in delta.items()}
    path = folder / f"of-rank-{rank}.shd"
    damaged = bytearray(data)
    for name, record in records.items():  # what only the other process needs, where experts are shared out
        expert = re.search(r"experts\.(\d+)\.", name)
        if "ep_size" in how and expert is not None and int(expert[1]) != rank:
            damaged[record.index.offset] ^= 1
    assert ("ep_size" in how) == (damaged != data)
    path.write_bytes(damaged)
    assert swap.load("damaged elsewhere", path).nonzeros == swap.loaded["a"].nonzeros
    swap.switch("damaged elsewhere", 0.5)
    swap.switch("a", 0.5)
    now = whole(model)
    swap.revert()
    assert all(np.array_equal(one, base[name]) for name, one in whole(model).items())
    return now


@pytest.mark.parametrize(
    "how",
    [{"tp_plan": "auto"}, {"tp_plan": "auto", "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2}],
    ids=["tp", "tp and experts", "fsdp and experts"],
)
def test_what_transformers_stacks_and_distributes(how: dict[str, Any], tmp_path: Path):
    transformers = pytest.importorskip("transformers", minversion="5.20")
    from tests.hotswap.test_forms import Case, mixtral

    torch.manual_seed(0)
    case = Case(mixtral().to(torch.bfloat16), tmp_path)
    data = case.delta(1)
    one = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    swap = HotSwap(one)
    swap.load("a", data)
    swap.switch("a", 0.5)
    for found in run(experts, 2, tmp_path, tmp_path / "base", data, how):
        for name, tensor in one.state_dict().items():
            assert np.array_equal(found[name], bits(tensor)), name


def bytes_read() -> int:
    """What this process has read from files so far, in bytes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def layers_of(rank: int, count: int) -> dict[str, torch.Tensor]:
    """The layers of a process, of 2 a process, as pipelines share them out."""
    return {f"{layer}.weight": torch.zeros(512, 512) for layer in (2 * rank, 2 * rank + 1)} | {"norm": torch.zeros(64)}


def reads_its_part(rank: int, count: int, path: Path, packed: Path, damaged: Path) -> list[int]:
    model = layers_of(rank, count)
    swap = HotSwap(model, group=dist.group.WORLD, timeout=30)
    swap.load("warm", path)
    read = []
    for number, file in enumerate((path, packed)):
        before = bytes_read()
        swap.load(f"{number}", file)
        read.append(bytes_read() - before)
    mine = damaged if rank == 1 else path  # its damage is in a section of rank 0's
    swap.load("its part is whole", mine)
    swap.switch("its part is whole")
    with sd.open_delta(path) as delta:
        for name, tensor in model.items():
            assert np.array_equal(tensor.numpy(), delta[name].to_dense()), name
    swap.revert()
    assert not any(tensor.any() for tensor in model.values())
    said = refusal_of(swap.load, "damaged", damaged)
    assert "section_checksum" in said, said
    assert said.startswith("FormatError" if rank == 0 else "TargetError: rank 0 refuses"), said
    return read


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not tell what was read")
@pytest.mark.parametrize("count", [2, 4])
def test_sections_of_other_processes_tensors_are_not_read(count: int, tmp_path: Path):
    every = {name: tensor for rank in range(count) for name, tensor in layers_of(rank, count).items()}
    deltas = {
        name: random_delta(tuple(tensor.shape), tensor.numel() // 8, number, "float32")
        for number, (name, tensor) in enumerate(every.items())
    }
    path, packed, damaged = (tmp_path / name for name in ("a.shd", "packed.shd", "damaged.shd"))
    sd.save_delta(path, deltas)
    packed.write_bytes(make_vectors.packed(path.read_bytes(), (0, 0) * len(deltas)))
    content = bytearray(path.read_bytes())
    with sd.open_delta(packed) as delta:
        assert delta.packed
    with sd.open_delta(path) as delta:
        content[delta["0.weight"].record.values.offset + 5] ^= 1
        front = delta["0.weight"].record.index.offset
    damaged.write_bytes(content)
    for own, of_packed in run(reads_its_part, count, tmp_path, count, path, packed, damaged):
        assert own < front + (len(content) - front) / count + 4096
        assert own > 0.9 * len(content) / count
        assert of_packed >= packed.stat().st_size
