"""The check that copied blocks agree finds one that does not, and mends it."""

import check_copies


ORIGINAL = """def first(unet):
    return unet + 1


class Second:
    value = "Model"
"""


def write(tmp_path, copy):
    (tmp_path / "original.py").write_text(ORIGINAL)
    (tmp_path / "copy.py").write_text(copy)
    return tmp_path / "copy.py"


def test_equal_copies_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(check_copies, "ROOT", tmp_path)
    copy = "# Copied from original.first\ndef first(unet):\n    return unet + 1\n"
    assert check_copies.check(write(tmp_path, copy), fix=False) == []


def test_changed_copy_is_found_and_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(check_copies, "ROOT", tmp_path)
    path = write(tmp_path, '# Copied from original.Second\nclass Second:\n    value = "Other"\n')
    assert check_copies.check(path, fix=False) == ["copy.py:1: differs from original.Second"]
    check_copies.check(path, fix=True)
    assert check_copies.check(path, fix=False) == [] and 'value = "Model"' in path.read_text()


def test_mark_without_an_original_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(check_copies, "ROOT", tmp_path)
    problems = check_copies.check(write(tmp_path, "# Copied from original.third\ndef third():\n    pass\n"), fix=False)
    assert len(problems) == 1 and "nothing of that name" in problems[0]
