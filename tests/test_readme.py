"""README, docs and the files of the repository: commands that parse, links that resolve, length."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from cpt_helpers import recipes
from cpt_helpers.__main__ import parser
from cpt_helpers.pipeline import NOTEBOOKS
from cpt_helpers.run import PROJECT, STEPS

README = PROJECT / "README.md"
PAGES = [
    README,
    PROJECT / "CONTRIBUTING.md",
    PROJECT / "CHANGELOG.md",
    *sorted((PROJECT / "docs").glob("*.md")),
]
DOCS = (
    "data recipes fault_tolerance planning performance export_and_serving jobs tracking "
    "limitations faults"
)
MAKEFILE = (PROJECT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^([A-Z]+) \?=|\$\(([A-Z]+)\)", MAKEFILE, re.MULTILINE))
# STYLE: words that a reader who learnt English at school does not expect.
UNWANTED = re.compile(
    r"\b(mend|reckoned|besides|passed over|held against|stands? beside|without a word|left alone"
    r"|went on|leave to (read|write)|(comes?|came) to|is no document)\b|[«»]",
    re.IGNORECASE,
)


class Command(NamedTuple):
    """A line of a fenced ``bash`` block, and what the text above the block says it needs."""

    page: str
    line: str
    needs: str


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        lines = page.read_text("utf-8").splitlines()
        needs, inside, above = "", False, ""
        for line in lines:
            if line.startswith("```"):
                inside = line == "```bash"
                needs = above if above.startswith("**Needs:** ") else ""
            elif inside and line.strip() and not line.startswith("#"):
                found.append(Command(page.name, line.split("  #")[0].strip(), needs))
            if line.strip():
                above = line
    return found


COMMANDS = commands()


def parameters() -> dict[str, set[str]]:
    """The parameters of each notebook."""
    found = {}
    for step in STEPS:
        cells = json.loads((NOTEBOOKS / f"{step}.ipynb").read_text("utf-8"))["cells"]
        (cell,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        found[step] = set(re.findall(r"^([A-Z_]+) =", "".join(cell["source"]), re.MULTILINE))
    return found


def check_settings(recipe: str, overrides: str, more: str) -> None:
    """A recipe, overrides and parameters as the command line gives them."""
    if recipe:
        assert (PROJECT / "train-configs" / Path(recipe).name).is_file(), recipe
    assert set(yaml.safe_load(overrides or "{}")) <= set(recipes.known_keys()), overrides
    assert set(yaml.safe_load(more or "{}")) <= set().union(*parameters().values()), more


def check_make(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert set(targets) <= TARGETS, f"no such target: {targets}"
    assert set(given) <= {name for pair in VARIABLES for name in pair}, f"no such variable: {given}"
    check_settings(given.get("CONFIG", ""), given.get("OVERRIDES", ""), given.get("PARAMETERS", ""))


def check_module(words: list[str]) -> None:
    arguments = parser().parse_args(words)
    recipe = arguments.config or getattr(arguments, "recipe", "")
    check_settings(recipe, arguments.overrides, getattr(arguments, "parameters", ""))


def check_papermill(words: list[str]) -> None:
    step = Path(words[0]).stem
    assert (PROJECT / words[0]).is_file(), words[0]
    given = {words[i + 1] for i, word in enumerate(words) if word == "-p"}
    assert given <= parameters()[step], given


def check_pytest(words: list[str]) -> None:
    done = subprocess.run(
        [PROJECT / ".venv/bin/python", "-m", "pytest", "--collect-only", "-q", *words],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def check_nbstripout(words: list[str]) -> None:
    assert shutil.which("nbstripout", path=PROJECT / ".venv/bin")
    assert all((PROJECT / word).is_file() for word in words if not word.startswith("-")), words


KNOWN = {
    "make": check_make,
    "python -m cpt_helpers": check_module,
    ".venv/bin/python -m pytest": check_pytest,
    ".venv/bin/papermill": check_papermill,
    ".venv/bin/nbstripout": check_nbstripout,
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.line}")
def test_a_command_parses_or_says_what_it_needs(command: Command) -> None:
    known = [start for start in KNOWN if f"{command.line} ".startswith(f"{start} ")]
    assert known or command.needs, "neither a command that is checked, nor below '**Needs:** …'"
    for start in known:
        KNOWN[start](shlex.split(command.line.removeprefix(start)))
    ours = re.search(r"(?<=\S )python -m cpt_helpers (.*)", command.line)  # as a job's entrypoint
    if ours:
        check_module(shlex.split(ours[1]))
    for path in re.findall(r"(?<![\w/.])[a-z]+-configs/[\w./-]+", command.line):
        assert (PROJECT / path).is_file(), path


def test_the_checks_of_commands_can_fail() -> None:
    for line in ("rnu RUN=x", "run RNU=x", "run CONFIG=no.yaml", "run PARAMETERS='{REPLY: 1}'"):
        with pytest.raises(AssertionError):
            check_make(shlex.split(line))
    with pytest.raises(AssertionError):
        check_make(shlex.split("run OVERRIDES='{max_stepz: 1}'"))
    with pytest.raises(SystemExit):
        check_module(["run", "--no-such-option"])
    with pytest.raises(AssertionError):
        check_papermill(["notebooks/01_setup.ipynb", "out.ipynb", "-p", "CORPUS", "x"])
    assert len(COMMANDS) > 30 and len({command.page for command in COMMANDS}) > 8


@pytest.mark.parametrize("command", ["run", "train", "plan", "lab"])
def test_each_option_has_a_help_with_its_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and not UNWANTED.search(text)
    options = text.split(" options: ")[1].split(" --")[1:]
    flags = ("help", "dry-run", "resume")
    assert not [o for o in options if not o.startswith(flags) and "(default: " not in o]


def anchors(page: Path) -> set[str]:
    """A page's headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = PROJECT in target.parents and target.exists()
        if not inside or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_imports_of_python_examples_work() -> None:
    found = 0
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for node in ast.parse(block).body:
                if isinstance(node, ast.ImportFrom):
                    exec(ast.unparse(node), {})
                    found += 1
    assert found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_targets_and_files_that_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = set(re.findall(r"`make ([a-z][a-z-]*)", text))
    assert targets <= TARGETS, f"no such target: {targets - TARGETS}"
    folders = r"(?:train|deepspeed|dataset|job|serving)-configs|tests|notebooks|benchmarks"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)
    assert not [path for path in paths if not (PROJECT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_plain_words(page: Path) -> None:
    found = [match[0] for match in UNWANTED.finditer(page.read_text("utf-8"))]
    assert not found


def test_the_readme_is_short_and_names_every_page() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert {page.stem for page in (PROJECT / "docs").glob("*.md")} == set(DOCS.split())
    for name in set(DOCS.split()) - {"faults"}:
        assert f"(docs/{name}.md)" in text, name
    tree = re.search(r"## Repository\n\n```\n(.*?)```", text, re.DOTALL)[1]
    folders = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    tracked = subprocess.run(
        ["git", "ls-tree", "-d", "--name-only", "HEAD"], cwd=PROJECT, capture_output=True, text=True
    )
    if tracked.returncode == 0:  # not so in an installed copy
        assert folders == {name for name in tracked.stdout.split() if not name.startswith(".")}


def test_ci_runs_the_script_of_the_repository() -> None:
    workflow = yaml.safe_load((PROJECT / ".github/workflows/ci.yml").read_text("utf-8"))
    steps = workflow["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    script = PROJECT / ".ci/run"
    assert script.stat().st_mode & 0o100, "not executable"
    assert set(re.findall(r"^make ([a-z-]+)", script.read_text("utf-8"), re.MULTILINE)) <= TARGETS


def test_the_hooks_run_what_make_lint_runs(tmp_path: Path) -> None:
    """Each on a file with a fault that it has to find."""
    config = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    (tmp_path / "code.py").write_text("import os\nx   = 1\n")
    shutil.copy(NOTEBOOKS / "01_setup.ipynb", tmp_path / "notebook.ipynb")
    notebook = json.loads((tmp_path / "notebook.ipynb").read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[0]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": ["an output"]}]
    (tmp_path / "notebook.ipynb").write_text(json.dumps(notebook))
    for name, file in (
        ("ruff-check", "code.py"),
        ("ruff-format", "code.py"),
        ("nbstripout", "notebook.ipynb"),
    ):
        before = (tmp_path / file).read_text("utf-8")
        words = [*shlex.split(hooks[name]["entry"]), str(tmp_path / file)]
        assert words[0].removeprefix(".venv/bin/") in MAKEFILE, "make lint does not run it"
        subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
        assert (tmp_path / file).read_text("utf-8") != before, name
    assert "an output" not in (tmp_path / "notebook.ipynb").read_text("utf-8")


def test_the_licences() -> None:
    licence = (PROJECT / "LICENSE").read_text("utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    notice = (PROJECT / "NOTICE").read_text("utf-8")
    assert all(name in notice for name in ("SmolLM2-135M-Instruct", "gensim==4.3.3", "ray_docs"))
    requirements = (PROJECT / "cpt_helpers").rglob("assets.py")
    wheels = re.findall(r'"([\w-]+==[\w.]+)"', "".join(p.read_text("utf-8") for p in requirements))
    assert wheels and all(wheel in notice for wheel in wheels), wheels
