"""All ranks give the same answer although one of them sees the bad value: DDP and FSDP2 over gloo."""

from __future__ import annotations

import pytest
from tests.integrations.scripts.guarded_ranks import one_rank
from tests.ranks import Ranks

KINDS, FAULTS = ("ddp", "fsdp"), ("bad_gradient", "bad_loss", "spoilt")


@pytest.mark.dist
def test_two_ranks_agree(two_ranks: Ranks) -> None:
    two_ranks.run(one_rank, KINDS, FAULTS)


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_agree_on_a_bad_value_of_one() -> None:
    with Ranks(4) as ranks:
        ranks.run(one_rank, ("ddp",), ("bad_gradient", "bad_loss"))


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_agree() -> None:
    with Ranks(4) as ranks:
        ranks.run(one_rank, KINDS, FAULTS)
