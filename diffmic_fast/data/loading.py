"""Loading of images in batches, by worker processes.

In place of `torch.utils.data.DataLoader`, whose workers pass tensors through /dev/shm: a container has 64 MB of it by
default, and a loader for which this is too little waits for ever. Here each worker writes its batches to a pipe of its
own, whose end is the worker's death: a process that is killed, also in the middle of a batch, is noticed at once.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from diffmic_fast.limits import MAX_WORKERS

_T = TypeVar("_T")


class LoadingError(RuntimeError):
    """A worker process has ended before its work, or could not be started."""


def check_workers(workers: int) -> None:
    """Raise ValueError unless a number of worker processes is in range; warn of many more than processors."""
    if not 0 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers must be from 0 to {MAX_WORKERS}, got {workers}")
    processors = os.cpu_count() or 1
    if workers > 4 * processors:
        warnings.warn(
            f"workers is {workers}, this machine has {processors} processors: as many workers are "
            "enough, and each needs memory",
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
        LoadingError: while iterating: a worker has died.
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
        try:
            for number in range(workers):
                self._start(dataset, batches[number::workers], collate)
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(
            target=self._receive_all, args=(len(batches), pin_memory), daemon=True
        )
        self._thread.start()

    def _start(
        self,
        dataset: Dataset[_T],
        batches: Sequence[Sequence[int]],
        collate: Callable[[list[_T]], Any],
    ) -> None:
        try:
            receiver, sender = multiprocessing.Pipe(duplex=False)
            others = [receiver, *(each for _, each in self._processes)]
            process = multiprocessing.Process(
                target=_work,
                args=(sender, others, dataset, batches, collate),
                daemon=True,
            )
            process.start()
        except OSError as error:
            raise LoadingError(
                f"{len(self._processes)} processes that load images were started, no more: {error}; use fewer workers"
            ) from error
        # The worker alone has this end, which the system closes when it dies.
        sender.close()
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
                batch = _receive(receiver)
                if pin_memory and not isinstance(batch, _Failure):
                    batch = _pinned(batch)
            except (EOFError, OSError):
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
        if hasattr(self, "_thread"):
            self._thread.join()
        for _, receiver in self._processes:
            receiver.close()


class _WorkerTraceback(Exception):
    """The traceback in a worker process, the cause of its error."""


class _Failure(NamedTuple):
    """An error in place of a batch."""

    error: Exception
    cause: _WorkerTraceback | None = None


def _death(process: BaseProcess) -> str:
    """Why a worker's pipe has ended."""
    process.join(5.0)
    code = process.exitcode
    if code is None:
        return "a process that loads images has closed its pipe; use fewer workers, or 0"
    if code >= 0:
        return f"a process that loads images ended with status {code}; 0 workers show its error"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    why = " (memory may have run out)" if -code == signal.SIGKILL else ""
    return f"a process that loads images was ended by {name}{why}; use fewer workers, or 0"


def _pinned(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if isinstance(batch, (tuple, list)):
        return [_pinned(part) for part in batch]
    return batch


# -- messages --------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Takes tensors as the bytes of their values, where torch would move them to shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


class _Message(NamedTuple):
    """An object as bytes: its pickle, and the contents of its arrays."""

    head: memoryview
    contents: list[memoryview]


def _encode(value: Any) -> _Message:
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    return _Message(head.getbuffer(), [buffer.raw() for buffer in buffers])


def _send(sender: Connection, message: _Message) -> None:
    sender.send_bytes(pickle.dumps([content.nbytes for content in message.contents]))
    sender.send_bytes(message.head)
    for content in message.contents:
        written = 0
        while written < content.nbytes:
            written += os.write(sender.fileno(), content[written:])


def _receive(receiver: Connection) -> Any:
    """The object that `_send` has sent.

    Raises:
        EOFError, OSError: the sender has closed its end.
    """
    sizes = pickle.loads(receiver.recv_bytes())
    head = receiver.recv_bytes()
    contents = [np.empty(size, np.uint8) for size in sizes]
    for content in contents:
        # In place: `Connection.recv_bytes` would copy the content three times.
        read = 0
        while read < content.nbytes:
            count = os.readv(receiver.fileno(), [content.data[read:]])
            if not count:
                raise EOFError
            read += count
    return pickle.loads(head, buffers=contents)


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
