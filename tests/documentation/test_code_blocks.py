"""Every block of code of README.md, CONTRIBUTING.md and docs/ is checked, and those that can be are executed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cuda_backends import restore_emulator
from documented_code import SMALL, SOURCE, blocks, check, commands, pages, run, small
from PIL import Image

from diffmic_fast import DiffMICConfig, models
from diffmic_fast.checkpoint import load_model
from diffmic_fast.cli import main
from diffmic_fast.config import run as config_run

pytestmark = pytest.mark.skipif(
    not (SOURCE / "README.md").is_file(), reason="README.md is not beside the tests"
)

# Blocks with the comment `<!-- not executed: REASON -->`.
NOT_EXECUTED = 2
FINDINGS = ("covid", "none", "pneumonia")
FAST = {"README.md"}
# This page's blocks need the emulator.
EMULATED = "docs/emulator.md"


def executed(page: str) -> bool:
    """Whether a page has blocks that `run` executes."""
    return any(
        block.reason is None
        and (
            block.language in {"python", "yaml"}
            or (block.language == "sh" and "diffmic-fast " in block.code)
        )
        for block in blocks(page)
    )


@pytest.mark.parametrize("page", pages() if (SOURCE / "README.md").is_file() else ())
def test_blocks_name_what_exists(page: str) -> None:
    for block in blocks(page):
        try:
            check(block)
        except (ValueError, SyntaxError, yaml.YAMLError, SystemExit) as error:
            pytest.fail(f"{page}:{block.line}: {error}")


def test_few_blocks_are_not_executed() -> None:
    reasons = [block.reason for page in pages() for block in blocks(page) if block.reason]
    assert len(reasons) == NOT_EXECUTED, reasons


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```sh\ndiffmic-fast train --config demo\n```", SystemExit),
        ("```sh\ndiffmic-fast evaluat runs/demo\n```", SystemExit),
        ("```sh\ntorchrun -m diffmic_fast train --out a --no-such\n```", SystemExit),
        ("```sh\npip install '.[everything]'\n```", ValueError),
        ("```sh\nmake tests\n```", ValueError),
        ('```sh\nmake bench RUN="benchmarks.no_such"\n```', ValueError),
        ("```sh\nA=1 python -m benchmarks.traffic --writes\n```", ValueError),
        ("```sh\nls && cp a b\n```", ValueError),
        ("```python\nmodel.predict(images))\n```", SyntaxError),
        ("```yaml\ndata: {kind: folder, rot: images}\n```", ValueError),
        ("```yaml\ndata: {kind: folder\n```", yaml.YAMLError),
        ("```\ndiffmic-fast info\n```", ValueError),
        ("    diffmic-fast info", ValueError),
        ("```text\ndiffmic-fast info\n```", ValueError),
    ],
)
def test_faults_in_blocks_are_found(text: str, error: type[Exception]) -> None:
    (block,) = blocks("page.md", text)
    with pytest.raises(error):
        check(block)


def test_a_marker_belongs_to_the_next_block_alone() -> None:
    text = "<!-- not executed: no GPU -->\n```sh\nls\n```\n\n```sh\nmake test\n```\n"
    assert [block.reason for block in blocks("page.md", text)] == ["no GPU", None]
    text = "<!-- not executed: no GPU -->\n\nText.\n\n```sh\nls\n```\n"
    assert [block.reason for block in blocks("page.md", text)] == [None]


def test_commands_of_a_block() -> None:
    code = "A=1 make \\\n  test   # all\n\npip install -e '.[test,dev]' && pytest\n"
    assert list(commands(code)) == [
        ["make", "test"],
        ["pip", "install", "-e", ".[test,dev]"],
        ["pytest"],
    ]


@pytest.fixture(scope="module")
def small_presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The presets with small models."""
    folder = tmp_path_factory.mktemp("presets")
    for name in config_run.presets():
        values = yaml.safe_load((config_run._PRESETS / f"{name}.yml").read_text())
        (folder / f"{name}.yml").write_text(yaml.safe_dump(small(values)))
    return folder


def _draw(path: Path, level: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(level, level + 60, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_presets: Path) -> Path:
    """What the pages begin with: images, trained runs, and files of the published program's format."""
    root = tmp_path_factory.mktemp("documented")
    rows = ["file,label,fold"]
    for label, finding in enumerate(FINDINGS):
        for number in range(20):
            rows.append(f"{finding}{number}.png,{finding},{number % 4}")
            _draw(root / f"data/chest_xray/{finding}{number}.png", 80 * label, number)
        for number in range(8):
            _draw(root / f"clinic/{finding}/{number}.png", 80 * label, 100 + number)
    (root / "data/chest_xray/folds.csv").write_text("\n".join(rows))
    for label, name in enumerate(("benign", "malignant")):
        for number in range(30):
            _draw(root / f"photos/{name}/{number}.png", 120 * label, number)
    for number, path in enumerate(
        ("IMAGES/a.png", "images/a.png", "images/b.png", "left.png", "right.png")
    ):
        _draw(root / path, 90, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(config_run, "_PRESETS", small_presets)
        assert (
            main(["train", "--config", "chest_xray_small", "--out", "runs/chest", "--quiet"]) == 0
        )
        assert main(["train", "--config", "demo", "--out", "runs/demo", "--quiet"]) == 0
        assert main(["convert", "runs/demo", "ckpt.pth", "--to", "published"]) == 0
        assert main(["convert", "runs/chest", "retina"]) == 0
    shutil.copy(root / "runs/demo/config.yml", root / "CONFIG")
    return root


# What a page's commands write themselves.
MADE = {
    "README.md": ("runs/demo",),
    "docs/start.md": ("runs/demo",),
    "docs/usage.md": ("runs/chest", "retina"),
}


def names_of(page: str, folder: Path) -> dict[str, Any]:
    """What the Python of a page uses and does not define."""
    if page != "docs/usage.md":
        return {}
    paths = sorted(str(path) for path in (folder / "clinic").glob("*/*.png"))
    return {
        "paths": paths,
        "grades": [Path(path).parent.name for path in paths],
        "others": paths[:3],
    }


def execute(page: str, folder: Path) -> None:
    """Execute the blocks of a page in the folder."""
    for name in MADE.get(page, ()):
        shutil.rmtree(folder / name)
    names = names_of(page, folder)
    for block in blocks(page):
        run(block, names)


def _small_config(**values: Any) -> DiffMICConfig:
    sizes = {
        key: value
        for key, value in SMALL["model"].items()
        if key not in {"image_size", "crop_size"}
    }
    return DiffMICConfig(**{**sizes, **values})


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page in FAST else pytest.mark.slow)
        for page in (pages() if (SOURCE / "README.md").is_file() else ())
        if executed(page) and page != EMULATED
    ],
)
def test_blocks_run(
    page: str, folder: Path, small_presets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, with small models."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_run, "_PRESETS", small_presets)
    monkeypatch.setattr(models, "DiffMICConfig", _small_config)
    execute(page, tmp_path)


@pytest.mark.emulated
def test_blocks_of_the_emulator_run() -> None:
    try:
        for block in blocks(EMULATED):
            if block.language == "python":
                run(block, {})
    finally:
        restore_emulator()


def test_a_run_stops_at_a_failing_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("page.md", "```sh\ndiffmic-fast predict nothing images/\n```")
    with pytest.raises(AssertionError, match=r"page\.md:1: predict nothing images/"):
        run(block, {})


def test_loaded_models_are_small(folder: Path) -> None:
    model, class_names = load_model(folder / "runs/chest/ckpt.pth")
    assert model.config.feature_dim == 16 and class_names == FINDINGS and model.calibration
