"""Loading with worker processes: the same batches and errors as without, little shared memory, death of a worker."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.decode import UnreadableImageError
from diffmic_fast.data.loading import LoadingError, in_batches, load_batches
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.transforms import evaluation_transform

SOURCE = Path(__file__).parents[2]


class Numbers(Dataset):
    """Item i has i in an array that is larger than a pipe; indices in `actions` call a function instead."""

    def __init__(self, actions=None, size=50_000):
        self.actions, self.size = actions or {}, size

    def __getitem__(self, index):
        if index in self.actions:
            self.actions[index]()
        return torch.full((self.size,), index, dtype=torch.int32), index


class Unportable(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def kill(signum=signal.SIGKILL):
    return lambda: os.kill(os.getpid(), signum)


def raise_(error):
    def call():
        raise error

    return call


@pytest.mark.filterwarnings("ignore:workers is 9")
@pytest.mark.parametrize("workers", [0, 1, 2, 5, 9])
def test_batches_are_in_order(workers):
    batches = [[3, 1], [4], [1, 5, 9], [], [2, 6]]
    found = list(
        load_batches(Numbers(), batches, workers=workers, collate=lambda items: list(items))
    )
    assert [[index for _, index in batch] for batch in found] == batches
    assert all(bool((values == index).all()) for batch in found for values, index in batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_tensors_that_can_be_written(workers):
    values, indices = next(iter(load_batches(Numbers(), [[1, 2], [3, 4]], workers=workers)))
    assert values.shape == (2, 50_000) and values.dtype == torch.int32
    assert indices.tolist() == [1, 2] and indices.dtype == torch.int64
    values += 1
    assert values[:, -1].tolist() == [2, 3]


def test_no_batches():
    assert list(load_batches(Numbers(), [], workers=2)) == []
    assert in_batches(range(5), 2) == [range(2), range(2, 4), range(4, 5)]


def test_an_empty_tensor_arrives():
    values, _ = next(iter(load_batches(Numbers(size=0), [[1, 2]], workers=1)))
    assert values.shape == (2, 0)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_is_that_of_loading_without_workers(workers):
    error = UnreadableImageError("a/b.png", "it is not an image")
    dataset = Numbers({4: raise_(error), 2: lambda: time.sleep(0.2)})
    batches = load_batches(dataset, in_batches(range(8), 2), workers=workers)
    assert next(batches)[1].tolist() == [0, 1]
    assert next(batches)[1].tolist() == [2, 3]
    with pytest.raises(UnreadableImageError) as caught:
        next(batches)
    assert str(caught.value) == str(error)
    assert (caught.value.path, caught.value.reason) == ("a/b.png", "it is not an image")


def test_an_error_that_cannot_be_passed_on_is_named():
    dataset = Numbers({0: raise_(Unportable("one", "two"))})
    with pytest.raises(LoadingError, match=r"^Unportable: one and two$"):
        list(load_batches(dataset, [[0]], workers=1))


@pytest.mark.parametrize(
    ("signum", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_killed_worker_is_named_within_seconds(signum, name):
    began = time.monotonic()
    with pytest.raises(LoadingError, match=f"ended by {name}.*use fewer workers"):
        list(load_batches(Numbers({5: kill(signum)}), in_batches(range(12), 2), workers=2))
    assert time.monotonic() - began < 10


def test_a_worker_that_exits_is_named():
    with pytest.raises(
        LoadingError, match=r"ended with status 7; run with --workers 0 \(data\.workers=0\)"
    ):
        list(load_batches(Numbers({1: lambda: os._exit(7)}), [[0], [1]], workers=1))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_worker_that_is_killed_within_a_batch_is_named(tmp_path):
    """The pipe is full, and the batch in it incomplete: nobody receives before the worker is dead."""

    def note():
        (tmp_path / "worker").write_text(str(os.getpid()))

    dataset = Numbers({2: note}, size=10_000_000)
    batches = load_batches(dataset, [[0], [1], [2]], workers=1)
    next(batches)
    # Batch 1 waits to be taken, batch 2 is on its way.
    while not (tmp_path / "worker").is_file() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    with pytest.raises(LoadingError, match="SIGKILL"):
        list(batches)


def within(seconds, call):
    """The result of a call, which must not hang."""
    found = []

    def run():
        try:
            found.append((call(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"the call took more than {seconds} s"
    result, error = found[0]
    if error is not None:
        raise error
    return result


@pytest.fixture
def writing_ends_held(monkeypatch):
    """Copies of the writing end of every pipe, as a process has them that another thread forks at the wrong moment."""
    pipe, held = os.pipe, []

    def make():
        reader, writer = pipe()
        held.append(os.dup(writer))
        return reader, writer

    monkeypatch.setattr(os, "pipe", make)
    yield
    for end in held:
        os.close(end)


def test_all_batches_arrive_without_an_end_of_file(writing_ends_held):
    batches = load_batches(Numbers(), [[i] for i in range(7)], workers=3)
    assert [int(index) for _, index in within(30, lambda: list(batches))] == list(range(7))


def test_a_killed_worker_is_named_without_an_end_of_file(writing_ends_held):
    batches = load_batches(Numbers({4: kill()}), [[i] for i in range(9)], workers=2)
    found = []
    with pytest.raises(LoadingError, match="ended by SIGKILL"):
        within(30, lambda: found.extend(int(index) for _, index in batches))
    assert found == [0, 1, 2, 3]


def test_closing_does_not_wait_for_an_end_of_file(writing_ends_held):
    batches = load_batches(Numbers({1: lambda: time.sleep(600)}), [[0], [1]], workers=2)
    next(batches)
    within(30, batches.close)


def test_a_worker_that_cannot_be_started_is_named(monkeypatch):
    started = []

    def start(process):
        if len(started) == 2:
            raise BlockingIOError("no more processes")
        started.append(process)
        begin(process)

    begin = multiprocessing.Process.start
    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with pytest.raises(
        LoadingError,
        match=r"^cannot start worker process 3 of 4: no more processes; use fewer workers \(--workers, data\.workers\)",
    ):
        next(load_batches(Numbers(), [[i] for i in range(100)], workers=4))
    assert len(started) == 2 and not any(process.is_alive() for process in started)


def test_workers_end_if_the_receiving_thread_cannot_be_started(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    before = set(multiprocessing.active_children())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(LoadingError, match=r"can't start new thread; use fewer workers"):
            next(load_batches(Numbers(), [[i] for i in range(100)], workers=2))
    assert set(multiprocessing.active_children()) == before


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_closing_ends_the_workers(tmp_path):
    dataset = Numbers({i: lambda: (tmp_path / str(os.getpid())).touch() for i in range(4)})
    batches = load_batches(dataset, [[i] for i in range(100)], workers=3)
    next(batches), next(batches), next(batches)
    workers = [path.name for path in tmp_path.iterdir()]
    assert len(workers) == 3
    batches.close()
    assert not any(map(running, workers))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_end_with_their_process(tmp_path):
    script = f"""
