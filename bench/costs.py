"""What a step costs besides time: its peak of memory, its launches, and its host syncs."""

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], object]

# Operators whose result's shape, or whose value on the host, depends on data: a host sync on a GPU.
DATA_DEPENDENT = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    }
)
# Operators that only view or allocate memory; where they do more, they call other operators for it.
_NO_WORK = re.compile(
    "_reshape_alias|alias|as_strided_?|broadcast_tensors|chunk|contiguous|detach_?|(new_)?empty(_like|_strided)?|"
    "expand(_as)?|flatten|lift_fresh|movedim|narrow|permute|reshape|resize_|resolve_(conj|neg)|result_type|select|slice|"
    "split|squeeze_?|swapaxes|t|to|transpose|unbind|unflatten|unsqueeze_?|view(_as)?"
)
_STEP = "the step that is counted"


class Cost(NamedTuple):
    """Of one step, once all is warm.

    peak_mib: the most memory that tensors took at a time, weights, gradients and the optimizer's state among them.
    launches: on a GPU calls of CUDA that give it work (kernels, copies, graphs); on a CPU operators that compute, an
        operation of ours or of torchvision's being one. None where a step is not made of operators.
    host_syncs: on a GPU calls of CUDA that return when the GPU is done; on a CPU operators that would be a host sync,
        torchvision's suppression among them. There `.tolist()` and copies to the host are not counted.

    On a GPU both are None where the profiler recorded nothing.
    """

    peak_mib: float
    launches: int | None
    host_syncs: int | None


class Step(NamedTuple):
    """A step to be measured.

    run: one step as a script takes it; it begins by freeing the gradients of the last.
    padded: the same on padded tensors, without the checks of targets on the host and the resizing of images; of this
        a CPU's operators are counted, as there nothing separates the host's work from the device's.
    model, optimizer: what persists from step to step; no optimizer where nothing is trained.
    in_operators: whether a CPU runs it operator by operator.
    other_bytes: of what else persists, once the step is warm.
    """

    run: Call
    padded: Call
    model: Any
    optimizer: Any
    in_operators: bool = True
    other_bytes: Callable[[], int] = lambda: 0


def measure(build: Callable[[], Step], device: torch.device, warm_up: int = 3) -> tuple[Step, Cost]:
    """Build a step, warm it up and measure its cost."""
    if device.type != "cuda":
        step = build()
        for _ in range(warm_up):
            step.run()
        step.padded()
        launches, host_syncs = count_operators(step.padded)
        return step, Cost(
            (persistent_bytes(step) + peak_bytes(step.run)) / 2**20, launches if step.in_operators else None, host_syncs
        )
    # What an earlier step left would count as this one's.
    gc.collect()
    torch.cuda.synchronize()
    # The memory of a deleted graph is kept until then.
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() + graph_pool_bytes()
    step = build()
    # Meanwhile libraries try algorithms, and a graph is captured: both take more memory than a step.
    for _ in range(warm_up):
        step.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    launches, host_syncs = count_cuda_calls(step.run)
    peak = torch.cuda.max_memory_allocated() + graph_pool_bytes() - before
    return step, Cost(peak / 2**20, launches, host_syncs)


def graph_pool_bytes() -> int:
    """Bytes of the GPU that graphs keep for their tensors, which torch counts as free between two replays."""
    segments = (segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0))
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def count_cuda_calls(call: Call) -> tuple[int, int] | tuple[None, None]:
    """(launches, host syncs) of `call`, from the profiler; (None, None) where it recorded none of CUDA's calls."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        with record_function(_STEP):
            call()
        torch.cuda.synchronize()
    events = profiled.events()
    spans = [event.time_range for event in events if event.name == _STEP and event.device_type.name == "CPU"]
    launches, host_syncs = count_launches_and_syncs(
        event.name for span in spans for event in events if span.start <= event.time_range.start <= span.end
    )
    return (launches, host_syncs) if launches else (None, None)


def count_launches_and_syncs(names: Iterable[str]) -> tuple[int, int]:
    """(launches, host syncs) among the names of calls of CUDA."""
    launches = host_syncs = 0
    for name in names:
        launches += bool(re.match(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)", name))
        # Copies that are not asynchronous are both.
        host_syncs += bool(re.match(r"cu(da)?((Stream|Device|Event|Ctx)Synchronize|Memcpy(?!\w*Async))", name))
    return launches, host_syncs


def count_operators(call: Call) -> tuple[int, int]:
    """How many operators `call` computes with, and how many of them would be a host sync on a GPU."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        call()
    return _count_events([event for event in profiled.events() if event.cpu_parent is None])


def _count_events(events: Sequence[Any]) -> tuple[int, int]:
    computing = syncing = 0
    for event in events:
        namespace, _, name = event.name.rpartition("::")
        if (name in DATA_DEPENDENT and namespace == "aten") or event.name == "torchvision::nms":
            computing, syncing = computing + 1, syncing + 1
        elif re.fullmatch(r"(?!aten::(?!_fused_|_foreach_)|autograd::|profiler::)\w+::\w+", event.name):
            # What an operation of a library or over a list of tensors consists of on a CPU differs from a GPU.
            computing += 1
        else:
            inside = _count_events(event.cpu_children)
            computes = namespace == "aten" and not _NO_WORK.fullmatch(name)
            computing += inside[0] or computes
            syncing += inside[1]
    return computing, syncing


def persistent_bytes(step: Step) -> int:
    """Bytes of the tensors that persist from step to step; gradients are not among them, as a step makes them."""
    states = [value for state in (step.optimizer.state.values() if step.optimizer else ()) for value in state.values()]
    tensors = [*step.model.parameters(), *step.model.buffers(), *filter(torch.is_tensor, states)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return step.other_bytes() + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_bytes(call: Call) -> int:
    """The most bytes that `call` has allocated on the CPU at a time, beyond those allocated before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))
