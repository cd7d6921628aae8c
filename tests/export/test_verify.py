"""The comparison of logits, by hand."""

import math

import pytest
import torch

from myna.errors import ConfigError
from myna.export.verify import Agreement, compare, refuse_disagreement

BITS = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))


def test_divergence_by_hand() -> None:
    other = torch.log(torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.25, 0.5]]))
    found = compare([BITS, BITS + 7], [other, BITS], torch.float32)
    # 0.5 ln 2 + 0.25 ln 1 - 0.25 ln 2 at one position of four; a constant changes nothing.
    assert found.largest_kl == pytest.approx(0.25 * math.log(2))
    assert found.mean_kl == pytest.approx(0.25 * math.log(2) / 4)
    assert (found.texts, found.positions) == (2, 4)
    assert found.largest_difference == pytest.approx(7.0)
    assert str(found) == (
        "4 positions of 2 texts in float32: KL divergence 4.3e-02 in the mean, 1.7e-01 at most; "
        "logits differ by 7.0e+00 at most"
    )


def test_what_is_no_number_is_refused() -> None:
    broken = BITS.clone()
    broken[1, 1] = torch.nan
    with pytest.raises(ConfigError, match="KL divergence nan in the mean, nan at most"):
        refuse_disagreement(compare([BITS], [broken], torch.float32), torch.bfloat16)


@pytest.mark.parametrize(
    ("stored", "compared_in", "passes"),
    [
        (torch.float32, torch.float32, False),
        (torch.float16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_the_coarser_format_decides(stored, compared_in, passes) -> None:
    agreement = Agreement(8, 100, 1e-3, 5e-2, 0.1, compared_in)
    if passes:
        refuse_disagreement(agreement, stored)
        return
    with pytest.raises(ConfigError) as caught:
        refuse_disagreement(agreement, stored)
    assert ("--dtype float32" in str(caught.value)) == (stored != torch.float32)
