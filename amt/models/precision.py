"""The arithmetic of a command: how exact products are, and whether a GPU repeats its bits.

All that PyTorch keeps for the whole process is set here, and nowhere else: TF32 of matrix products and of
convolutions (cuDNN's own default computes convolutions in TF32), the choice of kernels, and those of
attention. Imports torch only when it is used.
"""

import dataclasses
import os
import warnings
from typing import TYPE_CHECKING, Any

from meta_dataset_readers.errors import InputError
from meta_dataset_readers.settings import setting

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "tf32", "bf16", "fp16")
_NOTED = {"float32": "None", "tf32": "tf32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # of these cuBLAS repeats its bits


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a command computes."""

    precision: str = setting(
        "float32",
        "float32; tf32: products of float32 rounded to 10 bits, on a GPU; bf16, fp16: mixed precision "
        "(default: float32)",
        choices=PRECISIONS,
    )
    deterministic: bool = setting(
        False, "on a GPU: only kernels that repeat their bits, and no memory-efficient attention; slower"
    )

    @property
    def autocast(self) -> "torch.dtype | None":
        """The dtype of mixed precision, see `Network`; None without."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    @property
    def noted(self) -> str:
        """The precision as the field `autocast` of run.json has always called it."""
        return _NOTED[self.precision]

    @property
    def exact(self) -> "Arithmetic":
        """The same in float32."""
        return dataclasses.replace(self, precision="float32")

    def use(self) -> None:
        """Compute so from now on, in this process; before anything is done on a GPU. Raises InputError where
        the environment asks cuBLAS for what does not repeat its bits."""
        import torch

        if self.deterministic and os.environ.setdefault(_WORKSPACE, _WORKSPACES[0]) not in _WORKSPACES:
            raise InputError(
                f"--deterministic: {_WORKSPACE} is {os.environ[_WORKSPACE]!r} in the environment, expected "
                f"{' or '.join(_WORKSPACES)}"
            )
        tf32 = self.precision == "tf32"
        with warnings.catch_warnings():
            # Some versions call these names old; whoever reads them, torch.compile too, fails over the new.
            warnings.simplefilter("ignore")
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True  # of convolutions, which cost little
        torch.use_deterministic_algorithms(self.deterministic)
        torch.backends.cuda.enable_mem_efficient_sdp(not self.deterministic)
        torch.backends.cuda.enable_cudnn_sdp(not self.deterministic)


def in_use() -> dict[str, str | bool]:
    """What PyTorch says of the arithmetic of this process, for run.json."""
    import torch

    backends: Any = torch.backends

    def called(precision: str) -> str:
        return "tf32" if precision == "tf32" else "float32"

    return {
        "matrix_products": called(backends.cuda.matmul.fp32_precision),
        "convolutions": called(backends.cudnn.conv.fp32_precision),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
