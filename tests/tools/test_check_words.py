"""The list of words finds what it replaces."""

import pytest

from tools.check_words import findings

WORD = "taken"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.md", f"# Speed\n\n| 1 x 2000 proposals, 128 {WORD} | 0.26 |\n", 3),
        ("a.py", f'size = "18648 anchors, 128 {WORD}"\n', 1),
        ("a.md", f"The steps {WORD}, 128 drawn.\n", None),
    ],
)
def test_a_count_of_what_is_drawn(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    found = [found[:2] for found in findings(tmp_path / name)]
    assert found == ([(line, f"128 {WORD}")] if line else [])
