"""What strangers do to a port, for a short while each (./run hardening does it for longer, with a table): the daemon goes on serving
others, says truly that it does, and its memory is bounded. How long anything takes is not asked here."""
import pytest

from attacks import ATTACKS
from hardening import daemon_for, pause, under_attack

SECONDS = {"unread_scores": 10}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_hurts_nobody_else(start, name):
    daemon = daemon_for(name, 5, start)
    result = under_attack(name, daemon.pid(), daemon.address, daemon.request([2, 5, 7], 50), SECONDS.get(name, 3), quiet_s=0)
    assert not result["broken"], result
    assert result["attacked"]["streams"] > 0, result
    daemon.expect_idle()


def test_a_pause_does_not_make_an_idle_server_refuse_what_it_can_do(start):
    result = pause(daemon_for("pause", 0, start), 5)
    assert result["attacker"] == dict(stream_tokens=20, answers={"OK": 10}), result
