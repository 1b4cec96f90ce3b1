"""Resharding: the new folders hold about equal tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle.errors import RequestError, WorkError
from eagle.store.reader import FeatureStore
from eagle.store.record import Record
from eagle.store.reshard import preview, reshard
from eagle.store.writer import ShardWriter


def make_store(root, lengths, workers=3, shard_bytes=20_000):
    """A store of records of those lengths, one feature wide."""
    for worker in range(workers):
        writer = ShardWriter(root / str(worker), shard_bytes=shard_bytes)
        for number in range(worker, len(lengths), workers):
            length = int(lengths[number])
            ids, mask = torch.arange(length, dtype=torch.int32), torch.ones(length, dtype=torch.uint8)
            writer.add(Record(number, ids, mask, torch.full((length, 1), number, dtype=torch.bfloat16)))
            if writer.is_full:
                writer.close_shard()
        writer.close_shard()
    manifest = {"format_version": 1, "target": {"name": "t", "fingerprint": "f"}, "data": {"digest": "d"}}
    (root / "manifest.json").write_text(json.dumps({**manifest, "complete": True}))
    return root


def tokens_of(root, parts):
    return np.array([FeatureStore(root / str(part)).tokens for part in range(parts)])


@pytest.mark.parametrize("order", ["shuffled", "longest first"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_folders_hold_equal_tokens(tmp_path, parts, order):
    """Within 2% of their mean, whatever the lengths of many records and wherever the shards are cut."""
    lengths = np.random.RandomState(parts).lognormal(5.5, 1.2, 3000).clip(3, 2048).astype(int)
    if order == "longest first":
        lengths = np.sort(lengths)[::-1]
    root = make_store(tmp_path / "old", lengths)
    expected, _ = preview(root, tmp_path / "new", parts)
    summary = reshard(root, tmp_path / "new", parts)
    found = tokens_of(tmp_path / "new", parts)
    assert summary == expected
    assert [part.tokens for part in summary] == found.tolist()
    assert found.sum() == lengths.sum()
    assert abs(found / found.mean() - 1).max() < 0.02, found


@pytest.mark.parametrize("parts", [2, 4])
def test_a_record_larger_than_that_is_the_only_excuse(tmp_path, parts):
    lengths = np.random.RandomState(0).randint(3, 40, 60)
    lengths[31] = 900
    root = make_store(tmp_path / "old", lengths)
    reshard(root, tmp_path / "new", parts)
    found = tokens_of(tmp_path / "new", parts)
    assert abs(found - found.mean()).max() <= max(lengths.max(), 0.02 * found.mean())
    assert (found > 0).all()


def test_every_folder_gets_a_record(tmp_path):
    root = finished(tmp_path / "old", [2048, *[60] * 7])
    assert all(part.records == 1 for part in reshard(root, tmp_path / "new", 8))
    assert sorted(tokens_of(tmp_path / "new", 8)) == [*[60] * 7, 2048]


def test_an_unfinished_store_is_not_resharded_in_place(tmp_path):
    """Data generation could not go on in it; into another folder it may be."""
    root = make_store(tmp_path / "old", [5] * 12)
    content = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(content | {"complete": False}))
    before = sorted(root.rglob("*.safetensors"))
    with pytest.raises(RequestError, match="has not finished"):
        reshard(root, root, 2)
    assert sorted(root.rglob("*.safetensors")) == before
    assert sum(part.records for part in reshard(root, tmp_path / "new", 2)) == 12


def test_what_is_cut_off_a_large_file_is_one_file(tmp_path, monkeypatch):
    """However small shards are by default."""
    root = make_store(tmp_path / "old", [50] * 200, workers=1, shard_bytes=1 << 30)
    monkeypatch.setattr("eagle.store.writer.SHARD_BYTES", 1000)
    reshard(root, tmp_path / "new", 3)
    assert len(list((tmp_path / "new").rglob("shard-*.safetensors"))) == 3
    assert len(FeatureStore(tmp_path / "new")) == 200


def finished(root, lengths, **more):
    """A store whose manifest says what is in it."""
    make_store(root, lengths)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest |= {"records": len(lengths), "tokens": int(sum(lengths)), "supervised_tokens": int(sum(lengths)), **more}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_a_folder_behind_a_link_belongs_to_the_store(tmp_path):
    root = finished(tmp_path / "store", [20] * 12)
    (root / "1").rename(tmp_path / "elsewhere")
    (root / "1").symlink_to(tmp_path / "elsewhere")
    (root / "2" / "round").symlink_to(root)
    store = FeatureStore(root)
    assert len(store) == 12 and store.notes() == []
    with pytest.raises(RequestError, match=r"is behind a link, at .*elsewhere"):
        reshard(root, root, 2)
    reshard(root, tmp_path / "new", 2)
    assert len(FeatureStore(tmp_path / "new")) == 12 and (tmp_path / "elsewhere").is_dir()


def test_a_store_that_is_not_whole_is_said_to_be_and_not_resharded(tmp_path, capsys):
    root = finished(tmp_path / "store", [20] * 12)
    next((root / "1").glob("shard-*")).unlink()
    (note,) = FeatureStore(root).notes()[:1]
    assert "not all is there that was finished" in note and "should hold 12 records, but 8 are there" in note
    with pytest.raises(WorkError, match=r"is not whole: .*should hold 12 records, but 8 are there.*--skip_damaged"):
        reshard(root, tmp_path / "new", 2)
    assert not (tmp_path / "new").exists()
    reshard(root, tmp_path / "new", 2, leave_out_damaged=True)
    assert "should hold 12 records" in capsys.readouterr().out and len(FeatureStore(tmp_path / "new")) == 8
    assert len(FeatureStore(tmp_path / "new" / "0").notes()) == 0, "a folder of it is not the whole"


def test_what_nodes_lack_and_differ_in_is_not_forgotten(tmp_path, capsys):
    shared = {"num_nodes": 3, "conversations": 24, "shares": [0.5, 0.5]}
    for rank, seed in ((0, 1), (1, 2)):
        root, options = tmp_path / "job" / f"node-{rank}", shared | {"node_rank": rank, "seed": seed}
        records = [Record(12 * rank + one.conversation, one.input_ids, one.loss_mask, one.hidden_state)
                   for one in FeatureStore(make_store(tmp_path / f"node-{rank}", [20 + rank] * 12))]  # fmt: skip
        writer = ShardWriter(root / "0")
        for record in records:
            writer.add(record)
        writer.close_shard()
        manifest = json.loads((tmp_path / f"node-{rank}" / "manifest.json").read_text()) | {"options": options}
        manifest |= {"records": 12, "tokens": 12 * (20 + rank), "supervised_tokens": 12 * (20 + rank)}
        manifest["target"]["name"] = f"as node {rank} calls it"
        options["chat_template"] = f"{rank}/../t.jinja"
        manifest["tokenizer"] = {"digest": "t", "date": f"2026-07-0{1 + rank}"}
        (root / "manifest.json").write_text(json.dumps(manifest))
    notes = FeatureStore(tmp_path / "job").notes()
    assert any("node 2 of 3" in note for note in notes) and any("seed is 1 on node 0; 2 on node 1" in n for n in notes)
    assert any("date that the template writes is 2026-07-01 on node 0; 2026-07-02 on node 1" in note for note in notes)
    assert not any("jinja" in note for note in notes), "the template's text decides"
    with pytest.raises(RequestError, match="the store of node 2 of 3 is not below"):
        reshard(tmp_path / "job", tmp_path / "job", 2)
    capsys.readouterr()
    reshard(tmp_path / "job", tmp_path / "new", 2)
    said = capsys.readouterr().out
    again = FeatureStore(tmp_path / "new").notes()
    assert all(f"note: {note}" in said for note in notes)
    assert [note.replace(str(tmp_path / "new"), str(tmp_path / "job")) for note in again] == notes
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["supervised_tokens"] == 12 * 41


def test_dumps_beside_a_store_are_not_made_its_conversations(tmp_path):
    finished(tmp_path / "all" / "store", [20] * 6)
    old = tmp_path / "all" / "old"
    old.mkdir()
    for number in range(6):
        dump = {"input_ids": torch.arange(9), "loss_mask": torch.ones(9), "hidden_state": torch.zeros(9, 1)}
        torch.save({name: tensor.to(torch.bfloat16) if name == "hidden_state" else tensor
                    for name, tensor in dump.items()}, old / f"data_{number}.ckpt")  # fmt: skip
    assert len(FeatureStore(tmp_path / "all")) == 12
    with pytest.raises(RequestError, match="or dumps beside a store; reshard them one by one"):
        reshard(tmp_path / "all", tmp_path / "all", 2)
    assert len(FeatureStore(tmp_path / "all")) == 12


def test_a_store_that_was_made_anew_is_not_the_one_that_was_resharded(tmp_path, capsys):
    finished(tmp_path / "store", [20] * 12, dtype="bfloat16")
    reshard(tmp_path / "store", tmp_path / "new", 2)
    assert len(reshard(tmp_path / "store", tmp_path / "new", 2)) == 2
    assert "was made before, from the same store" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text()) | {"dtype": "float16"}
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match="is not empty"):
        reshard(tmp_path / "store", tmp_path / "new", 2)


def write_dumps(folder, value=0.0, count=6, length=9):
    """Dumps of one length, whose features are all that value."""
    folder.mkdir(exist_ok=True, parents=True)
    for number in range(count):
        hidden = torch.full((length, 1), value, dtype=torch.bfloat16)
        dump = {"input_ids": torch.arange(length), "loss_mask": torch.ones(length), "hidden_state": hidden}
        torch.save(dump, folder / f"data_{number}.ckpt")


def test_dumps_that_were_written_anew_are_not_the_ones_that_were_resharded(tmp_path, capsys):
    """Of the same path, names and sizes; also where they are what a resharded store was made of."""
    write_dumps(tmp_path / "dumps")
    reshard(tmp_path / "dumps", tmp_path / "new", 2)
    reshard(tmp_path / "new", tmp_path / "newer", 3)
    reshard(tmp_path / "dumps", tmp_path / "new", 2)
    reshard(tmp_path / "new", tmp_path / "newer", 3)
    assert capsys.readouterr().out.count("was made before, from the same store") == 2
    write_dumps(tmp_path / "dumps", 1.0)
    with pytest.raises(RequestError, match="is not empty"):
        reshard(tmp_path / "dumps", tmp_path / "new", 2)
    shutil.rmtree(tmp_path / "new")
    reshard(tmp_path / "dumps", tmp_path / "new", 2)
    with pytest.raises(RequestError, match="is not empty"):
        reshard(tmp_path / "new", tmp_path / "newer", 3)


def test_dumps_in_hidden_folders_are_not_of_the_store(tmp_path):
    """They are not read, and not deleted; a link that shows them is followed."""
    write_dumps(tmp_path / "dumps")
    write_dumps(tmp_path / "dumps" / ".trash", 1.0)
    kept = sorted((tmp_path / "dumps" / ".trash").iterdir())
    reshard(tmp_path / "dumps", tmp_path / "dumps", 2)
    assert len(FeatureStore(tmp_path / "dumps")) == 6
    assert sorted((tmp_path / "dumps" / ".trash").iterdir()) == kept
    (tmp_path / "links").mkdir()
    write_dumps(tmp_path / "links" / ".there")
    (tmp_path / "links" / "shown").symlink_to(tmp_path / "links" / ".there")
    assert len(FeatureStore(tmp_path / "links")) == 6


def test_without_a_word_on_what_was_resharded_nothing_was_made_before(tmp_path):
    """As 0.1.0 resharded dumps."""
    write_dumps(tmp_path / "dumps")
    reshard(tmp_path / "dumps", tmp_path / "new", 2)
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    del manifest["files_digest"]
    (tmp_path / "new" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match="is not empty"):
        reshard(tmp_path / "dumps", tmp_path / "new", 2)


@pytest.mark.parametrize("left", [".reshard-deleting", ".reshard-moving"])
def test_an_interrupted_reshard_is_seen_from_above_and_from_inside(tmp_path, monkeypatch, left):
    """Some of the records are in a folder that nobody reads, until the same command has finished."""
    stores = finished(tmp_path / "all" / "a", [20] * 12), make_store(tmp_path / "all" / "b", [20] * 12)
    root = stores[0]

    def stop(self, target):
        assert left not in self.parts, "interrupted"
        return done(self, target)

    name = "rename" if left == ".reshard-deleting" else "replace"  # the next thing that is done then
    with monkeypatch.context() as patched:
        done = getattr(Path, name)
        patched.setattr(Path, name, stop)
        with pytest.raises(AssertionError, match="interrupted"):
            reshard(root, root, 2)
    assert (root / left).is_dir()
    (tmp_path / "link").symlink_to(root)
    (root / "0").mkdir(exist_ok=True)
    for named in (root, tmp_path / "link", root / "0", root / "..", tmp_path, tmp_path / "all"):
        with pytest.raises(RequestError, match=r"resharding was interrupted .*run the same reassign_data_num") as said:
            FeatureStore(named)
        assert f"--tmpdir {named}: " in str(said.value)
    assert f"interrupted in {root}. " in str(said.value)
    assert len(FeatureStore(stores[1])) == 12, "what lies beside it may be read"
    reshard(root, root, 2)
    manifest = json.loads((stores[1] / "manifest.json").read_text()) | {"data": {"digest": "another"}}
    (stores[1] / "manifest.json").write_text(json.dumps(manifest))
    assert len(FeatureStore(tmp_path / "all")) == 24 and len(FeatureStore(root / "0")) == 6


@pytest.mark.parametrize("lost", ["shard-00000.safetensors", "done.json", "."])
def test_a_resharded_store_that_lost_something_is_not_called_made(tmp_path, lost):
    finished(tmp_path / "store", [20] * 12)
    expected = reshard(tmp_path / "store", tmp_path / "new", 2)
    path = tmp_path / "new" / "1" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    says = r"--new_folder .* was made before.* is not whole any more: .*1.* Delete it and run the same command again"
    for make in (reshard, preview):
        with pytest.raises(WorkError, match=says):
            make(tmp_path / "store", tmp_path / "new", 2)
    shutil.rmtree(tmp_path / "new")
    assert reshard(tmp_path / "store", tmp_path / "new", 2) == expected


def test_a_damaged_file_of_a_resharded_store_has_a_cure(tmp_path):
    finished(tmp_path / "store", [20] * 12)
    reshard(tmp_path / "store", tmp_path / "new", 2)
    path = tmp_path / "new" / "1" / "shard-00000.safetensors"
    content = path.read_bytes()
    path.unlink()  # it is the store's own, too
    path.write_bytes(content[:-9])
    with pytest.raises(WorkError, match=r"is damaged.*a resharded store is deleted whole and resharded again"):
        reshard(tmp_path / "store", tmp_path / "new", 2)


def test_a_plan_refuses_what_the_reshard_refuses(tmp_path):
    root = finished(tmp_path / "store", [20] * 12)
    finished(tmp_path / "both" / "store", [20] * 12)
    write_dumps(tmp_path / "both" / "dumps")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    made = reshard(root, tmp_path / "made", 2)
    assert preview(root, tmp_path / "made", 2) == (made, None)
    unfinished = make_store(tmp_path / "unfinished", [5] * 12)
    content = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps(content | {"complete": False}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for old, new, says in (
        (root, tmp_path / "used", "is not empty"),
        (root, tmp_path / "made", "is not empty"),
        (root, root / "inside", "lies inside"),
        (unfinished, unfinished, "has not finished"),
        (tmp_path / "both", tmp_path / "new", "or dumps beside a store"),
    ):
        with pytest.raises(RequestError, match=says):
            preview(old, new, 3)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "a plan changes nothing"


def test_which_records_they_are_is_known_however_they_are_cut(tmp_path):
    for name, lengths in (("store", [20, 21] * 6), ("swapped", [21, 20] * 6)):
        finished(tmp_path / name, lengths, tokenizer={"digest": "t"})
    reshard(tmp_path / "store", tmp_path / "new", 2)
    own = FeatureStore(tmp_path / "store").records_digest()
    assert own == FeatureStore(tmp_path / "new").records_digest()
    assert own != FeatureStore(tmp_path / "swapped").records_digest()
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    (tmp_path / "new" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": {"digest": "another"}}))
    assert FeatureStore(tmp_path / "new").records_digest() != own


@pytest.mark.parametrize("workers", [4, 12])
def test_dumps_in_another_order_are_other_records(tmp_path, workers):
    """Nothing says which conversations they are of; of more than ten workers, folder 10 was read before folder 2."""
    for worker in range(workers):
        write_dumps(tmp_path / "dumps" / str(worker), count=1, length=5 + worker)
    reshard(tmp_path / "dumps", tmp_path / "new", 2)
    old, new = FeatureStore(tmp_path / "dumps"), FeatureStore(tmp_path / "new")
    assert (old.records_digest() == new.records_digest()) == (old.lengths.tolist() == new.lengths.tolist())
    assert (old.records_digest() == new.records_digest()) == (workers == 4)


def test_tokens_behind_the_cut_are_not_counted(tmp_path):
    store = FeatureStore(make_store(tmp_path, [4, 9, 2]))
    assert store.token_counts(12).tolist() == [3, 3, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0]
    assert store.token_counts(12, 3).tolist() == [3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]
