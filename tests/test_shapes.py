"""Shapes that annotations speak of are checked while tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from ghostlayers.statistics import moments


@pytest.mark.parametrize("target", [torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(3, 4).int()])
def test_what_is_no_stream_behind_a_stream_is_caught(target: torch.Tensor) -> None:
    with pytest.raises(TypeCheckError, match="'target'"):
        moments.update(moments.empty(4, 4), torch.zeros(3, 4), target)
