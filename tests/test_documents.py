"""The documents agree with the tree: commands, paths, links, flags, exit codes, layers, decisions.

A command in a document is checked without running it: ``pretrain_gpt.py`` as by ``--dry-run``,
tools and benchmarks by their own parsers, make targets by the Makefile. What SLURM and container
engines run is covered by ``make test-slurm`` and ``make test-docker``.
"""

import argparse
import functools
import inspect
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from megatron_ring import errors
from megatron_ring.config import (
    Config,
    GenerationConfig,
    InferenceConfig,
    NeedlesConfig,
    PositionsConfig,
    load_yaml,
    parse,
    to_yaml,
)
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training.console import plan

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# These name files that are gone.
HISTORY = {
    ROOT / "docs" / "log.md",
    ROOT / "docs" / "old-names.md",
    *(ROOT / "docs" / "decisions").glob("0004-*.md"),
}
GENERATED = {
    ROOT / "docs" / name
    for name in ("support.md", "fused.md", "precision.md", "reference/options.md")
}
CURRENT = [path for path in DOCUMENTS if path not in HISTORY]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
SCRIPTS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]

# Files that documents name although they are not here, and flags of other programs.
OTHER_FILES = {"distributed_c10d.py"}
OTHER_FLAGS = {
    "--log_level",
    "--long",
    "--no-build-isolation",
    "--num_gpus",
    "--pdb",
    "--rdzv-endpoint",
}
DEFAULT_PROCESSES = 8
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize(
    "path", CURRENT, ids=lambda path: str(path.relative_to(ROOT))
)


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return FENCE.sub("", path.read_text())


def quoted(path: Path) -> list[str]:
    """What stands in backticks in the prose of a document, line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


# ---- commands ----


def commands(path: Path) -> Iterator[list[str]]:
    """The commands in a document's blocks of code, and those in backticks that have flags."""
    for language, block in FENCE.findall(path.read_text()):
        for line in block.replace("\\\n", " ").splitlines() if language != "text" else ():
            if words := shlex.split(line, comments=True):
                yield words
    for span in quoted(path):
        if re.match(r"(python |deepspeed |make |tools/)", span) and " --" in span:
            words = shlex.split(span)
            yield words if words[0] in ("python", "deepspeed", "make") else ["python", *words]


class Parsed(BaseException):
    """Raised once a script has parsed its arguments, in place of running it."""


