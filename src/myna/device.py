"""The hardware: where to compute and in which number format, found by looking and measuring.

Owns the choice of device and dtype with its reason, the rate of matrix products behind it, and
what is known of processors and memory: how much there is, how much is used and how much was used
at most, and the limit under which an allocation fails rather than the process. Loads torch inside
functions only. Placing tensors is left to the callers.
"""

import ctypes
import functools
import gc
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myna.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
CLEARLY_FASTER = 1.5
"""How many times faster bfloat16 has to be than float32 before its rounding is worth it."""

_GIGA = 1e9


@dataclass(frozen=True)
class Compute:
    """Where to compute and in which format the frozen base is held (`torch` names)."""

    device: str
    dtype: str
    reason: str
    """One sentence for the console, with the numbers that decided."""


@dataclass(frozen=True)
class Processor:
    """The CPU as this process may use it."""

    name: str
    physical_cores: int | None
    """None where the system does not tell."""
    allowed_cores: float
    """Logical cores of this process: affinity, and a container's quota where that is less."""


def choose_compute(device: str = "auto", dtype: str = "auto") -> Compute:
    """Settle device and dtype: what was asked for, or what measures best for `auto`.

    `auto` takes CUDA, then mps, then the CPU; bfloat16 where the hardware computes it (on a CPU and
    on mps: where it is more than 1.5 times as fast as float32), float16 only on CUDA cards without
    bfloat16, else float32. Measuring takes some ten milliseconds, once a process.

    Raises ConfigError for a device that is not there and for float16 on a CPU.
    """
    place = _choose_device(device)
    kind = place.partition(":")[0]
    if dtype == "auto":
        chosen, reason = _fastest_cuda(place) if kind == "cuda" else _fastest_measured(place)
        return Compute(place, chosen, reason)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; expected auto, {', '.join(DTYPES)}.")
    if dtype == "float16" and kind == "cpu":
        rates = {name: gemm_rate("cpu", name) / _GIGA for name in DTYPES}
        raise ConfigError(
            f"dtype: float16 on a CPU is refused: one core here does {rates['float16']:,.0f} "
            f"GFLOP/s in it, {rates['float32']:,.0f} in float32 and {rates['bfloat16']:,.0f} in "
            "bfloat16, and small gradients underflow.\n  Use dtype: auto."
        )
    note = ", with loss scaling" if dtype == "float16" else ""
    return Compute(place, dtype, f"{dtype} on {place}, as asked for{note}.")


@functools.cache
def gemm_rate(device: str, dtype: str, *, threads: int = 1) -> float:
    """FLOP/s of a square matrix product, best of the repetitions within some 20 ms.

    On a CPU by one thread unless told otherwise: with several, a busy machine makes them wait for
    each other and the measurement says little about the format. The size doubles until one thread
    takes a millisecond, for a format that is only emulated takes seconds at a fast one's size.
    """
    import torch

    kind = device.partition(":")[0]
    largest = 1024 if kind == "cpu" else 8192
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        size = 128
        while True:
            matrix = torch.full((size, size), 0.5, dtype=getattr(torch, dtype), device=device)
            if min(_seconds(matrix) for _ in range(3)) >= 1e-3 or size >= largest:
                break
            size *= 2
        torch.set_num_threads(threads)
        seconds = _seconds(matrix)
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            seconds = min(seconds, _seconds(matrix))
    finally:
        torch.set_num_threads(threads_before)
    return 2 * size**3 / seconds


