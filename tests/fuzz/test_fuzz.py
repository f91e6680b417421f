"""A share of the fuzzing (`python -m tests.fuzz` runs the rest), and every input that once found a fault."""

import resource
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.mutation import mutate
from tests.fuzz.targets import TARGETS

INPUTS = 170  # each: over a thousand in all
SECONDS = 10
MEBIBYTES = 1024
FOUND = Path(__file__).parent / "found"


@pytest.fixture
def guarded():
    """An alarm for inputs that hang, and a limit of the memory that all of them take."""

    def late(*_: object) -> None:
        raise AssertionError(f"an input took more than {SECONDS} seconds")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEBIBYTES * 1024, f"inputs took {grown // 1024} MiB"


def read(name, path, content):
    """Whether the target accepts the content."""
    path.write_bytes(content)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name].read(path)
    except (ValueError, OSError) as error:
        assert str(error).strip(), "an error without a message"
        return False
    finally:
        signal.alarm(0)
    return True


@pytest.mark.parametrize("name", TARGETS)
def test_any_content_is_read_or_rejected_with_an_error(name, tmp_path, guarded):
    target = TARGETS[name]
    seeds = target.seeds()
    path = tmp_path / f"input{target.suffix}"
    rng = np.random.default_rng(sorted(TARGETS).index(name))
    accepted = 0
    for number in range(INPUTS):
        content = mutate(seeds, rng)
        try:
            accepted += read(name, path, content)
        except Exception as error:
            kept = tmp_path / f"fault-{number}{target.suffix}"
            kept.write_bytes(content)
            raise AssertionError(f"input {number} ({kept}): {type(error).__name__}") from error
    assert accepted < INPUTS  # changes were made


@pytest.mark.parametrize("name", TARGETS)
def test_some_seed_is_accepted_whole(name, tmp_path):
    target = TARGETS[name]
    path = tmp_path / f"input{target.suffix}"
    assert any(read(name, path, seed) for seed in target.seeds())


@pytest.mark.parametrize(
    "path", sorted(FOUND.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_an_input_that_once_found_a_fault(path, tmp_path, guarded):
    name = path.parent.name
    read(name, tmp_path / f"input{TARGETS[name].suffix}", path.read_bytes())
