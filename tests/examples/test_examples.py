"""The examples, executed with small data; their results are compared with the package's own."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffmic_fast import DiffMIC, DiffMICConfig
from diffmic_fast.checkpoint import load_model
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.synthetic_fundus import GRADES
from diffmic_fast.diffusion import make_schedule, make_steps
from diffmic_fast.ops.denoise import denoise

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "from_images_to_report.ipynb"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def example(name: str) -> ModuleType:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finite(rows: list[dict[str, str]], column: str) -> list[float]:
    """The numbers of a column, which are finite; fields may be empty."""
    values = [float(row[column]) for row in rows if row[column]]
    assert all(map(math.isfinite, values))
    return values


def assert_trained(model: DiffMIC, config: RunConfig) -> None:
    """Every weight of both parts differs by more than rounding from its initial value, which a seed gives."""
    torch.manual_seed(config.seed)
    initial = dict(DiffMIC(config.model).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim > 1:
            assert not torch.allclose(parameter, initial[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    docstring = text.split('"""')[1]
    commands = re.findall(rf"^    python examples/{path.name}(.*)$", docstring, re.M)
    assert commands
    for option in re.findall(r"--[\w-]+", " ".join(commands)):
        assert f'"{option}"' in text, option


def test_the_readme_lists_every_file():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w.]+)\)", text))
    found = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert listed == found - {"README.md"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with images/ and labels.csv, as the code in examples/README.md draws them."""
    path = tmp_path_factory.mktemp("drawn")
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        exec(code, {})
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The folder that train_on_csv.py writes, from these images."""
    out = folder / "own"
    example("train_on_csv").main([str(folder / "labels.csv"), "--out", str(out), "--device", "cpu"])
    return out


def test_training_on_a_csv_file(folder, trained):
    model = DiffMIC.from_pretrained(trained / "model")
    assert model.class_names == GRADES
    assert model.calibration is not None
    config = read_config(trained / "run" / "config.yml")
    assert config.data.table == str(folder / "labels.csv") and config.model.classes == len(GRADES)
    assert_trained(model, config)
    log = read_rows(trained / "run" / "log.csv")
    assert [row["phase"] for row in log] == ["guidance", "joint"]
    assert len(finite(log, "loss")) == 1 and len(finite(log, "guidance_loss")) == 2
    assert len(finite(log, "validation_macro_f1")) == 1


@pytest.mark.parametrize("source", ["model", "run/ckpt_best.pth"])
def test_classification_of_a_folder(folder, trained, tmp_path, capsys, source):
    images = tmp_path / "images"
    shutil.copytree(folder / "images" / GRADES[0], images / "inside")
    Image.fromarray(np.full((50, 70, 3), (0, 255, 0), np.uint8)).save(images / "unlike.png")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "out.csv"
    arguments = [str(trained / source), str(images), "--out", str(out), "--device", "cpu"]
    example("classify_folder").main([*arguments, "--batch-size", "8"])
    printed = capsys.readouterr().out
    assert re.search(r"^unreadable: .*broken\.png", printed, re.M)
    rows = read_rows(out)
    paths = [Path(row["file"]) for row in rows]
    assert paths == sorted([*(images / "inside").iterdir(), images / "unlike.png"])
    assert printed.count("\n") == len(rows) + 2
    probabilities = torch.tensor([[float(row[f"probability_{n}"]) for n in GRADES] for row in rows])
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(rows)))
    model, _ = load_model(trained / source)
    expected = model.predict(paths)
    assert expected.calibrated
    torch.testing.assert_close(probabilities, expected.probabilities, rtol=1e-4, atol=1e-6)
    assert [row["class"] for row in rows] == [GRADES[i] for i in probabilities.argmax(dim=1)]
    assert [float(row["probability"]) for row in rows] == probabilities.max(dim=1).values.tolist()
    flags = [row["unlike_training"] for row in rows]
    assert flags[-1] == "yes" and flags.count("no") > len(rows) // 2
    assert printed.count("unlike the training images") == flags.count("yes")