def limit_kernel_cache() -> None:
    """Have oneDNN keep few of the kernels that it makes for every new shape; before the first one.

    Each keeps room of the size of its weights, and each step has its own number of tokens: with the
    1,024 that oneDNN keeps unasked, the memory of a run grows for its first dozens of steps
    (`benchmarks/README.md`). A step needs about 70 and makes them in no time worth measuring. What
    the user has set is left.
    """
    if not {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"} & set(os.environ):
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "128"


def environment() -> dict[str, Any]:
    """What the bits of a result depend on beside program and settings, as far as it is known.

    Sums are split among threads, and kernels chosen by the instructions of the processor.
    """
    import torch

    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor().name,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor() -> Processor:
    """Name and cores of the CPU."""
    name, cores = platform.processor() or platform.machine(), set[tuple[str, str]]()
    physical_id = ""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key == "physical id":
                physical_id = value
            elif key == "core id":
                cores.add((physical_id, value))
    allowed = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        allowed = float(len(os.sched_getaffinity(0)))
    return Processor(name, len(cores) or None, min(allowed, _quota()))


def memory_total(device: str = "cpu") -> int:
    """Bytes of memory of the device, or of this container where that is less."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[1])
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_bytes("memory.max", "memory/memory.limit_in_bytes")
    return min(physical, limit) if limit else physical


def memory_available(device: str = "cpu") -> int:
    """Bytes that can still be taken without swapping; on mps they are the computer's."""
    if device.startswith("cuda"):
        import torch

        place = torch.device(device)
        # What torch holds and does not use is free for the next tensor.
        cached = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + cached
    free = memory_total()
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit = _cgroup_bytes("memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup_bytes("memory.current", "memory/memory.usage_in_bytes")
    if limit and used:
        free = min(free, max(limit - used, 0))
    for kind, measure in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free = min(free, max(soft - _process_bytes(measure), 0))
    return free


def memory_in_use(device: str = "cpu") -> int:
    """Bytes that this process uses: the allocator's on CUDA, else resident memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(torch.device(device)))
    return _process_bytes("VmRSS") or _highest_resident()


def free_unused_memory(device: str = "cpu", *, cycles: bool = False) -> None:
    """Hand back to the system what is held and not used.

    torch's allocator on CUDA and glibc's on Linux keep freed memory. Without this the next
    measurement begins with the remains of the last. With `cycles` also what objects that refer to
    each other hold, as after an exception; looking for them takes some tenths of a second.
    """
    if cycles:
        gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


_highest_before_reset = {"cpu": 0}
"""Device -> peak before `peak_memory_within` last set the system's own count back."""


def peak_memory_bytes(device: str = "cpu") -> int:
    """Most memory in use so far: the allocator's on CUDA, else resident memory of the process."""
    if device.startswith("cuda"):
        import torch

        peak = int(torch.cuda.max_memory_allocated(torch.device(device)))
    else:
        # Not the count of getrusage: that begins with the peak of whoever started this process.
        device, peak = "cpu", _process_bytes("VmHWM") or _highest_resident()
    return max(peak, _highest_before_reset.get(device, 0))


class PeakMemory:
    """What `peak_memory_within` hands out."""

    bytes: int = 0
    """Most memory in use inside the block; known when it has ended."""


@contextmanager
def peak_memory_within(device: str = "cpu") -> Iterator[PeakMemory]:
    """Measure the peak of the block, whatever was used before it. Not to be nested.

    CUDA and Linux count it themselves, from a mark that can be set. Elsewhere a thread looks a
    thousand times a second, and a shorter peak is missed.
    """
    found = PeakMemory()
    if device.startswith("cuda"):
        import torch

        place = torch.device(device)
        _highest_before_reset[device] = peak_memory_bytes(device)
        torch.cuda.reset_peak_memory_stats(place)
        yield found
        found.bytes = int(torch.cuda.max_memory_allocated(place))
        return
    before = peak_memory_bytes()
    try:
        # proc(5): 5 sets VmHWM, "high water mark", back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        with _watched(found):
            yield found
        return
    _highest_before_reset["cpu"] = before
    yield found
    found.bytes = _process_bytes("VmHWM")


@contextmanager
def _watched(found: PeakMemory) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            found.bytes = max(found.bytes, memory_in_use())

    watcher = threading.Thread(target=watch, daemon=True)
    found.bytes = memory_in_use()
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def failing_allocations(device: str = "cpu", *, share: float = 0.95) -> Iterator[None]:
    """On a Linux CPU: inside the block malloc fails where the kernel would kill the process.

    Linux promises more memory than there is and ends a process that takes it at its word. Under
    RLIMIT_DATA an allocation beyond `share` of the available memory raises an exception instead,
    which can be answered. The share is less than 1 for what other processes take meanwhile.
    """
    if device != "cpu" or sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _process_bytes("VmData") + int(share * memory_available())
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's allocator for the CPU, C++'s, cuBLAS and mps have no class of their own.
    said = (
        "can't allocate memory",
        "not enough memory",
        "bad_alloc",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "out of memory",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def _highest_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _process_bytes(name: str) -> int:
    """A number of /proc/self/status, 0 where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _choose_device(device: str) -> str:
    import torch

    kind, _, index = device.partition(":")
    if kind == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            built = torch.version.cuda or torch.version.hip
            finding = "torch finds no CUDA device" if built else "this torch is built without CUDA"
            raise ConfigError(
                f"device: {device} was asked for, but {finding} (torch {torch.__version__}).\n"
                "  Use device: auto, or see that nvidia-smi lists the card and install torch for "
                "its CUDA version."
            )
        if index and int(index) >= count:
            raise ConfigError(
                f"device: {device} was asked for, but there are {count} CUDA devices, "
                f"cuda:0 to cuda:{count - 1}."
            )
    elif kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(
                "device: mps was asked for, but it is there only on a Mac with Apple silicon.\n"
                "  Use device: auto."
            )
    elif kind != "cpu":
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or mps.")
    return device


def _name(device: str) -> str:
    if not device.startswith("cuda"):
        return {"cpu": "one core of this CPU", "mps": "this Mac's GPU"}[device]
    import torch

    return torch.cuda.get_device_name(torch.device(device))


def _fastest_cuda(device: str) -> tuple[str, str]:
    import torch

    # Without `including_emulation=False` torch answers yes on cards that take many times as long.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", f"bfloat16: {_name(device)} computes it at full speed."
    return (
        "float16",
        f"float16 with loss scaling: {_name(device)} has no bfloat16.",
    )


def _fastest_measured(device: str) -> tuple[str, str]:
    exact = gemm_rate(device, "float32") / _GIGA
    try:
        rounded = gemm_rate(device, "bfloat16") / _GIGA
    except (RuntimeError, TypeError):  # older systems of Apple have no bfloat16 on mps
        return "float32", f"float32: {_name(device)} has no bfloat16."
    if rounded > CLEARLY_FASTER * exact:
        return (
            "bfloat16",
            f"bfloat16: {rounded:,.0f} GFLOP/s against {exact:,.0f} in float32 on {_name(device)}.",
        )
    return (
        "float32",
        f"float32: {exact:,.0f} GFLOP/s, and bfloat16 has {rounded:,.0f} on {_name(device)}: "
        f"not {CLEARLY_FASTER} times as many.",
    )


def _seconds(matrix: "torch.Tensor") -> float:
    import torch

    device = matrix.device
    start = time.perf_counter()
    matrix @ matrix
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def _quota() -> float:
    """Cores that the container may use, or infinity."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return float(quota) / float(period)  # "max" raises ValueError: no limit
    return float("inf")


def _cgroup_bytes(name: str, older_name: str) -> int:
    """A number of the container's memory accounting, 0 where there is none."""
    for file in (name, older_name):
        with suppress(OSError, ValueError):
            return int(Path("/sys/fs/cgroup", file).read_text())
    return 0
