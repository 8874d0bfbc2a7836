"""Each operation as plain torch operations: the backend "eager", for devices without a kernel.

Differentiable by torch itself, any number of times. The same results as the kernels to the error
rule, in more time and memory.
"""

from torch import Tensor


def widest(x: Tensor) -> Tensor:
    """float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()