def test_classification_without_calibration_and_class_names(tmp_path, folder, capsys):
    model = DiffMIC(dataclasses.replace(read_config(EXAMPLES / "tiny.yml").model, timesteps=5))
    model.preprocessing = example("timm_loop").Preprocessing()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.csv"
    arguments = [str(tmp_path / "model"), str(folder / "images" / GRADES[1]), "--out", str(out)]
    example("classify_folder").main(arguments)
    rows = read_rows(out)
    assert len(rows) == 20
    assert {row["class"] for row in rows} <= set("01234")
    assert {row["unlike_training"] for row in rows} == {""}
    assert "unlike" not in capsys.readouterr().out


@pytest.mark.slow
def test_code_of_the_published_program(tmp_path, capsys):
    """Its checkpoints load, and the chain is that of the definition with the same noise."""
    torch.manual_seed(1)
    config = DiffMICConfig(classes=3, image_size=64, timesteps=20, feature_dim=32)
    model = DiffMIC(config).eval()
    settings = tmp_path / "config.yml"
    settings.write_text(
        "data: {dataset: APTOS2019, num_classes: 3, image_size: 64}\n"
        "model: {arch: resnet18, feature_dim: 32}\n"
        "diffusion: {timesteps: 20, beta_schedule: linear, beta_start: 1.0e-4, beta_end: 2.0e-2}\n"
    )
    files = [tmp_path / "ckpt.pth", tmp_path / "aux_ckpt.pth"]
    for path, part in zip(files, (model.denoiser, model.guidance), strict=True):
        state = {f"module.{name}": tensor for name, tensor in part.state_dict().items()}
        torch.save([state, {}, 1, 1], path)
    example("swap_import").main([str(settings), *map(str, files), "--seed", "5"])
    rows = re.findall(r"guidance (\[.*?\]), diffusion (\[.*?\])", capsys.readouterr().out)
    priors, probabilities = torch.tensor([[json.loads(v) for v in row] for row in rows]).unbind(
        dim=1
    )
    torch.manual_seed(5)
    images = torch.randn(2, 3, 64, 64)
    noise = torch.stack([torch.randn(2, 3) for _ in range(20)])
    prior = model.guide(images).logits.fused.softmax(dim=1)
    torch.testing.assert_close(priors, prior, rtol=1e-4, atol=1e-5)
    steps = make_steps(make_schedule("linear", 20, 1e-4, 2e-2), "ddpm")
    arguments = (model.encode(images), prior, prior, model.denoiser.weights(), steps)
    with torch.no_grad():
        y_0 = denoise(*arguments, noise=noise, backend="reference")
    torch.testing.assert_close(probabilities, y_0.softmax(dim=1), rtol=1e-3, atol=1e-4)


def gaussian_discrepancy(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """The biased estimate with the kernel exp(-scale |u - v|^2), in float64."""
    return sum(
        sign * torch.exp(-scale * torch.cdist(a.double(), b.double()) ** 2).mean()
        for sign, a, b in ((1, x, x), (1, y, y), (-2, x, y))
    )


def test_operations(monkeypatch, capsys):
    module = example("operations")
    value, gradient = module.discrepancy()
    assert 0 < float(value) < 1 and gradient.shape == (300, 8)
    assert gradient.isfinite().all() and float(gradient.norm()) > 0
    origins, crops = module.salient_crops()
    assert origins.tolist() == [[[40, 8], [0, 32]]]
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))[0]
    for (top, left), crop in zip(origins[0].tolist(), crops[0], strict=True):
        assert torch.equal(crop, image[:, top : top + 16, left : left + 16])
    probabilities = module.label_chain()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))
    assert not torch.allclose(probabilities[0], probabilities[1])
    monkeypatch.setenv("DIFFMIC_BACKEND", "reference")
    torch.testing.assert_close(module.label_chain(), probabilities, rtol=1e-4, atol=1e-5)
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["PyTorch"] * 3 + ["NumPy", "CuPy"]