import os, sys, time
sys.path[:0] = [{str(SOURCE)!r}, {str(Path(__file__).parent)!r}]
from test_loading import Numbers, load_batches
print_pid = lambda: os.write(1, f"{{os.getpid()}} ".encode())
batches = load_batches(Numbers({{0: print_pid, 1: print_pid}}), [[i] for i in range(100)], workers=2)
next(batches), next(batches)
os.write(1, b"\\n")
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        workers = process.stdout.readline().split()
        assert len(workers) == 2
        process.kill()
    until = time.monotonic() + 20
    while any(running(pid.decode()) for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_of_two_threads_end_with_their_process():
    """Workers that inherited each other's pipes would keep them open, and wait for ever to write."""
    script = f"""
import multiprocessing, os, sys, threading, time
sys.path[:0] = [{str(SOURCE)!r}, {str(Path(__file__).parent)!r}]
from test_loading import Numbers, load_batches

pipe = multiprocessing.Pipe

def slow_pipe(**options):
    ends = pipe(**options)
    time.sleep(0.2)
    return ends

def run():
    print_pid = lambda: os.write(1, f"{{os.getpid()}} ".encode())
    loaders.append(load_batches(Numbers({{0: print_pid}}), [[i] for i in range(100)], workers=1))
    next(loaders[-1])

multiprocessing.Pipe = slow_pipe
loaders = []
threads = [threading.Thread(target=run) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
os.write(1, b"\\n")
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
    try:
        until = time.monotonic() + 20
        while any(map(running, workers)):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [-1, 1025, 10**9])
def test_numbers_of_workers_out_of_range_are_named(workers):
    with pytest.raises(ValueError, match=f"workers must be from 0 to 1024, got {workers}"):
        load_batches(Numbers(), [[0]], workers=workers)


def test_more_workers_than_the_machine_can_use_are_reported(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.warns(
        UserWarning, match="workers is 9, this machine has 2 processors: more workers"
    ):
        load_batches(Numbers(), [[0]], workers=9)


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_without_memory_names_the_remedy(shared):
    table = open_source(DataConfig(kind="synthetic_fundus", synthetic_per_class=1))
    with pytest.raises(ValueError, match=r"data.cache: there is no memory for .* data.cache=false"):
        ImageDataset(
            type("Table", (), {"entries": table.entries, "__len__": lambda self: 2**44})(),
            evaluation_transform(224),
            cache=True,
            shared=shared,
        )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_fill_a_shared_cache(tmp_path, method):
    """Also where processes are not forked: then in a file, which is gone at the end."""
    script = f"""
import multiprocessing, os, sys, tempfile
from dataclasses import replace
sys.path.insert(0, {str(SOURCE)!r})
import torch
from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.loading import load_batches
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.transforms import training_transform

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    table = open_source(DataConfig(kind="synthetic_fundus", synthetic_size=40, synthetic_per_class=1))
    plain = ImageDataset(table, training_transform(32), seed=3)
    dataset = ImageDataset(table, training_transform(32), seed=3, cache=True, shared=True)
    for each in (plain, dataset):
        each.set_epoch(2)
    batches = [[4, 2], [0, 1, 3]]
    expected = [images for images, _, _ in load_batches(plain, batches)]
    found = [images for images, _, _ in load_batches(dataset, batches, workers=1)]
    # What a worker has filled in is not read again.
    dataset.transform.prepare = None
    dataset.set_epoch(2)
    again = [dataset[i][0] for batch in batches for i in batch]
    assert all(map(torch.equal, expected, found))
    assert torch.equal(torch.cat(expected), torch.stack(again))
    print(sum(name.startswith("diffmic-cache-") for name in os.listdir(tempfile.gettempdir())))
"""
    (tmp_path / "script.py").write_text(script)
    folder = tmp_path / "temporary"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == (3 if method == "spawn" else 0)
    assert not list(folder.glob("diffmic-cache-*"))  # torch 2.7 leaves a folder of its own


def can_mount():
    tool = shutil.which("unshare")
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return tool is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="/dev/shm cannot be replaced here")
def test_little_shared_memory_is_enough(tmp_path):
    """1 MB in /dev/shm, for batches of 2 MB and a cache of 1.5 MB."""
    script = f"""
import sys
sys.path.insert(0, {str(SOURCE)!r})
from diffmic_fast.config.data import DataConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.loading import load_batches
from diffmic_fast.data.sources import open_source
from diffmic_fast.data.transforms import training_transform
table = open_source(DataConfig(kind="synthetic_fundus", synthetic_size=64, synthetic_per_class=2))
dataset = ImageDataset(table, training_transform(224), cache=True, shared=True)
for epoch in range(2):
    batches = load_batches(dataset, [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]], workers=2)
    print([len(images) for images, _, _ in batches])
"""
    command = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && "{sys.executable}" -c "$0"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, script], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "[4, 2, 4]\n" * 2, result.stderr
