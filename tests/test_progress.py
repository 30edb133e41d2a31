"""Progress on a terminal, and none where there is none or it is not wanted."""

import io

from rich.console import Console

from dit_sparse.progress import Steps


def shown(console: Console) -> str:
    steps = Steps(2)
    steps.console = console
    with steps.clip("adaspa [0.2]", 4) as tick:
        for _ in range(3):
            tick()
    with steps.bar("metrics", 3) as tick:
        tick()
    return console.file.getvalue()


def test_a_terminal_shows_steps_and_the_time_left():
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=100))
    for words in ("[1/2] adaspa [0.2]", "3/4", "metrics", "1/3", "left"):
        assert words in text


def test_what_is_said_stays_on_one_line():
    steps, text = Steps(1), "a setting with a long name, " * 6 + "and its end"
    steps.console = Console(file=io.StringIO(), width=40)
    steps.say(text)
    assert steps.console.file.getvalue() == f"{text}\n"


def test_a_file_and_quiet_show_no_bar():
    assert shown(Console(file=io.StringIO())).strip() == ""
    assert Steps(1, quiet=True).console.quiet
