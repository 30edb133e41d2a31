"""The documentation: every option is explained, every example runs, and the site builds."""

import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from dit_sparse import available_methods
from dit_sparse.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RACES = "race", "race_field"
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("name", available_methods())
def test_a_docstring_explains_every_option(name):
    config = available_methods()[name]
    told = " ".join(cls.__doc__ or "" for cls in config.__mro__)
    missing = [field.name for field in fields(config) if f"    {field.name}: " not in told]
    assert not missing


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_files_that_a_text_links_to_are_there(path):
    """Files, no folders: those of other folders are copied into the site."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).is_file()]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_that_a_text_shows_exist_with_their_options(path):
    from typer.main import get_command

    commands = get_command(app).commands
    for block in re.findall(r"```\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.splitlines():
            if found := re.match(r"(?:\.venv/bin/)?dit-sparse +(\S+)([^#]*)", line):
                known = {flag for param in commands[found[1]].params for flag in param.opts}
                assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", found[2])) <= known, line


def test_the_races_name_every_method_that_needs_no_file():
    races = [tomllib.loads((ROOT / "samples" / f"{name}.toml").read_text()) for name in RACES]
    methods = {name for race in races for name in race["method"]} - {"own_rule.py"}
    assert methods == set(available_methods()) - {"sparse-vdit", "seerattention"}


def test_the_page_on_patterns_shows_the_samples():
    page = (ROOT / "docs" / "adding_a_pattern.md").read_text()
    for sample in ("own_rule.py", "race.toml"):
        assert f"\n{(ROOT / 'samples' / sample).read_text()}```\n" in page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'dit-sparse[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "own_block" in (tmp_path / "options.html").read_text()
    assert "enable_sparse_attention" in (tmp_path / "api.html").read_text()
    pages = "".join(page.read_text() for page in tmp_path.glob("*.html"))
    assert "{{" not in pages
    # Nothing is fetched from elsewhere when a page opens.
    assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', pages)
