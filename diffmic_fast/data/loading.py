"""Loading of images in batches, by worker processes.

The workers of `torch.utils.data.DataLoader` pass tensors through /dev/shm: a container has 64 MB of it by default, and
a loader that needs more hangs. Here each worker writes its batches to its own pipe. End of file on the pipe means that
the worker has died. Other processes can inherit the writing end and delay the end of file, so the process itself is
watched as well: the death of a worker is noticed within about a second, also in the middle of a batch.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import queue
import signal
import struct
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from diffmic_fast.limits import MAX_WORKERS

_T = TypeVar("_T")
_FEWER = "use fewer workers (--workers, data.workers)"
_WATCH_SECONDS = 1.0

# Held from the creation of a pipe until its writing end is closed in this process, so that workers that another thread
# starts meanwhile do not inherit that end.
_starting = threading.Lock()


def _renew_lock() -> None:
    # In a forked process the lock may be held by a thread that does not exist there.
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class LoadingError(RuntimeError):
    """A worker process has ended before its work, or could not be started."""


def check_workers(workers: int) -> None:
    """Raise ValueError unless a number of worker processes is in range; warn of many more than processors."""
    if not 0 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be from 0 to {MAX_WORKERS}, got {workers}")
    processors = os.cpu_count() or 1
    if workers > 4 * processors:
        warnings.warn(
            f"workers is {workers}, this machine has {processors} processors: more workers than "
            "processors are not faster, and each needs memory",
            stacklevel=3,
        )


def in_batches(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """Indices in batches of `size`, the last of which may be smaller."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def load_batches(
    dataset: Dataset[_T],
    batches: Sequence[Sequence[int]],
    *,
    workers: int = 0,
    collate: Callable[[list[_T]], Any] = default_collate,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """The batches of a data set, in their order.

    Args:
        dataset: with items by index. Worker processes read copies of it, whose changes are lost.
        batches: indices of each batch.
        workers: processes that load batches ahead, at most one per batch; 0 loads each when it is asked for.
        collate: from a list of items to a batch; called by the worker.
        pin_memory: page-lock the tensors of tuples and lists, for faster copies to a GPU.

    Returns:
        An iterator. Closing it, or an error, ends the workers.

    Raises:
        ValueError: `workers` is out of range.
        LoadingError: while iterating: a worker has died or cannot be started.
        Exception: while iterating: what `dataset` or `collate` raises, from a worker as without.
    """
    check_workers(workers)
    return _iterate(dataset, batches, min(workers, len(batches)), collate, pin_memory)


def _iterate(
    dataset: Dataset[_T],
    batches: Sequence[Sequence[int]],
    workers: int,
    collate: Callable[[list[_T]], Any],
    pin_memory: bool,
) -> Iterator[Any]:
    if not workers:
        for batch in batches:
            loaded = collate([dataset[i] for i in batch])
            yield _pinned(loaded) if pin_memory else loaded
        return
    with closing(_Workers(dataset, batches, workers, collate, pin_memory)) as loader:
        for _ in batches:
            yield loader.next()


