"""The NVIDIA GPUs of this machine, asked of the driver itself: no CUDA toolkit and no framework needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from instantrt.compiler.target import TARGETS, loads_rtx

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    name: str
    sm: int


@cache
def gpus() -> tuple[Gpu, ...]:
    """All GPUs, in the driver's order; none where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(driver, ordinal) for ordinal in range(count.value))


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    return Gpu(name.value.decode("utf-8", "replace"), 10 * major.value + minor.value)


def describe() -> str:
    """What this machine has, in words."""
    found = gpus()
    return ", ".join(f"{gpu.name} (sm{gpu.sm})" for gpu in found) if found else "no NVIDIA GPU"


def no_rtx_here() -> str:
    """That none of this machine's GPUs loads an engine of TensorRT-RTX, and the way out; "" where one does, or none is.

    The runtime says so, too, but in its log.
    """
    sms = sorted({gpu.sm for gpu in gpus()})
    if not sms or any(map(loads_rtx, sms)):
        return ""
    kits = [
        f"compile for {t.name} instead, and finish the build kit here: pip install 'tensorrt{t.tensorrt}'"
        for t in TARGETS
        if t.sm in sms
    ]
    return "; ".join([f"no engine of TensorRT-RTX loads on {', '.join(f'sm{sm}' for sm in sms)}", *kits])
