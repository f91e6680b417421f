"""Memory of `diffmic-fast predict` over many images, and its rows after kills: a figure and a row of results.

    make bench RUN="benchmarks.predict_memory --images 100000 --kills 10 --write"

Draws 100 synthetic images, hard-links them to as many names as are asked for, trains a small model for an epoch and
predicts all of them in a process of its own, whose resident memory is sampled. A second prediction is ended by SIGKILL
at `--kills` random moments and started again with --resume. After both every file must have one row, equal to that of
its image in a prediction of the 100.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.harness import RESULTS
from diffmic_fast.data.decode import load_image
from diffmic_fast.data.table import SyntheticImage

SETTINGS = (
    "data.kind=synthetic_fundus", "data.synthetic_size=64", "data.synthetic_per_class=8",
    "data.synthetic_test_per_class=1", "model.classes=5", "model.image_size=64", "model.timesteps=20",
    "model.feature_dim=64", "model.encoder=test_resnet", "model.guidance_trunk=test_resnet", "model.crops=2",
    "model.crop_size=16", "training.guidance_epochs=1", "training.epochs=1", "training.warmup_epochs=1",
    "training.tensorboard=false", "sampling.sampler=ddim", "sampling.steps=5", "sampling.samples=4",
)  # fmt: skip
DISTINCT = 100
BATCH = 64


def make_images(folder: Path, count: int) -> None:
    """`count` names of DISTINCT images, in folders of 1,000."""
    originals = []
    for i in range(min(DISTINCT, count)):
        path = folder.parent / f"original{i:03d}.png"
        Image.fromarray(load_image(SyntheticImage(i % 5, 0, 64, i))).save(path)
        originals.append(path)
    for i in range(count):
        target = folder / f"{i // 1000:04d}" / f"{i:07d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[i % len(originals)], target)


def resident(pid: int) -> int:
    """Resident memory of a process in KiB, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def command(run: Path, images: Path, out: Path) -> list[str]:
    """The command that is measured."""
    program = [sys.executable, "-m", "diffmic_fast", "predict", str(run), str(images)]
    return [*program, "--out", str(out), "--batch-size", str(BATCH), "--threads", "1"]


def measure(
    start: list[str], out: Path, kill_after: float | None
) -> tuple[list[tuple[float, int, int]], int]:
    """Run a command; samples of (seconds, KiB, bytes of `out`), and the exit status."""
    began = time.perf_counter()
    samples = []
    process = subprocess.Popen(start, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        seconds = time.perf_counter() - began
        samples.append((seconds, resident(process.pid), out.stat().st_size if out.exists() else 0))
        if kill_after is not None and seconds > kill_after:
            process.kill()
        time.sleep(0.25)
    return [sample for sample in samples if sample[1]], process.returncode


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check(found: list[dict[str, str]], count: int, expected: list[dict[str, str]]) -> None:
    """Every file has one row, with the class and nearly the numbers of the same image in another run."""
    names = [Path(row["file"]).stem for row in found]
    assert names == [f"{i:07d}" for i in range(count)], "rows are lost, doubled or out of order"
    for row in found:
        other = expected[int(Path(row["file"]).stem) % len(expected)]
        assert row["class"] == other["class"] and row["digest"] == other["digest"]
        for key, value in row.items():
            if key.startswith(("probability_", "spread_")):
                assert abs(float(value) - float(other[key])) < 1e-4, (row["file"], key)


def draw(samples: list[tuple[float, int, int]], total: int, path: Path) -> None:
    """Memory over the rows written."""
    from matplotlib.figure import Figure

    size = max(sample[2] for sample in samples)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="images with a row in the output", ylabel="resident memory, MiB",
        title="diffmic-fast predict --out rows.csv",
    )  # fmt: skip
    axes.plot([s[2] / size * total for s in samples], [s[1] / 1024 for s in samples])
    axes.set_ylim(0, 1.1 * max(axes.get_ylim()))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, check the rows and print a line; with --write keep result and figure."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, run, out = folder / "images", folder / "run", folder / "rows.csv"
        images.mkdir()
        make_images(images, options.images)
        (folder / "empty.yml").write_text("{}\n")
        train = [
            sys.executable,
            "-m",
            "diffmic_fast",
            "train",
            "--config",
            str(folder / "empty.yml"),
        ]
        subprocess.run(
            [*train, "--out", str(run), "--quiet", *(f"--set={s}" for s in SETTINGS)], check=True
        )
        few = folder / "few"
        make_images(few, DISTINCT)
        subprocess.run(command(run, few, folder / "few.csv"), check=True)
        expected = rows(folder / "few.csv")
        began = time.perf_counter()
        samples, status = measure(command(run, images, out), out, None)
        seconds = time.perf_counter() - began
        assert status == 0, status
        check(rows(out), options.images, expected)
        resident_mib = [s[1] / 1024 for s in samples if s[2] > 0]
        first = max(resident_mib[: len(resident_mib) // 4])
        last = max(resident_mib[-len(resident_mib) // 4 :])

        generator = random.Random(options.seed)
        killed = folder / "killed.csv"
        moments = []
        for _ in range(options.kills):
            moments.append(generator.uniform(3.0, 3.0 + seconds / (options.kills + 1)))
            start = command(run, images, killed)
            measure([*start, "--resume"] if killed.exists() else start, killed, moments[-1])
        _, status = measure([*command(run, images, killed), "--resume"], killed, None)
        assert status == 0, status
        check(rows(killed), options.images, expected)
    result = {
        "images": options.images, "seconds": round(seconds, 1), "peak_mib": round(max(s[1] for s in samples) / 1024, 1),
        "first_quarter_mib": round(first, 1), "last_quarter_mib": round(last, 1), "kills": options.kills,
        "kill_seconds": [round(s, 1) for s in moments],
    }  # fmt: skip
    print(json.dumps(result))
    if options.write:
        (RESULTS / "predict_memory.json").write_text(json.dumps(result, indent=1) + "\n")
        draw([s for s in samples if s[2]], options.images, RESULTS / "predict_memory.png")


if __name__ == "__main__":
    main()
