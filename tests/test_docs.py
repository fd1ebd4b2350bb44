"""The docs keep their promises: snippets run, links lead somewhere, commands and modules exist, lines fit."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import lorafa_kernels
from lorafa_kernels.__main__ import make_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md")
# Beside packages: what others wrote about the files there.
READMES = ("csrc_reference/README.md", "lorafa_kernels/plan/measured/README.md")
WIDTH = 110
# `python -m bench report` writes it whole, one line a paragraph.
GENERATED = ("docs/performance.md",)
README_LINES = 120


def pages() -> list[str]:
    found = [path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)]
    return sorted(found) + [name for name in READMES if (ROOT / name).exists()]


class Block(NamedTuple):
    """A fenced block: its language, the line of its first line, and its text."""

    language: str
    line: int
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", pages())
def test_no_merge_left_its_marks(page):
    marks = [line for line in read(page).splitlines() if re.match(r"(<{7}|={7}|>{7})( |$)", line)]
    assert not marks


def blocks(page: str) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate(read(page).splitlines(), 1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = (line[3:].strip(), number + 1)
        else:
            text = "\n".join(read(page).splitlines()[opened[1] - 1 : number - 1])
            found.append(Block(*opened, text + "\n"))
            opened = None
    assert opened is None, f"{page}: the block of line {opened} is not closed"
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)


def with_python(page: str) -> bool:
    return any(block.language == "python" for block in blocks(page))


@pytest.mark.parametrize("page", pages())
def test_lines_fit_a_screen(page):
    """All but rows of tables, addresses and images."""
    generated, wide = None, []
    for number, line in enumerate(read(page).splitlines(), 1):
        if comment := re.fullmatch(r"<!-- (/?)([\w-]+) -->", line):
            assert comment[2].endswith("-table"), f"{page}:{number}: {line} begins no table"
            generated = None if comment[1] else comment[2]
        exempt = line.startswith("|") or re.search(r"https?://\S{60}|^\[?!\[", line)
        if len(line) > WIDTH and not exempt:
            wide.append(f"{page}:{number}: {len(line)} columns")
    assert generated is None, f"{page}: the table {generated} does not end"
    assert not wide, "\n".join(wide)


def test_readme_is_short():
    assert len(read("README.md").splitlines()) < README_LINES


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while anchor + (f"-{number}" if number else "") in found:
            number += 1
        found.add(anchor + (f"-{number}" if number else ""))
    return found


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if name and not path.exists():
            broken.append(f"{page}: {target}: there is no such file")
        elif anchor and anchor not in anchors(path.relative_to(ROOT).as_posix()):
            broken.append(f"{page}: {target}: there is no such heading")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", pages())
def test_named_modules_exist(page):
    """Whatever ends in .py, by its whole path or the end of it."""
    known = {
        path.relative_to(ROOT).as_posix()
        for folder in ("lorafa_kernels", "bench", "tests", "examples", "csrc_reference")
        for path in (ROOT / folder).rglob("*.py")
    }
    named = re.findall(r"(?<![\w./-])((?:[\w-]+/)*\w+\.py)\b", read(page))
    missing = {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in known)}
    # A user's own file, in words about the import path.
    assert not missing - {"torch.py"}, f"{page}: {sorted(missing)}"


def commands(page: str) -> Iterator[str]:
    """Commands of a page: lines of its blocks without a language, and `code` in its text."""
    for block in blocks(page):
        if block.language in ("", "sh", "bash", "console"):
            yield from (line.partition("#")[0].strip() for line in block.text.splitlines())
    yield from re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", pages())
def test_commands_exist(page):
    targets = set(re.findall(r"^([\w.-]+):", read("Makefile"), flags=re.MULTILINE))
    (sub,) = (action for action in make_parser()._actions if action.dest == "run" or action.choices)
    parsers = sub.choices
    wrong = []
    for command in commands(page):
        words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command).split()
        if words[:1] == ["make"]:
            asked = [word for word in words[1:] if re.fullmatch(r"[a-z][\w.-]*", word)]
            wrong += [f"make {word}" for word in asked if word not in targets]
        if words[1:2] == ["-m"] and words[0].startswith("python"):
            # Not pip: see "distutils of Python" in conftest.
            if words[2] != "pip" and importlib.util.find_spec(words[2]) is None:
                wrong.append(command)
            words = words[2:]
        if words[:1] in (["lorafa-kernels"], ["lorafa_kernels"]) and words[1:]:
            name, *rest = words[1:]
            if name.startswith("-"):
                continue
            if name not in parsers:
                wrong.append(command)
                continue
            options = {option for action in parsers[name]._actions for option in action.option_strings}
            wrong += [command for word in rest if word.startswith("--") and word not in options]
    assert not wrong, f"{page}: {wrong}"


@pytest.mark.parametrize("page", pages())
def test_json_is_json(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)


def run(page: str, chosen: list[Block], names: dict, capsys) -> None:
    """Run blocks of python in one namespace; a block `text` behind one has lines of what it printed."""
    printed = ""
    for block in chosen:
        if block.language == "python":
            # With the page's own lines in a traceback.
            tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
            capsys.readouterr()
            exec(compile(tree, str(ROOT / page), "exec"), names)
            printed = capsys.readouterr().out
        elif block.language == "text":
            for line in block.text.splitlines():
                assert line in printed.splitlines(), f"{page}:{block.line}: not printed: {line}\n{printed}"


def optional(chosen: list[Block]) -> None:
    """Skip where a package is missing that the snippets import."""
    for block in chosen:
        for name in re.findall(r"^(?:from|import) (\w+)", block.text, flags=re.MULTILINE):
            pytest.importorskip(name)
            if "Trainer" in block.text:
                pytest.importorskip("accelerate")


@pytest.mark.parametrize("page", [page for page in pages() if with_python(page)])
def test_snippets_run(page, monkeypatch, tmp_path, capsys):
    """As written, one after another, in an empty folder, without a network."""
    found = [block for block in blocks(page) if block.language in ("python", "text")]
    optional(found)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(tmp_path)
    run(page, found, {"__name__": "__main__"}, capsys)


@pytest.mark.parametrize(
    ("test", "text", "found"),
    [
        pytest.param(test_commands_exist, "`make nothing`", "make nothing", id="target"),
        pytest.param(test_commands_exist, "`python -m lorafa_kernels doctr`", "doctr", id="command"),
        pytest.param(test_commands_exist, "```\nlorafa-kernels doctor --fast\n```", "--fast", id="option"),
        pytest.param(test_commands_exist, "`python -m bench.nothing`", "bench.nothing", id="module"),
        pytest.param(test_links_lead_somewhere, "[a](nothing.md)", "no such file", id="file"),
        pytest.param(test_links_lead_somewhere, "# B\n[a](#c)", "no such heading", id="heading"),
        pytest.param(test_named_modules_exist, "`linear/nothing.py`", "linear/nothing.py", id="path"),
        pytest.param(test_lines_fit_a_screen, "word " * 30, "columns", id="line"),
        pytest.param(
            test_snippets_run, "```python\nprint(1)\n```\n```text\n2\n```", "not printed: 2", id="print"
        ),
    ],
)
def test_each_fault_is_found(test, text, found, monkeypatch, tmp_path, capsys):
    true = read
    monkeypatch.setattr(f"{__name__}.read", lambda page: f"{text}\n" if page == "page.md" else true(page))
    fixtures = (monkeypatch, tmp_path, capsys) if test is test_snippets_run else ()
    with pytest.raises(AssertionError, match=found):
        test("page.md", *fixtures)


def signature_of(name: str) -> str:
    """`name(arguments) -> type` with annotations as they stand in the source, in lines of at most WIDTH."""
    found = lorafa_kernels
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    arguments, last = [], None
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and last is not parameter.kind:
            arguments.append("*")
        last = parameter.kind
        # A parameter without its annotation is its name and default; "<factory>" is a dataclass's own sign.
        bare = str(parameter.replace(annotation=parameter.empty)).replace("<factory>", "{}")
        if parameter.annotation is not parameter.empty:
            named, equals, default = bare.partition("=")
            bare = f"{named}: {parameter.annotation}" + (equals and f" = {default}")
        arguments.append(bare)
    returned = signature.return_annotation
    # A private class, and what contextlib makes a context manager of, say nothing to a reader.
    hidden = returned in ("None", None) or str(returned).startswith(("_", "Iterator"))
    shown = "" if hidden else f" -> {returned}"
    line = f"{name}({', '.join(arguments)}){shown}"
    if len(line) <= WIDTH:
        return line
    inner = textwrap.wrap(
        ", ".join(argument.replace(" ", "\0") for argument in arguments), WIDTH - 5, break_long_words=False
    )
    return "\n".join([f"{name}(", *(f"    {row}" for row in inner), f"){shown}"]).replace("\0", " ")


def summary_of(name: str) -> str:
    """The first paragraph of a docstring."""
    found = lorafa_kernels
    for part in name.split("."):
        found = getattr(found, part)
    return " ".join(inspect.getdoc(found).split("\n\n")[0].split())


def test_api_page_has_every_public_name_as_it_is():
    """docs/api.md: a heading for each name, its signature, and the first paragraph of its docstring."""
    sections = re.split(r"^### ", read("docs/api.md"), flags=re.MULTILINE)[1:]
    found = {section.split("\n", 1)[0].strip("`"): section.split("\n", 1)[1] for section in sections}
    assert len(found) == len(sections)
    public = {name for name in lorafa_kernels.__all__ if name != "__version__"}
    assert {name for name in found if "." not in name} == public
    for name, text in found.items():
        expected = f"```py\n{signature_of(name)}\n```"
        assert expected in text, f"docs/api.md, {name}: expected\n{expected}"
        assert summary_of(name) in " ".join(text.split()), f"docs/api.md, {name}: expected {summary_of(name)}"


def test_contributing_s_tree_is_the_package():
    """It names every module and folder at the top of the package, and none that is not there."""
    tree = read("CONTRIBUTING.md").split("## Where things are")[1].split("```")[1]
    named = set(re.findall(r"(?:^| )(\w+(?:/|\.py))(?= |$)", tree, flags=re.MULTILINE))
    package = ROOT / "lorafa_kernels"
    top = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    top |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert top <= named, f"not in the tree: {sorted(top - named)}"
    known = top | {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()}
    known |= {f"{path.parent.name}/" for path in ROOT.glob("*/*/__init__.py")} | {"placing/", "everywhere.py"}
    assert named <= known, f"there is no: {sorted(named - known)}"
