"""Lines in the place of a bar where nobody would see one."""

import pytest

from fastdet.engine.run import progress


def test_lines_come_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress(100, 20, shown=True) as bar:
        bar.set_description("epoch 1 of 2")
        for _ in range(4):
            now[0] += 20
            bar.update(10)
            bar.set_postfix_str("loss 1.5")
        bar.write("evaluated")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "epoch 1 of 2: 30 of 100 images",
        "epoch 1 of 2: 50 of 100 images",
        "evaluated",
    ]
    assert "0.5 images/s, 1.7 minutes left, loss 1.5" in lines[1]
    assert bar.n == 60


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_it_is_not_wanted(monkeypatch, capsys, terminal):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress.show_progress(10, 0, shown=False) as bar:
        bar.set_description("epoch")
        bar.update(4)
        bar.set_postfix_str("loss 1")
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.show_progress(10, 0, shown=True) as bar:
        bar.set_description("epoch 1 of 1")
        bar.update(4)
    assert "epoch 1 of 1:  40%" in capsys.readouterr().err.replace("\r", "\n")