class _Workers(Generic[_T]):
    """Worker processes, and the thread that receives their batches in order."""

    def __init__(
        self,
        dataset: Dataset[_T],
        batches: Sequence[Sequence[int]],
        workers: int,
        collate: Callable[[list[_T]], Any],
        pin_memory: bool,
    ) -> None:
        self._owner = os.getpid()
        self._processes: list[tuple[BaseProcess, Connection]] = []
        self._stopped = threading.Event()
        # Bounded: each worker also holds a batch that has not been received.
        self._loaded: queue.Queue[Any] = queue.Queue(workers)
        self._thread = threading.Thread(
            target=self._receive_all, args=(len(batches), pin_memory), daemon=True
        )
        try:
            for number in range(workers):
                try:
                    self._start(dataset, batches[number::workers], collate)
                except OSError as error:
                    raise LoadingError(
                        f"cannot start worker process {number + 1} of {workers}: {error}; {_FEWER}"
                    ) from error
            try:
                self._thread.start()
            except RuntimeError as error:
                raise LoadingError(
                    f"cannot start the thread that receives from {workers} worker processes: {error}; {_FEWER}"
                ) from error
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        dataset: Dataset[_T],
        batches: Sequence[Sequence[int]],
        collate: Callable[[list[_T]], Any],
    ) -> None:
        """Start a worker.

        Raises:
            OSError: the system has no process, memory or file descriptor for it.
        """
        with _starting:
            receiver, sender = multiprocessing.Pipe(duplex=False)
            # Only the worker keeps the writing end.
            with sender:
                others = [receiver, *(each for _, each in self._processes)]
                process = multiprocessing.Process(
                    target=_work, args=(sender, others, dataset, batches, collate), daemon=True
                )
                try:
                    process.start()
                except BaseException:
                    receiver.close()
                    raise
        os.set_blocking(receiver.fileno(), False)
        self._processes.append((process, receiver))

    def next(self) -> Any:
        """The next batch."""
        batch = self._loaded.get()
        if isinstance(batch, _Failure):
            raise batch.error from batch.cause
        return batch

    def _receive_all(self, count: int, pin_memory: bool) -> None:
        for number in range(count):
            process, receiver = self._processes[number % len(self._processes)]
            try:
                batch = _receive(process, receiver)
                if pin_memory and not isinstance(batch, _Failure):
                    batch = _pinned(batch)
            except _WorkerEnded:
                batch = _Failure(LoadingError(_death(process)))
            except Exception as error:
                batch = _Failure(error)
            while not self._stopped.is_set():
                try:
                    self._loaded.put(batch, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stopped.is_set() or isinstance(batch, _Failure):
                return

    def close(self) -> None:
        """End the workers."""
        if os.getpid() != self._owner:  # a copy in a forked process
            return
        self._stopped.set()
        for process, _ in self._processes:
            process.kill()  # they only read; SIGTERM may be blocked by a decoder
        for process, _ in self._processes:
            process.join()
        if self._thread.is_alive():
            self._thread.join()
        for _, receiver in self._processes:
            receiver.close()


class _WorkerTraceback(Exception):
    """The traceback in a worker process, the cause of its error."""


class _WorkerEnded(Exception):
    """A worker has died before the message that is being received was complete."""


class _Failure(NamedTuple):
    """An error in place of a batch."""

    error: Exception
    cause: _WorkerTraceback | None = None


def _death(process: BaseProcess) -> str:
    """Why a worker's pipe has ended."""
    process.join(5.0)
    code = process.exitcode
    if code is None:
        return f"a process that loads images has closed its pipe; {_FEWER}, or 0"
    if code >= 0:
        return (
            f"a process that loads images ended with status {code}; run with --workers 0 (data.workers=0) to see its "
            "error"
        )
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = " (memory may have run out)" if -code == signal.SIGKILL else ""
    return f"a process that loads images was ended by {name}{why}; {_FEWER}, or 0"


def _pinned(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if isinstance(batch, (tuple, list)):
        return [_pinned(part) for part in batch]
    return batch


# -- messages --------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Serialises tensors by value, where torch would move them to shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _encode(value: Any) -> list[memoryview]:
    """The parts of a message: the pickle of an object, and the contents of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    return [head.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _send(sender: Connection, parts: Sequence[memoryview]) -> None:
    """Write the number of parts, the size of each in bytes, and the parts."""
    sizes = struct.pack(f"={1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts))
    for part in (memoryview(sizes), *parts):
        written = 0
        while written < part.nbytes:
            written += os.write(sender.fileno(), part[written:])


def _receive(process: BaseProcess, receiver: Connection) -> Any:
    """The object that a worker has sent by `_send`.

    Raises:
        _WorkerEnded: the worker is dead, and nothing more is in its pipe.
    """
    (count,) = struct.unpack("=Q", _read(process, receiver, 8))
    sizes = struct.unpack(f"={count}Q", _read(process, receiver, 8 * count))
    head, *contents = [_read(process, receiver, size) for size in sizes]
    return pickle.loads(head, buffers=contents)


def _read(process: BaseProcess, receiver: Connection, size: int) -> memoryview:
    # In place: `Connection.recv_bytes` would copy the content three times.
    content = np.empty(size, np.uint8).data
    read = 0
    while read < size:
        try:
            count = os.readv(receiver.fileno(), [content[read:]])
        except BlockingIOError:
            _wait_for_data(process, receiver)
            continue
        if not count:
            raise _WorkerEnded
        read += count
    return content


def _wait_for_data(process: BaseProcess, receiver: Connection) -> None:
    """Wait until the pipe of a worker has data or has ended.

    Raises:
        _WorkerEnded: the worker is dead and the pipe empty. Without an end of file, too: a process that another thread
            has forked can hold copies of the worker's writing ends, that of its sentinel included.
    """
    while not wait([receiver, process.sentinel], _WATCH_SECONDS) and process.is_alive():
        pass
    # A dead worker may have written before its death.
    if not receiver.poll():
        raise _WorkerEnded


# -- in a worker -----------------------------------------------------------------------------------


def _work(
    sender: Connection,
    others: Sequence[Connection],
    dataset: Dataset[_T],
    batches: Sequence[Sequence[int]],
    collate: Callable[[list[_T]], Any],
) -> None:
    # Copies, which would keep the pipes open when the process that receives is gone.
    for receiver in others:
        receiver.close()
    # A terminal sends Ctrl-C to all processes, and the one that uses the batches decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        for batch in batches:
            try:
                message = _encode(collate([dataset[i] for i in batch]))
            except Exception as error:
                cause = _WorkerTraceback(traceback.format_exc())
                _send(sender, _encode(_Failure(_portable(error), cause)))
                return
            _send(sender, message)
    except BrokenPipeError:  # nobody reads any more
        return


def _portable(error: Exception) -> Exception:
    """`error`, if another process can raise it, else a LoadingError with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is type(error) and str(copy) == str(error):
        return error
    return LoadingError(f"{type(error).__name__}: {error}")