def test_arrays_of_other_libraries_come_and_go_through_dlpack(monkeypatch):
    module = example("operations")
    value = module.through_dlpack(np)
    assert type(value) is np.ndarray and value.dtype == np.float32
    x = torch.linspace(-1, 1, 300).reshape(100, 3)
    expected = gaussian_discrepancy(x, x + 0.25, 1 / 3**2)  # exp(-|u - v|^2 / d^2)
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    cupy = module.cupy_or_reason()
    if not isinstance(cupy, str):
        on_gpu = module.through_dlpack(cupy)
        assert isinstance(on_gpu, cupy.ndarray)
        assert float(on_gpu) == pytest.approx(float(expected), rel=1e-4)


def test_cupy_is_left_out_with_the_reason(monkeypatch):
    module = example("operations")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.cupy_or_reason() == "PyTorch sees no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "cupy cannot be imported" in module.cupy_or_reason()
    monkeypatch.setitem(sys.modules, "cupy", np)
    assert module.cupy_or_reason() is np


@pytest.mark.slow
def test_a_loop_in_the_style_of_timm(tmp_path, capsys):
    example("timm_loop").main(["--out", str(tmp_path / "model"), "--device", "cpu"])
    model = DiffMIC.from_pretrained(tmp_path / "model")
    assert model.class_names == GRADES and model.sampling.steps == 5
    assert_trained(model, read_config(EXAMPLES / "tiny.yml"))
    lines = capsys.readouterr().out.splitlines()
    pattern = r"epoch \d/3: guidance loss (\S+), denoiser loss (\S+), accuracy (\S+) %"
    epochs = [re.fullmatch(pattern, line) for line in lines[:3]]
    values = np.array([[float(v) for v in found.groups()] for found in epochs if found])
    assert values.shape == (3, 3) and np.isfinite(values).all()
    assert (values[:, 2] >= 0).all() and (values[:, 2] <= 100).all()
    assert len(set(values[:, 0])) == 3


@pytest.mark.slow
def test_a_lightning_module(tmp_path):
    """In a process of its own: Lightning sets seeds and log handlers of the process."""
    pytest.importorskip("pytorch_lightning")
    script = EXAMPLES / "lightning_module.py"
    subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True
    )
    model = DiffMIC.from_pretrained(tmp_path / "model")
    assert model.class_names == GRADES
    assert_trained(model, read_config(EXAMPLES / "tiny.yml"))
    (log,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    rows = read_rows(log)
    assert len(finite(rows, "guidance_loss")) == 3
    assert len(finite(rows, "denoiser_loss")) == 2  # not in the epoch of the guidance model alone
    assert all(0 <= value <= 1 for value in finite(rows, "accuracy"))


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch):
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    outputs: list[Any] = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    (frame,) = (o for o in outputs if "<iframe" in o.get("data", {}).get("text/html", ""))
    (page,) = re.findall(r'src="(.*?)"', frame["data"]["text/html"])
    text = (tmp_path / page).read_text(encoding="utf-8")
    names = set(re.findall(r"eye_0_\d_\d{5}\.png", text))
    assert len(names) == 25
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    rows = [json.loads(row) for row in re.findall(r"\.png \w+ (\[.*\])", printed)]
    assert len(rows) == 3
    assert all(sum(row) == pytest.approx(1, abs=0.005) for row in rows)
    out = tmp_path / "runs" / "notebook"
    evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    methods = {result["method"]: result["accuracy"] for result in evaluation["results"]}
    assert 0 <= methods["ddim 50 eta 1, calibrated"] <= 1
    model = DiffMIC.from_pretrained(out / "model")
    assert model.class_names == GRADES and model.calibration is not None
