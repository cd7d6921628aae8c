import os
import re
import resource
import subprocess
import sys
import time

import pytest
import torch

from myna import device
from myna.device import choose_compute, gemm_rate, limit_kernel_cache
from myna.errors import ConfigError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
needs_cpu = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="auto is not the CPU"
)


def test_importing_loads_no_torch():
    code = "import sys, myna.device; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_cpu
def test_auto_takes_the_format_that_measures_clearly_faster():
    chosen = choose_compute()
    exact, rounded = (gemm_rate("cpu", dtype) for dtype in ("float32", "bfloat16"))
    assert chosen.device == "cpu"
    assert chosen.dtype == ("bfloat16" if rounded > 1.5 * exact else "float32")
    # The sentence names the two numbers that decided.
    said = [
        float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?= in | GFLOP)", chosen.reason)
    ]
    assert round(exact / 1e9) in said
    assert chosen.reason.startswith(f"{chosen.dtype}: ")


def test_a_rate_is_that_of_the_product_itself():
    """2 n^3 over the time of torch's own product, in a moment that others leave to both."""
    threads = torch.get_num_threads()
    matrix = torch.full((512, 512), 0.5)
    found = []
    for _ in range(20):
        gemm_rate.cache_clear()
        rate = gemm_rate("cpu", "float32")
        torch.set_num_threads(1)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        torch.set_num_threads(threads)
        found.append(rate / (2 * 512**3 / min(times)))
        if 0.5 < found[-1] < 2:
            return
    pytest.fail(f"never near: {found}")


def test_measuring_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    gemm_rate.cache_clear()
    gemm_rate("cpu", "float32")
    assert torch.get_num_threads() == before


def test_a_choice_is_measured_once():
    gemm_rate("cpu", "bfloat16")
    measured = gemm_rate.cache_info().misses
    gemm_rate("cpu", "bfloat16")
    assert gemm_rate.cache_info().misses == measured


def test_a_wish_is_obeyed():
    chosen = choose_compute("cpu", "bfloat16")
    assert (chosen.device, chosen.dtype) == ("cpu", "bfloat16")
    assert chosen.reason == "bfloat16 on cpu, as asked for."


def test_float16_on_a_cpu_is_refused_with_the_rates():
    with pytest.raises(ConfigError) as caught:
        choose_compute("cpu", "float16")
    assert re.fullmatch(
        r"dtype: float16 on a CPU is refused: one core here does [\d,]+ GFLOP/s in it, [\d,]+ in "
        r"float32 and [\d,]+ in bfloat16, and small gradients underflow\.\n  Use dtype: auto\.",
        str(caught.value),
    )


@no_cuda
def test_a_device_that_is_not_there():
    with pytest.raises(ConfigError) as caught:
        choose_compute("cuda")
    assert str(caught.value).startswith("device: cuda was asked for, but ")
    assert str(caught.value).endswith(
        f"(torch {torch.__version__}).\n  Use device: auto, or see that nvidia-smi lists the card "
        "and install torch for its CUDA version."
    )


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (("tpu", "auto"), "device is 'tpu'; expected auto, cpu, cuda or mps."),
        (("cpu", "int8"), "dtype is 'int8'; expected auto, float32, bfloat16, float16."),
    ],
)
def test_unknown_names(asked, text):
    with pytest.raises(ConfigError) as caught:
        choose_compute(*asked)
    assert str(caught.value) == text


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has mps")
def test_mps_away_from_a_mac():
    with pytest.raises(ConfigError, match=r"mps was asked for, but it is there only on a Mac"):
        choose_compute("mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_takes_bfloat16_where_the_card_has_it():
    chosen = choose_compute()
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert (chosen.device, chosen.dtype) == ("cuda", "bfloat16" if native else "float16")
    torch.ones(1 << 20, device="cuda")
    assert device.peak_memory_bytes("cuda") >= 4 << 20
    assert 0 < device.memory_available("cuda") <= device.memory_total("cuda")
    with pytest.raises(ConfigError, match=r"cuda:99 was asked for, but there are \d+ CUDA dev"):
        choose_compute("cuda:99")


def test_memory_numbers():
    total, available = device.memory_total(), device.memory_available()
    assert 0 < available <= total
    before = device.peak_memory_bytes()
    block = torch.ones(1 << 26)  # 256 MiB, touched
    assert device.peak_memory_bytes() >= min(before, 1 << 26)
    assert device.peak_memory_bytes() > block.numel() * 4


def test_the_processor_has_a_name_and_cores():
    found = device.processor()
    assert found.name
    assert found.allowed_cores > 0
    assert found.physical_cores is None or found.physical_cores > 0


linux = pytest.mark.skipif(sys.platform != "linux", reason="counted by Linux alone")


@linux
def test_the_peak_of_a_block_is_its_own_and_the_process_keeps_its():
    block = torch.ones(1 << 26)  # 256 MiB
    del block
    highest = device.peak_memory_bytes()
    before = device.memory_in_use()
    with device.peak_memory_within() as used:
        inner = torch.ones(1 << 24)  # 64 MiB
        del inner
    assert 60 << 20 < used.bytes - before < 80 << 20
    assert device.peak_memory_bytes() >= highest > used.bytes


def test_where_the_system_keeps_no_mark_a_thread_looks(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(device.Path, "write_text", refuse)
    before = device.memory_in_use()
    with device.peak_memory_within() as used:
        inner = torch.ones(1 << 25)
        time.sleep(0.05)
        del inner
    assert used.bytes - before > 100 << 20


@linux
def test_more_than_there_is_fails_rather_than_the_process():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    there = device.memory_available()
    with device.failing_allocations():
        assert 0.85 * there < device.memory_available() < 0.97 * there
        with pytest.raises(RuntimeError) as caught:
            torch.empty(int(0.99 * there) // 4)
        assert device.is_out_of_memory(caught.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.empty(int(0.9 * there) // 4)  # promised, and never touched


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, answer):
    assert device.is_out_of_memory(error) is answer


def test_the_kernel_cache_is_small_unless_the_user_has_set_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, older = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(ours, "")  # so that it is put back afterwards
    monkeypatch.delenv(ours)
    monkeypatch.setenv(older, "7")
    limit_kernel_cache()
    assert ours not in os.environ
    monkeypatch.delenv(older)
    limit_kernel_cache()
    assert os.environ[ours] == "128"
