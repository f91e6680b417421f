"""The blocks of code of README.md, CONTRIBUTING.md and docs/: how they are found, checked and run."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from markdown_it import MarkdownIt

from diffmic_fast.cli import main, make_parser
from diffmic_fast.config.run import RunConfig, read_config

SOURCE = Path(__file__).resolve().parents[1]
LANGUAGES = ("math", "python", "sh", "text", "yaml")  # math: the site converts it; text: output
_MARKER = re.compile(r"<!-- not executed: (.*?) -->\s*", re.S)
# A block of text that begins like this would be code.
_COMMAND = re.compile(
    r"\s*(\$ |diffmic-fast|pip|make|python|pytest|torchrun|import |from \w+ import)"
)

# A model of a few kilobytes. No other entry of a documented configuration is changed.
SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "image_size": 32, "timesteps": 100, "feature_dim": 16, "encoder": "test_resnet",
        "encoder_weights": None, "guidance_trunk": "test_resnet", "guidance_weights": None, "crops": 2,
        "crop_size": 16,
    },
    "training": {
        "batch_size": 8, "guidance_epochs": 1, "encoder_epochs": 1, "epochs": 0, "feature_epochs": 1,
        "feature_views": 2, "draws": 1, "warmup_epochs": 0, "guidance_warmup_epochs": 0, "tensorboard": False,
    },
    "sampling": {"steps": 4, "samples": 2},
}  # fmt: skip


class Block(NamedTuple):
    """A block of code.

    Attributes:
        page: path in the repository.
        line: number of its first line in the page.
        language: of its fence; empty for an indented block.
        code: its text.
        reason: why it is not executed, of the comment `<!-- not executed: REASON -->` before it, or None.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def pages() -> list[str]:
    """The pages with code, as paths in the repository."""
    docs = sorted(path.relative_to(SOURCE).as_posix() for path in (SOURCE / "docs").rglob("*.md"))
    return ["README.md", "CONTRIBUTING.md", "csrc/cuda/README.md", *docs]


def blocks(page: str, text: str | None = None) -> Iterator[Block]:
    """The blocks of code of a page, in order."""
    if text is None:
        text = (SOURCE / page).read_text(encoding="utf-8")
    reason = None
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in {"fence", "code_block"} and token.map:
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content, reason)
        if token.nesting == 0 or token.type == "paragraph_open":
            found = _MARKER.fullmatch(token.content) if token.type == "html_block" else None
            reason = " ".join(found[1].split()) if found else None


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block of shell lines, as arguments; variables in front of a command are left out."""
    for line in code.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                if command:
                    yield command
                command = []
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)


def _extras() -> set[str]:
    text = (SOURCE / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.M))


def check_command(command: list[str]) -> None:
    """Check a command without running it: its arguments, or that what it names exists.

    Raises:
        ValueError: the command is none that is known here, or names something that does not exist.
        SystemExit: the parser of `diffmic-fast` rejects the arguments.
    """
    program, *arguments = command
    if program == "diffmic-fast":
        make_parser().parse_args(arguments)
    elif program == "torchrun":
        at = arguments.index("-m")
        if arguments[at + 1] != "diffmic_fast":
            raise ValueError(f"torchrun runs {arguments[at + 1]}")
        make_parser().parse_args(arguments[at + 2 :])
    elif program == "pip":
        _check_pip(arguments)
    elif program == "make":
        _check_make(arguments)
    elif program in {"python", "pytest"}:
        _check_python(arguments if program == "python" else ["-m", "pytest", *arguments])
    else:
        raise ValueError(f"{program} is no command that is known here")


def _check_pip(arguments: list[str]) -> None:
    if arguments[0] != "install":
        raise ValueError(f"pip {arguments[0]}")
    for word in arguments[1:]:
        if found := re.fullmatch(r"\.\[([\w,]+)\]", word):
            if unknown := set(found[1].split(",")) - _extras():
                raise ValueError(f"pyproject.toml has no extra {', '.join(unknown)}")
        elif not re.fullmatch(r"\.|-e|[a-z-]+", word):
            raise ValueError(f"pip install {word}")


def _check_make(arguments: list[str]) -> None:
    makefile = (SOURCE / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w\- ]+):(?!=)", makefile, re.M)
    for word in arguments:
        name, is_variable, value = word.partition("=")
        if is_variable:
            if not re.search(rf"\$\({name}\)", makefile):
                raise ValueError(f"the Makefile has no variable {name}")
            if name == "RUN":
                _check_python(["-m", *shlex.split(value)])
        elif not any(word in line.split() for line in targets):
            raise ValueError(f"the Makefile has no target {word}")


def _check_python(arguments: list[str]) -> None:
    """A module that exists, and its options."""
    if not arguments or arguments[0] != "-m":
        raise ValueError(f"python {' '.join(arguments)}")
    module, *rest = arguments[1:]
    if module == "pytest":
        for word in rest:
            if "/" in word and not (SOURCE / word).exists():
                raise ValueError(f"there is no {word}")
        return
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no module {module}")
    file = Path(spec.origin)
    text = file.with_name("__main__.py" if file.name == "__init__.py" else file.name).read_text()
    for word in rest:
        if word.startswith("--") and f'"{word}"' not in text:
            raise ValueError(f"{module} has no option {word}")


def check(block: Block) -> None:
    """Check a block without executing it.

    Raises:
        ValueError, SyntaxError, yaml.YAMLError, SystemExit: there is a fault.
    """
    if block.language not in LANGUAGES:
        raise ValueError(
            f"the language of a block must be one of {', '.join(LANGUAGES)}, got {block.language!r}"
        )
    if block.reason is not None:
        if not block.reason:
            raise ValueError("a block that is not executed needs a reason")
    elif block.language == "python":
        compile(block.code, f"{block.page}:{block.line}", "exec")
    elif block.language == "yaml":
        RunConfig.from_dict({"model": {"classes": 2}, **yaml.safe_load(block.code)})
    elif block.language == "sh":
        for command in commands(block.code):
            check_command(command)
    elif block.language == "text" and _COMMAND.match(block.code):
        raise ValueError("a block of text must be no code")


def small(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the entries of `SMALL`."""
    changed = {section: {**values.get(section, {}), **SMALL[section]} for section in SMALL}
    data = dict(values["data"])
    if data["kind"] == "synthetic_fundus":
        data.update(synthetic_size=32, synthetic_per_class=4, synthetic_validation_per_class=4,
                    synthetic_test_per_class=2)  # fmt: skip
    elif not data.get("validation_table"):
        data["validation_fraction"] = 0.5  # at least 20 images, for the calibration
    return {**values, **changed, "data": data}


def run(block: Block, names: dict[str, Any]) -> None:
    """Execute a block in the working directory.

    Python runs in the namespace `names`. Of shell lines, those of `diffmic-fast` run. A configuration is read, and
    written to the file that its first line names (`# FILE.yml`), with the entries of `SMALL`.

    Raises:
        AssertionError: a command has another exit status than 0.
    """
    if block.reason is not None:
        return
    if block.language == "python":
        exec(compile(block.code, f"{block.page}:{block.line}", "exec"), names)
    elif block.language == "yaml":
        if found := re.match(r"# (\w+\.yml)\n", block.code):
            Path(found[1]).write_text(yaml.safe_dump(small(yaml.safe_load(block.code))))
            read_config(found[1])
    elif block.language == "sh":
        for program, *arguments in commands(block.code):
            if program == "diffmic-fast":
                assert main(arguments) == 0, f"{block.page}:{block.line}: {' '.join(arguments)}"
