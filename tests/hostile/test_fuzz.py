"""Drawn at random: the same calls each time, unless `make fuzz` asks for others."""

import os
import warnings

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.detector import check_detector
from tests.hostile.operations import CASES, check_call

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(EXAMPLES or 200),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def fuzz(check, *args):
    @FUZZ
    @given(st.data())
    def run(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(*args, data.draw)

    run()


@pytest.mark.parametrize("name", CASES)
def test_a_call_is_right_or_names_what_is_wrong(name):
    fuzz(check_call, name)


def test_a_detector_is_right_or_names_what_is_wrong():
    fuzz(check_detector)
