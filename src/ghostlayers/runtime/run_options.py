"""How to run, whatever is run."""

from dataclasses import dataclass
from typing import Literal

from ghostlayers.errors import RecipeError
from ghostlayers.runtime.documents import brief
from ghostlayers.runtime.settings import documented, setting

Offload = Literal["auto", "none", "cpu", "disk"]
TypeName = Literal["auto", "float32", "bfloat16", "float16"]

MOST = 10**9
"""Of what is counted: more is a slip, and overflows what counts it further on."""


@documented
@dataclass(frozen=True)
class RunOptions:
    """How to run: nothing here changes a result beyond rounding."""

    dtype: TypeName = setting(
        "auto",
        "Type to compute in; what is written keeps the base model's. 'auto' is the base model's "
        "own, or float32 where a processor multiplies that slowly.",
        variable="GHOSTLAYERS_DTYPE",
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, xpu, ...", variable="GHOSTLAYERS_DEVICE")
    batch_size: int = setting(
        0, "Windows at a time.", least=0, says="about 1,024 tokens; 8,192 on an accelerator"
    )
    trust_remote_code: bool = setting(
        False, "Let the model's own code run. Read it first.", says="off"
    )
    offload: Offload = setting(
        "auto",
        "Where decoder layers lie while they are not needed: 'disk', 'cpu' (beside an accelerator) "
        "or 'none'; 'auto' moves them only if they do not fit.",
    )
    max_memory: str | None = setting(
        None,
        "How much memory the run may take where it computes: 4GiB.",
        metavar="SIZE",
        says="what is free",
        variable="GHOSTLAYERS_MAX_MEMORY",
    )
    preset: str | None = None
    """With dtype ``auto``, the type of this method's code instead of the checkpoint's."""

    def __post_init__(self) -> None:
        if not 0 <= self.batch_size <= MOST:
            raise RecipeError(
                f"'batch_size' must lie between 0 and {MOST:,}, got {brief(self.batch_size)}."
            )