def parse_only(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to the end of its argument parser, which exits with 2 for a bad argument."""
    cli, parse_args = tyro.cli, argparse.ArgumentParser.parse_args

    def parsed_by_tyro(target, **settings):
        if inspect.isfunction(target):
            target = functools.wraps(target)(lambda *_, **__: None)
        cli(target, **(settings | {"args": arguments}))
        raise Parsed

    def parsed_by_argparse(parser, *_):
        parse_args(parser, arguments)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", parsed_by_tyro)
        patch.syspath_prepend(script.parent)
        if "argparse" in script.read_text():
            patch.setattr(argparse.ArgumentParser, "parse_args", parsed_by_argparse)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
    pytest.fail(f"{script} has not parsed its arguments")


def check_training(arguments: list[str], processes: int | None, folder: Path) -> None:
    """Plan a run as ``--dry-run`` does; a config outside configs/ is replaced by the defaults."""
    if "--config" in arguments:
        at = arguments.index("--config") + 1
        if not arguments[at].startswith("configs/"):
            (folder / "config.yaml").write_text(to_yaml(Config()))
            arguments = [*arguments[:at], str(folder / "config.yaml"), *arguments[at + 1 :]]
    config = parse([*arguments, "--dry-run"], console=False)
    world_size = config.parallel.world_size or DEFAULT_PROCESSES
    assert plan(RunSettings.resolve(config, processes or world_size))


def check_sbatch(words: list[str], folder: Path) -> None:
    """The script exists, and the run that it starts can be planned."""
    (script,) = (word for word in words if word.endswith(".sbatch"))
    assert (ROOT / script).is_file()
    arguments = words[words.index(script) + 1 :]
    recipe = ROOT / "configs" / Path(script).with_suffix(".yaml").name
    check_training(
        ["--config", f"configs/{recipe.name}", *arguments] if recipe.exists() else arguments,
        None,
        folder,
    )


def check_make(words: list[str], folder: Path) -> None:
    """The target exists, and what ARGS adds to ``make train`` can be planned."""
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert targets
    assert set(targets) <= set(TARGETS)
    if targets == ["train"]:
        arguments = shlex.split(variables.get("ARGS", ""))
        check_training(["--config", "configs/tiny-cpu.yaml", *arguments], 2, folder)


def check_command(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one command without running it."""
    program, *rest = words
    if program == "make":
        check_make(rest, folder)
    elif program == "deepspeed":
        processes = int(rest[1]) if rest[0] == "--num_gpus" else None
        rest = rest[2:] if processes else rest
        if rest[0].startswith("tools/"):
            return parse_only(ROOT / rest[0], rest[1:], monkeypatch)
        assert rest[0] == "pretrain_gpt.py"
        check_training(rest[1:], processes, folder)
    elif program == "sbatch":
        check_sbatch(rest, folder)
    elif program == "docker":  # covered by make test-docker
        assert (ROOT / rest[rest.index("-f") + 1]).is_file()
    elif program == "pip":
        extra = re.fullmatch(r"\.\[(\w+)\]", rest[-1])
        assert extra is None or extra[1] in PROJECT["project"]["optional-dependencies"]
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    elif rest[:2] == ["-m", "pytest"]:
        paths = [word for word in rest if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths)
    else:
        assert program in ("python", ".venv/bin/python"), f"no check for {program}"
        check_python(rest, folder, monkeypatch)


def check_python(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check ``python SCRIPT ...`` and ``python -m benchmarks.NAME ...``, which may run another."""
    if words[0] == "pretrain_gpt.py":
        return check_training(words[1:], None, folder)
    if words[0] == "-m":
        _, module, *arguments = words
        script = ROOT / module.replace(".", "/") if module.startswith("benchmarks.") else ROOT
        if "python" in arguments:
            check_python(arguments[arguments.index("python") + 1 :], folder, monkeypatch)
        return parse_only(script.with_suffix(".py"), arguments, monkeypatch)
    assert words[0].startswith("tools/"), "benchmarks run as modules"
    parse_only(ROOT / words[0], words[1:], monkeypatch)


@each_document
def test_every_command_in_a_document_can_be_parsed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        try:
            check_command(words, tmp_path, monkeypatch)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{path.relative_to(ROOT)}: {shlex.join(words)}: {error!r}")


def test_a_command_with_a_flag_that_does_not_exist_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in (
        "deepspeed pretrain_gpt.py --no-such-flag",
        "python tools/prepare_data.py --input a --output-prefix b --no-such-flag",
        "python -m benchmarks.bench_gpu --no-such-flag",
        "python -m benchmarks.draw_layouts --no-such-flag",
    ):
        with pytest.raises(SystemExit) as left:
            check_command(line.split(), tmp_path, monkeypatch)
        assert left.value.code == 2


@each_document
def test_every_make_target_that_is_named_exists(path):
    named = [span.split()[1] for span in quoted(path) if span.startswith("make ")]
    assert set(named) <= set(TARGETS)


# ---- paths, links, flags ----


@each_document
def test_every_file_and_folder_that_is_named_exists(path):
    tops = {each.name for each in (*ROOT.iterdir(), *(ROOT / "megatron_ring").iterdir())}
    somewhere = {each.name for each in ROOT.rglob("*.*") if ".venv" not in each.parts}
    missing = []
    for word in (span.split()[0] for span in quoted(path)):
        top = word.split("/")[0]
        is_path = re.fullmatch(r"[\w.-]+/[\w./-]*", word) and top in tops - {"runs"}
        if is_path and not (top == "data" and not word.endswith(".py")):
            places = ROOT, ROOT / "megatron_ring"
            # Records are cited by their numbers alone.
            found = any(place.joinpath(word).exists() for place in places) or any(
                ROOT.glob(f"{word}-*.md")
            )
            missing += [] if found else [word]
        elif re.fullmatch(r"[\w-]+\.(py|md|sbatch)", word):
            missing += [] if word in somewhere | OTHER_FILES else [word]
    assert missing == []


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@each_document
def test_every_flag_that_is_named_is_one_of_this_program_or_its_scripts(path):
    sections = [section for section in vars(Config()).values() if hasattr(section, "problems")]
    sections += [InferenceConfig(), GenerationConfig(), NeedlesConfig(), PositionsConfig()]
    options = {name for section in (Config(), *sections) for name in vars(section)}
    known = {errors.flag(name) for name in options} | OTHER_FLAGS | {"--help"}
    known |= {flag.replace("--", "--no-", 1) for flag in known}
    scripts = "\n".join(script.read_text() for script in SCRIPTS)
    scripts += (ROOT / "megatron_ring/checkpoint/hugging_face/exporting.py").read_text()
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", " ".join(quoted(path))):
        name = flag.removeprefix("--").replace("-", "_")
        assert flag in known or re.search(rf"\b{name}\b", scripts), flag


@pytest.mark.parametrize(
    "path",
    [path for path in CURRENT if path not in GENERATED],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_line_is_longer_than_120_columns_but_those_of_tables(path):
    lines = path.read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


# ---- what single documents state ----


def test_the_readme_has_its_two_commands_and_its_status_on_the_first_screen():
    lines = README.splitlines()
    assert "make train" in "\n".join(lines[:20])
    assert "make test" in "\n".join(lines[:20])
    assert "has not run on a GPU" in "\n".join(lines[:30])
    assert len(lines) <= 150


def test_a_cell_of_the_readmes_measurements_has_one_figure():
    rows = re.findall(r"^\|.*`python -m benchmarks.*\|$", README, flags=re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        figure, limit = row.split("|")[2:4]
        assert len(figure.split()) == len(limit.split()) == 1, row


def test_every_config_that_is_named_loads():
    named = {
        name for path in CURRENT for name in re.findall(r"configs/[\w.-]+\.yaml", path.read_text())
    }
    assert named
    for name in named:
        assert isinstance(load_yaml(ROOT / name), Config)


def test_the_exit_codes_are_those_of_the_errors():
    text = (ROOT / "docs/guide/troubleshooting.md").read_text()
    stated = dict(re.findall(r"^\| (\d+) \| (\w+):", text, flags=re.MULTILINE))
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    ]
    assert stated == {
        str(kind.exit_code): kind.__name__ for kind in kinds if getattr(kind, "exit_code", 1) != 1
    }


def test_the_architecture_lists_the_layers_of_the_import_contract():
    text = (ROOT / "docs/architecture.md").read_text()
    table = text.split("| layer | what it does |")[1].split("\n\n")[0]
    listed = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]
    (contract,) = (
        each for each in PROJECT["tool"]["importlinter"]["contracts"] if each["type"] == "layers"
    )
    layers = [set(re.split(r"\s*\|\s*", layer)) for layer in contract["layers"]]
    assert [set(layer) for layer in listed] == layers


def test_the_index_lists_every_decision_with_its_title_date_and_status():
    folder = ROOT / "docs/decisions"
    rows = re.findall(
        r"^\| (\d+) \| \[(.+)\]\((\S+)\) \| (\d{4}-\d\d-\d\d) \| (\w+)",
        (folder / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    records = []
    for record in sorted(folder.glob("[0-9]*.md")):
        number, title = re.match(r"# (\d+)\. (.*)", record.read_text()).groups()
        date, status = re.search(
            r"Date:\**\s+(\S+)\.\s+\**Status:\**\s+(\w+)", record.read_text()
        ).groups()
        assert record.name.startswith(f"{int(number):04}-")
        records.append((number, title, record.name, date, status))
    assert rows == records


def test_the_legend_explains_every_letter_of_the_shape_suffixes():
    legend = (ROOT / "docs/notation.md").read_text().split("| letter | dimension |")[1]
    explained = set()
    for row in legend.split("\n\n")[0].splitlines()[2:]:
        explained |= set(re.findall(r"`(\w)`", row.split("|")[1]))
    suffix = re.compile(r"\b[a-z][a-z0-9_]*_([a-z0-9]*[A-Z][A-Za-z0-9]*)\b")
    for path in (ROOT / "megatron_ring").rglob("*.py"):
        for found in suffix.findall(path.read_text()):
            letters = set(re.sub(r"\d", "", found))
            assert letters <= explained, (path.name, found)


def test_the_new_names_of_renamed_modules_exist():
    modules = (ROOT / "docs/old-names.md").read_text().split("## Modules")[1].split("## Names")[0]
    new = re.findall(r"^\| `[^`]+` \| `([^`]+)` \|", modules, flags=re.MULTILINE)
    assert len(new) > 50
    missing = [
        path
        for path in new
        if not (ROOT / path).exists() and not (ROOT / "megatron_ring" / path).exists()
    ]
    assert missing == []


def test_every_document_that_the_code_names_exists():
    folders = "megatron_ring", "benchmarks", "tools", "tests", "configs", "docker"
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    named = {
        (path.name, found)
        for path in [*sources, ROOT / "pretrain_gpt.py", ROOT / "Makefile"]
        if path.suffix in ("", ".py", ".yaml", ".sbatch")
        for found in re.findall(r"\bdocs/(?:decisions/\d{4}|[\w/-]+\.md)", path.read_text())
    }
    assert len(named) > 10
    # Records are cited by their numbers.
    missing = [
        (name, found)
        for name, found in named
        if not (ROOT / found).exists() and not any(ROOT.glob(f"{found}-*.md"))
    ]
    assert missing == []
