"""The run folder: atomic, locked, whole or not done."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from robustkit.data.content import content_hash
from robustkit.errors import RobustkitError, UsageError
from robustkit.store import EventLog, Store, forget, write_atomic, write_json


def test_a_step_is_done_only_after_finish(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_arrays("a", "outcome.npz", {"correct": np.array([True, False])})
    assert not store.done("a")
    store.finish("a", {"seconds": 1.5}, ("outcome.npz",))
    assert store.done("a")
    record = store.record("a")
    assert record is not None
    assert record["seconds"] == 1.5
    assert store.read_arrays("a", "outcome.npz")["correct"].tolist() == [True, False]


@pytest.mark.parametrize("damage", ["truncate", "delete", "record"])
def test_a_step_with_a_broken_file_is_not_done(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.write_arrays("a", "outcome.npz", {"correct": np.ones(100, dtype=bool)})
    store.finish("a", {}, ("outcome.npz",))
    path = store.step("a") / "outcome.npz"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "delete":
        path.unlink()
    else:
        (store.step("a") / "record.json").write_text('{"files": [1]')
    assert not store.done("a")


@pytest.mark.parametrize("record", ["[]", "null", '"x"', '{"files": 3}', '{"files": {"../../x": "00"}}', "{}"])
def test_a_hostile_record_is_not_done(tmp_path: Path, record: str) -> None:
    store = Store(tmp_path)
    store.step("a").mkdir(parents=True)
    (store.step("a") / "record.json").write_text(record)
    assert not store.done("a")


def _hold(folder: Path, ready: object, release: object) -> None:
    with Store(folder).lock():
        ready.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, release))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UsageError, match="in use"), Store(tmp_path).lock():
            raise AssertionError("two processes hold one folder")
    finally:
        release.set()
        other.join()
    with Store(tmp_path).lock():
        assert (tmp_path / ".lock").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def broken(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(Exception, match="disk full"):
        write_atomic(path, b"new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_a_write_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("file.json", f".file.json.{os.getpid()}.tmp"):
        (folder / name).symlink_to(outside)
    write_json(folder / "file.json", 1)
    assert outside.read_text() == "precious"
    assert not (folder / "file.json").is_symlink()


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/run", "/proc/nope"])
def test_a_folder_that_cannot_be_is_named(folder: str) -> None:
    with pytest.raises(RobustkitError, match=f"{folder}/file.json: cannot be written"):
        write_json(Path(folder) / "file.json", 1)
    with pytest.raises(RobustkitError, match=r"events\.jsonl: cannot be written"):
        EventLog(Path(folder) / "events.jsonl")
    with pytest.raises(UsageError, match=f"{folder}: cannot be the folder of a run"), Store(Path(folder)).lock():
        pass


def test_content_is_hashed_where_no_cache_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    known = content_hash([tmp_path / "a.bin"])
    monkeypatch.setenv("ROBUSTKIT_CACHE", "/dev/null/x")
    assert content_hash([tmp_path / "a.bin"]) == known


def test_a_torn_last_line_does_not_swallow_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "done"}\n{"event": "ep')
    log = EventLog(path)
    log.write("again", {"n": 1})
    log.close()
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "again"
    assert len(lines) == 3


def test_forget_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not the folder of a run"):
        forget(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_forget_removes_steps_and_results(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.finish("a", {})
    EventLog(tmp_path / "events.jsonl").close()
    forget(tmp_path)
    assert not store.done("a")
