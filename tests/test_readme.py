"""The README and the pages in docs/ do what they say.

```python blocks run in order, one namespace per page, in an empty folder and offline. A block after the comment
`<!-- skip-test: reason -->` is not run. Of ```bash blocks after `<!-- run -->`, the lines that begin with `cinetok ` run.
"""

import re
import shlex

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!--\s*(?P<comment>(?:run|skip-test:)[^>]*?)\s*-->[ \t]*\n)?"
    r"^```(?P<language>python|bash)[ \t]*\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text):
    """(language, comment or None, code, line number of the code) of every python and bash block."""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        yield match["language"], match["comment"], match["code"], line


def commands(code):
    """The lines of a shell block that call cinetok, with continued lines joined and comments dropped."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cinetok"]:
            yield words[1:]


def run_page(text, path):
    """Runs a page's blocks; returns how many ran."""
    namespace, count = {"__name__": "__main__"}, 0
    for language, comment, code, line in blocks(text):
        if language == "python":
            if comment and comment.startswith("skip-test:"):
                assert comment.removeprefix("skip-test:").strip(), f"{path}:{line}: say why the block is skipped"
                continue
            # blank lines in front make line numbers in tracebacks those of the page
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
            count += 1
        elif comment == "run":
            from cinetok.cli.main import main

            for words in commands(code):
                assert not main(words), f"{path}:{line}: cinetok {shlex.join(words)}"
                count += 1
    return count


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = path.read_text(encoding="utf-8")
    ran = run_page(text, path)
    if not ran:
        wanted = [block for block in blocks(text) if block[0] == "python" and not block[1]]
        assert not wanted
        pytest.skip("no block of this page runs without downloads")


def test_the_runner_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (
        "text\n```python\nx = 1\n```\nmore\n<!-- skip-test: needs the network -->\n```python\n1 / 0\n```\n"
        "```python\nprint('sum', x + 1)\n```\n```bash\ncinetok no-such-command\n```\n"
    )
    assert run_page(page, "page.md") == 2
    assert "sum 2" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        run_page(page.replace("skip-test: needs the network", "another comment"), "page.md")
    with pytest.raises(AssertionError, match="say why"):
        run_page(page.replace("needs the network", ""), "page.md")
    with pytest.raises((SystemExit, AssertionError)):
        run_page("<!-- run -->\n```bash\ncd somewhere\ncinetok no-such-command\n```\n", "page.md")
    assert list(commands("pip install x\ncinetok convert a \\\n  -o b  # comment\n")) == [["convert", "a", "-o", "b"]]
