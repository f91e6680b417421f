"""A training run that is killed repeatedly, at arbitrary moments."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_run, flat, rows

from diffmic_fast.checkpoint import read_checkpoint
from diffmic_fast.training import run_folder
from diffmic_fast.training.trainer import Trainer

KILLS = 20

# Imports once and then forks, before PyTorch has started a thread: a run starts in less than a second. A third of the
# kills come after some steps, a third while a checkpoint is being written, a third right after one was written.
PROGRAM = """
import os, pickle, random, signal, sys, time
from pathlib import Path
import torch
from diffmic_fast.training.trainer import Trainer

torch.set_num_threads(1)
config, out, kills = pickle.load(sys.stdin.buffer)
path = Path(out) / "ckpt.pth"
moments = random.Random(5)

def start():
    steps, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        return child, steps
    code = 1
    try:
        resume = path if path.exists() else None
        Trainer(config, out, quiet=True, resume=resume, on_step=lambda *_: os.write(told, b".")).fit()
        code = 0
    finally:
        os._exit(code)

def written():
    return path.stat().st_mtime_ns if path.exists() else 0

def wait_for(happened):
    end = time.monotonic() + 10
    while not happened() and time.monotonic() < end:
        time.sleep(0.0002)

checkpoints = set()
for number in range(kills):
    before = written()
    checkpoints.add(before)
    child, steps = start()
    for _ in range(moments.randint(1, 3) if number % 3 == 0 else 1):
        assert os.read(steps, 1), "the training ended before it was killed"
    if number % 3 == 0:
        time.sleep(moments.uniform(0.0, 0.05))
    elif number % 3 == 1:
        wait_for(lambda: any(Path(out).glob(".ckpt.pth.*")))
    else:
        wait_for(lambda: written() != before)
        time.sleep(moments.uniform(0.0, 0.005))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    os.close(steps)
print(len(checkpoints))
child, steps = start()
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_do_not_change_the_result(config, tmp_path: Path) -> None:
    training = dataclasses.replace(config.training, epochs=9)
    config = dataclasses.replace(config, training=training)
    unbroken, out = tmp_path / "unbroken", tmp_path / "killed"
    for folder, kills in ((unbroken, 0), (out, KILLS)):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=pickle.dumps((config, str(folder), kills)),
            capture_output=True,
        )
        assert result.returncode == 0, result.stderr.decode()
    # It resumed from many checkpoints.
    assert int(result.stdout) >= KILLS // 3
    assert len(rows(out)) == 10
    assert_same_run(unbroken, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in unbroken.iterdir()}
    for name in ("aux_ckpt.pth", "ckpt_best.pth", "aux_ckpt_best.pth"):
        one, other = (flat(torch.load(p / name, weights_only=True)) for p in (unbroken, out))
        tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
        assert tensors and all(torch.equal(one[key], other[key]) for key in tensors), name


@pytest.mark.parametrize("moment", ["before the best was kept", "after the next guidance file"])
def test_a_resumed_run_keeps_the_best_checkpoint(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed after the checkpoint of the best epoch: that one and its guidance file are kept, nothing half-written."""

    def die(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "keep_copy", die)
        with pytest.raises(RuntimeError, match="killed"):
            Trainer(config, tmp_path, quiet=True).fit()
    assert not (tmp_path / "ckpt_best.pth").exists()
    (tmp_path / ".ckpt.pth.abc.tmp").write_bytes(b"half")
    saved = read_checkpoint(tmp_path / "ckpt.pth")
    if moment == "after the next guidance file":
        guidance, optimizer = torch.load(tmp_path / "aux_ckpt.pth", weights_only=True)
        changed = {key: value + 1 for key, value in guidance.items()}
        torch.save([changed, optimizer], tmp_path / "aux_ckpt.pth")

    def stop(epoch: int, step: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Trainer(config, tmp_path, quiet=True, resume=tmp_path / "ckpt.pth", on_step=stop).fit()
    best = read_checkpoint(tmp_path / "ckpt_best.pth")
    assert best.step == saved.step
    assert all(torch.equal(value, best.denoiser[key]) for key, value in saved.denoiser.items())
    guidance, _ = torch.load(tmp_path / "aux_ckpt_best.pth", weights_only=True)
    assert all(torch.equal(v, guidance[key]) for key, v in saved.extras["guidance"].items())
    assert not list(tmp_path.glob(".*.tmp"))
