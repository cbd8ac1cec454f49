"""Options that several commands share; the command line itself is tested in test_main.py."""

from __future__ import annotations

import gc

import pytest

from starflow.cli.options import collection_off
from starflow.errors import UserError


@pytest.mark.parametrize("was_on", [True, False])
def test_collection_is_off_within_and_as_before_after(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(UserError), collection_off():
            assert not gc.isenabled()
            raise UserError("damaged")
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
