"""What a step costs besides time: its peak of memory, what it launches, and how often the host waits for it."""

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Call = Callable[[], object]

# Operators whose result's shape, or whose value on the host, depends on data: the host waits for a GPU to know it.
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
# Operators that only name or reserve memory; where they do more, they call others for it.
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
    waits: on a GPU calls of CUDA that return when the GPU is done; on a CPU operators for which the host would wait,
        torchvision's suppression among them. There `.tolist()` and copies to the host are not seen.
    """

    peak_mib: float
    launches: int | None
    waits: int


class Step(NamedTuple):
    """A step to be measured.

    run: one step as a script takes it; it begins by letting go of the gradients of the last.
    padded: the same behind the model's door, where targets are checked on the host, images resized and padded; what a
        CPU's operators are counted of, as there nothing tells the host's work from the device's.
    model, optimizer: what stays from step to step; no optimizer where nothing is trained.
    in_operators: whether a CPU runs it operator by operator.
    others: bytes of what else stays, once it is warm.
    """

    run: Call
    padded: Call
    model: Any
    optimizer: Any
    in_operators: bool = True
    others: Callable[[], int] = lambda: 0


def measured(build: Callable[[], Step], device: torch.device, warm_up: int = 3) -> tuple[Step, Cost]:
    """A step, warmed up, and what it costs."""
    if device.type != "cuda":
        step = build()
        for _ in range(warm_up):
            step.run()
        step.padded()
        launches, waits = operators(step.padded)
        return step, Cost((held(step) + highest(step.run)) / 2**20, launches if step.in_operators else None, waits)
    # Whatever the last step of another left would count as this one's.
    gc.collect()
    torch.cuda.synchronize()
    # What a graph leaves stays its own until then.
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() + kept_by_graphs()
    step = build()
    # Meanwhile libraries try algorithms, and a graph is captured: both take more memory than a step.
    for _ in range(warm_up):
        step.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    launches, waits = cuda_calls(step.run)
    peak = torch.cuda.max_memory_allocated() + kept_by_graphs() - before
    return step, Cost(peak / 2**20, launches, waits)


def kept_by_graphs() -> int:
    """Bytes of the GPU that graphs keep for what they work with, which torch counts as free between two replays."""
    segments = (segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0))
    return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)


def cuda_calls(call: Call) -> tuple[int, int]:
    """How often `call` gives the GPU work, and how often it waits for it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        with record_function(_STEP):
            call()
        torch.cuda.synchronize()
    events = profiled.events()
    (span,) = (event.time_range for event in events if event.name == _STEP and event.device_type.name == "CPU")
    launches, waits = counted_calls(event.name for event in events if span.start <= event.time_range.start <= span.end)
    if not launches:
        raise RuntimeError("the profiler recorded no call of CUDA")
    return launches, waits


def counted_calls(names: Iterable[str]) -> tuple[int, int]:
    """Of the names of CUDA's calls, those that launch and those that wait."""
    launches = waits = 0
    for name in names:
        launches += bool(re.match(r"cu(da)?(Launch|GraphLaunch|Memcpy|Memset)", name))
        # Copies that are not asynchronous launch and wait.
        waits += bool(re.match(r"cu(da)?((Stream|Device|Event|Ctx)Synchronize|Memcpy(?!\w*Async))", name))
    return launches, waits


def operators(call: Call) -> tuple[int, int]:
    """How many operators `call` computes with, and at how many of them the host would wait for a GPU."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        call()
    return _counted([event for event in profiled.events() if event.cpu_parent is None])


def _counted(events: Sequence[Any]) -> tuple[int, int]:
    computing = waiting = 0
    for event in events:
        namespace, _, name = event.name.rpartition("::")
        if (name in DATA_DEPENDENT and namespace == "aten") or event.name == "torchvision::nms":
            computing, waiting = computing + 1, waiting + 1
        elif re.fullmatch(r"(?!aten::(?!_fused_)|autograd::|profiler::)\w+::\w+", event.name):
            # What an operation of a library, or a fused optimizer, is made of on a CPU says nothing of a GPU.
            computing += 1
        else:
            inside = _counted(event.cpu_children)
            computes = namespace == "aten" and not _NO_WORK.fullmatch(name)
            computing += inside[0] or computes
            waiting += inside[1]
    return computing, waiting


def held(step: Step) -> int:
    """Bytes of the tensors that stay from step to step; a step makes its gradients itself."""
    states = [value for state in (step.optimizer.state.values() if step.optimizer else ()) for value in state.values()]
    tensors = [*step.model.parameters(), *step.model.buffers(), *filter(torch.is_tensor, states)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return step.others() + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def highest(call: Call) -> int:
    """Bytes that `call` takes on the CPU at most, beyond what was taken before; that it gives this back is not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(taken, initial=0))
