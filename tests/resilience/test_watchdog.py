"""A rank that hangs ends itself and says where; one whose peer is gone says so, and lets the other end
first.
"""

from __future__ import annotations

import pytest

from tests.ranks import python
from visft_ds.errors import LostRank
from visft_ds.resilience import watchdog
from visft_ds.resilience.watchdog import Watchdog

HANGS = """
import time
from visft_ds.resilience.watchdog import Watchdog
with Watchdog(1, 0.8).watching() as dog:
    with dog.phase("evaluating", timed=False):
        time.sleep(1.2)
    with dog.phase("step 7: reading"):
        time.sleep(600)
"""


def test_no_progress_ends_the_process_with_its_stacks() -> None:
    printed = python("-c", HANGS, code=3)
    assert "[rank 1] stopped: no progress for" in printed and "step 7: reading" in printed
    assert "most recent call first" in printed and 'File "<string>", line 8' in printed


@pytest.mark.parametrize(
    "said", ["Connection closed by peer [127.0.0.1]:4242", "Timed out waiting 1800000ms for recv"]
)
def test_a_lost_peer_is_told_with_the_phase(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(watchdog, "_AFTER_YOU", 0.0)
    dog = Watchdog(0, 0.0)

    def lose() -> None:
        with dog.watching():
            with dog.phase("step 3: saving"):
                raise RuntimeError(said)

    with pytest.raises(LostRank, match="step 3: saving"):
        lose()
