"""How the processes of a run come together."""

from types import SimpleNamespace

import pytest

from eagle.errors import RequestError
from eagle.train import group


def test_a_launcher_that_names_no_address(monkeypatch):
    """As mpirun does not, where the processes meet by MPI itself."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(group, "_join", lambda: SimpleNamespace(num_processes=2, process_index=1))
    monkeypatch.setattr(group, "_prefix", lambda state: "eagle/1/")
    with pytest.raises(RequestError, match="did not set MASTER_ADDR and MASTER_PORT"), group.meet({"PMI_SIZE": "2"}):
        pass


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [group.TIME_TO_SAY])])
def test_who_is_silent_about_a_refusal_ends_after_who_says_it(monkeypatch, rank, waits):
    """A launcher that sees one process end ends the others, before they have said a word."""

    def choose_kind():
        raise RequestError("the cards")

    slept: list[float] = []
    monkeypatch.setattr(group.device, "choose_kind", choose_kind)
    monkeypatch.setattr(group.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(RequestError, match="the cards"):
        group._join()
    assert slept == waits
