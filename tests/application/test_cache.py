"""Folders that are made once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hift_lightning.cache import cache_root, made_once
from hift_lightning.engine.errors import ConfigurationError


class Maker:
    """Writes two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "numbers").write_bytes(bytes(range(100)))
        (folder / "words").write_text("once")


def test_a_folder_is_made_once_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    make = Maker()
    folder = tmp_path / "cache" / "made"
    assert made_once(folder, make, "data.cache_dir") == made_once(folder, make, "data.cache_dir") == folder
    assert make.calls == 1
    assert (folder / "words").read_text() == "once"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("damage", ["cut", "flipped", "lost", "manifest"])
def test_a_broken_folder_is_told_and_made_anew(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hift_lightning.cache.rank_zero_info", told.append)
    make = Maker()
    folder = made_once(tmp_path / "made", make, "data.cache_dir")
    numbers = folder / "numbers"
    if damage == "cut":
        numbers.write_bytes(numbers.read_bytes()[:50])
    elif damage == "flipped":
        numbers.write_bytes(bytes(reversed(range(100))))
    elif damage == "lost":
        numbers.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    made_once(folder, make, "data.cache_dir")
    assert make.calls == 2
    assert numbers.read_bytes() == bytes(range(100))
    (message,) = told
    assert str(folder) in message
    assert "made anew" in message


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        made_once(tmp_path / "made", fail, "data.cache_dir")
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_it_at_one_time_the_first_wins(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=30)
    wrote: list[str] = []

    def make(folder: Path) -> None:
        both.wait()
        wrote.append(threading.current_thread().name)
        (folder / "words").write_text("the same")

    threads = [threading.Thread(target=made_once, args=(tmp_path / "made", make, "data.cache_dir")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrote) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "words").read_text() == "the same"


def test_a_cache_that_cannot_be_written_is_told_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigurationError, match=r"cannot be written.*data\.cache_dir=/path/to/folder"):
        made_once(tmp_path / "file" / "made", Maker(), "data.cache_dir")


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root(None) == Path("/somewhere/hift_lightning")
    assert cache_root("/elsewhere") == Path("/elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == Path.home() / ".cache" / "hift_lightning"


def test_what_one_user_has_made_others_may_read_and_not_change(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        Maker()(folder)
        (folder / "words").chmod(0o600)  # as safetensors makes its files

    (tmp_path / "shared").mkdir()
    for mode, made in ((0o1777, 0o755), (0o750, 0o750), (0o700, 0o700)):
        (tmp_path / "shared").chmod(mode)
        folder = made_once(tmp_path / "shared" / f"made-{mode:o}", private, "data.cache_dir")
        assert folder.stat().st_mode & 0o777 == made
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {made & 0o644}


def test_a_folder_that_may_not_be_read_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    folder = made_once(tmp_path / "made", make, "data.cache_dir")

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigurationError, match=r"made` cannot be read \(Permission denied\).*data\.cache_dir="):
        made_once(folder, make, "data.cache_dir")
    assert make.calls == 1


def test_what_a_killed_run_was_making_goes_and_what_another_is_making_stays(tmp_path: Path) -> None:
    folder = tmp_path / "made [1]"
    script = f"""
import os, signal, time
from hift_lightning.cache import made_once
from pathlib import Path
def make(target):
    (target / "half").write_text("half")
    print("begun", flush=True)
    time.sleep(60)
made_once(Path({str(folder)!r}), make, "data.cache_dir")
"""
    runs = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "begun\n"
    assert len(list(tmp_path.iterdir())) == 2
    runs[0].kill()
    runs[0].wait()
    made_once(folder, Maker(), "data.cache_dir")
    left = {path.name for path in tmp_path.iterdir()}
    runs[1].kill()
    runs[1].wait()
    assert folder.name in left
    assert len(left) == 2
    assert {path.name for path in folder.iterdir()} == {"numbers", "words", "manifest.json"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_on_windows_no_file_in_a_folder_is_open_when_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, seen = Path.rename, []

    def look(self: Path, target: Path) -> Path:
        seen.append([os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)])
        return rename(self, target)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "rename", look)
    made_once(tmp_path / "made", Maker(), "data.cache_dir")
    (files,) = seen
    assert not [file for file in files if file.startswith(str(tmp_path))]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")
