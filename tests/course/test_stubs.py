"""Stubs are the cut solutions, and nothing a learner wrote is ever lost."""

import pytest

from fa_reference import stubs
from fa_reference.course import CHAPTERS, Chapter

SOLUTION = '''"""A chapter."""


def double(x):
    """2 x."""
    # BEGIN SOLUTION: return two times x,
    #: and nothing else
    y = 2 * x
    return y
    # END SOLUTION


def given(x):
    return x
'''


def test_a_region_becomes_an_error_that_says_what_to_write():
    stub = stubs.cut(SOLUTION, "a.py")
    assert "2 * x\n" not in stub and "return y" not in stub and "return x" in stub and "# TODO" in stub
    space = {}
    exec(stub, space)
    with pytest.raises(NotImplementedError, match="a.py: return two times x, and nothing else"):
        space["double"](3)


def test_other_languages():
    triton = stubs.cut("def k():\n    # BEGIN SOLUTION(triton): load it\n    x\n    # END SOLUTION\n", "k.py")
    assert "tl.static_assert(" in triton and '"k.py: load it"' in triton
    compile(triton, "k.py", "exec")
    cuda = stubs.cut("  // BEGIN SOLUTION: load it\n  x;\n  // END SOLUTION\n", "k.cu")
    assert cuda == "  // TODO: load it\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("# BEGIN SOLUTION: a\nx\n", "no END SOLUTION"),
        ("# END SOLUTION\n", "END SOLUTION without BEGIN"),
        ("# BEGIN SOLUTION: a\n# BEGIN SOLUTION: b\n", "inside the region that began on line 1"),
        ("# BEGIN SOLUTION\n", "not a marker"),
    ],
)
def test_broken_markers_are_refused(source, words):
    with pytest.raises(stubs.StubError, match=words):
        stubs.cut(source, "a.py")


def test_committed_stubs_equal_cut_solutions(committed_chapters):
    assert stubs.drifted(committed_chapters) == []


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of one chapter in a folder of its own."""
    for name in ("chapters", "solutions"):
        (tmp_path / name / "01_double").mkdir(parents=True)
    (tmp_path / "solutions" / "01_double" / "a.py").write_text(SOLUTION)
    where = Chapter(1, "double", "Doubling", 1.0, ("a.py",))
    monkeypatch.setattr(Chapter, "room", property(lambda self: tmp_path / "chapters" / self.folder), raising=False)
    monkeypatch.setattr(Chapter, "solution", property(lambda self: tmp_path / "solutions" / self.folder))
    monkeypatch.setattr(stubs, "CHAPTERS", (where,))
    monkeypatch.setattr(stubs, "chapter", lambda number: where)
    monkeypatch.setattr(stubs, "ROOT", tmp_path)
    monkeypatch.setattr(stubs, "LEDGER", tmp_path / "chapters" / ".stubs.json")
    monkeypatch.setattr(stubs, "BACKUPS", tmp_path / ".course" / "backup")
    assert stubs.generate() == 0
    return tmp_path


def test_generating_keeps_a_learners_file(course, capsys):
    mine = course / "chapters" / "01_double" / "a.py"
    mine.write_text(mine.read_text() + "# my work\n")
    stubs.generate()
    assert mine.read_text().endswith("# my work\n")
    assert "kept, as you changed it" in capsys.readouterr().out
    assert (course / "chapters" / "01_double" / "a.py.new").exists()


def test_generating_updates_an_untouched_stub(course):
    solution = course / "solutions" / "01_double" / "a.py"
    solution.write_text(SOLUTION.replace("A chapter", "A better chapter"))
    stubs.generate()
    assert "A better chapter" in (course / "chapters" / "01_double" / "a.py").read_text()
    assert not (course / "chapters" / "01_double" / "a.py.new").exists()


def test_reset_keeps_a_backup_each_time(course, capsys):
    mine = course / "chapters" / "01_double" / "a.py"
    stub = mine.read_text()
    for work in ("first", "second"):
        mine.write_text(work)
        assert stubs.reset(1) == 0
        assert mine.read_text() == stub
    kept = sorted(p.read_text() for p in (course / ".course" / "backup").rglob("a.py"))
    assert kept == ["first", "second"]
    assert ".course/backup/01_double" in capsys.readouterr().out
    stubs.reset(1)
    assert len(list((course / ".course" / "backup").rglob("a.py"))) == 2, "an untouched stub needs no backup"


def test_given_files_come_whole(course):
    where = Chapter(1, "double", "Doubling", 1.0, ("a.py",), ("host.py",))
    (where.solution / "host.py").write_text("HOST = 1\n")
    stubs.write_stubs(where, where.room)
    assert (where.room / "host.py").read_text() == "HOST = 1\n"


def test_every_learners_file_has_a_region():
    for where in CHAPTERS:
        for file in where.files:
            text = stubs.stub_text(where, file)
            todo = "// TODO" if file.endswith((".cu", ".cuh")) else "# TODO"
            assert todo in text, f"{file} leaves the learner nothing to write"
            if file.endswith(".py"):
                compile(text, file, "exec")
