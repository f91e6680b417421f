"""Downloads of pretrained weights; without a network they fail within seconds, and the error says how to go on."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

# Seconds in which a server has to answer; libraries try again for minutes.
PROBE_SECONDS = 10.0

_T = TypeVar("_T")


def download(name: str, url: str, load: Callable[[], _T]) -> _T:
    """The result of a function that downloads the weights of the network `name` from `url`, if they are not cached.

    Raises:
        ValueError: the weights cannot be loaded.
    """
    try:
        if not (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file():
            _check_server(url)
        return load()
    except Exception as error:  # of many types: of the network, of the disk, of the library
        raise _unavailable(name, error) from error


def download_with_timm(name: str, load: Callable[[], _T]) -> _T:
    """`download` of a function that uses timm, which finds most weights in the hub of Hugging Face."""
    from huggingface_hub import constants

    try:
        _check_server(constants.ENDPOINT)
    except OSError as error:
        with _offline(constants):  # weights in the hub's cache need no network
            try:
                return load()
            except Exception:
                raise _unavailable(name, error) from error
    try:
        return load()
    except Exception as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"encoder {name!r}: its ImageNet weights cannot be downloaded ({reason}); set model.encoder_weights and "
        "model.guidance_weights to the path of a state dict of the whole network (.pth or .safetensors), or to null to "
        "start from random weights"
    )


def _check_server(url: str) -> None:
    """Raise OSError unless the server of a URL answers in time, directly or through the proxy of the environment."""
    failures: list[Exception] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except Exception as error:
            failures.append(error)

    # In a thread, because the resolution of a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"{url} does not answer in {PROBE_SECONDS:g} seconds")
    if failures:
        raise OSError(str(failures[0])) from failures[0]


@contextmanager
def _offline(constants: Any) -> Iterator[None]:
    """A block in which huggingface_hub uses its cache alone."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
