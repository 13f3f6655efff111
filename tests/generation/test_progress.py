"""Progress: nothing for a short generation, a line now and then for a long one."""

import time

from lit_puzzle.generation.progress import Progress


def test_a_short_generation_says_nothing(capsys):
    progress = Progress(10)
    for finished in range(11):
        progress.update(finished, 100 * finished)
    assert capsys.readouterr() == ("", "")


def test_a_long_one_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("lit_puzzle.generation.progress.EVERY_SECONDS", 0.05)
    progress = Progress(2000)
    progress.begun -= 100
    time.sleep(0.06)
    progress.update(1500, 123456)
    progress.update(1501, 123500)  # too soon
    assert capsys.readouterr().err == "generated 1,500 of 2,000 completions, 123,456 tokens, 1,234 tokens/s\n"
