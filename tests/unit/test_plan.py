"""The plan of a job: exact bytes, what is left after an interruption, and stopping when they do not fit."""

import dataclasses
import json
import re
import shutil

import pytest

from eagle.entry import run
from eagle.errors import RequestError, WorkError
from eagle.files import ROOT
from eagle.generate import main as allocation
from eagle.generate.job import claim_outdir, encode_job, finish, resolve
from eagle.generate.launch import worker_command
from eagle.generate.plan import dry_run_lines, make_plan, sized
from eagle.generate.progress import missing
from eagle.store.shard import shard_paths
from eagle.store.verify import check_store
from eagle.store.writer import shard_bytes_for
from eagle.target.compiled import WORTH_TOKENS, should_compile
from tests.tiny import conversations, cpu_worker, make_target, write_sharegpt
from tests.unit.config_cases import PARAMETERS, base, skip_unless_known
from tests.unit.test_job import inputs, request  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")


def run_worker(job, number):
    list(cpu_worker(job.request.folder, number).work(1))


@pytest.mark.parametrize("store_dtype", ["same", "int8", "float8"])
def test_bytes_are_what_the_store_takes(tmp_path, inputs, store_dtype):  # noqa: F811
    job = resolve(request(inputs, tmp_path / "store", npu_indices=(0, 1), store_dtype=store_dtype))
    claim_outdir(job)
    tokens = encode_job(job)
    plan = make_plan(job, tokens)
    assert plan.tokens == sum(worker.tokens for worker in plan.workers)
    for number in (0, 1):
        run_worker(job, number)
    manifest = finish(job)
    assert manifest["tokens"] == plan.tokens
    written = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.safetensors"))
    assert 0 <= plan.bytes - written <= 2 * 2 * 2048, "room for the headers, no more"
    assert 0 <= written - plan.tokens * plan.token_bytes <= 2 * 2 * 2048, "and an index of the records"


def test_the_documented_bytes_a_token(tmp_path):
    """docs/features.md says what a token of a base model of hidden size 4096 takes, for every kind of draft."""
    model = make_target(tmp_path / "model", layers=8, hidden=4096, intermediate_size=64, head_dim=16)
    data = write_sharegpt(tmp_path / "data.json", conversations(2))
    planned = []
    for number, draft in enumerate(("eagle1", "eagle3")):
        for store_dtype in ("same", "int8", "float8"):
            job = resolve(request((model, data), tmp_path / "store", draft=draft, store_dtype=store_dtype))
            plan = make_plan(job, encode_job(job, save=False))
            assert f"{plan.token_bytes:,} bytes a token" in plan.lines()[1]
            planned.append((number, store_dtype, plan.token_bytes))
    for page in ("features.md", "features.zh-CN.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        rows = re.findall(r"^\| `(eagle\d)`.*?\| ([\d,]+) \| ([\d,]+) \|$", text, re.MULTILINE)
        columns = {"same": 1, "int8": 2, "float8": 2}
        assert [row[0] for row in rows] == ["eagle1", "eagle3"], page
        assert [size for *_, size in planned] == [int(rows[n][columns[d]].replace(",", "")) for n, d, _ in planned]


@pytest.mark.parametrize(
    ("total", "mib"),
    [(0, 128), (2000 * 128 << 20, 128), ((2000 * 128 << 20) + 1, 129), (2000 * 500 << 20, 500), (1 << 44, 1024)],
)
def test_shards_grow_with_what_a_worker_writes(total, mib):
    assert shard_bytes_for(total) == mib << 20


def test_the_size_of_shards_is_the_jobs(tmp_path, inputs, monkeypatch):  # noqa: F811
    """The same when it goes on; what was asked for is left as it is; workers are told, and so is the user."""
    monkeypatch.setattr("eagle.generate.plan.shard_bytes_for", lambda total: (total // 1000) << 20)
    job = resolve(request(inputs, tmp_path / "store", npu_indices=(0, 1)))
    claim_outdir(job)
    tokens = encode_job(job)
    before = sized(job, tokens).request.shard_mb
    assert before == pytest.approx(make_plan(job, tokens).bytes / 2 / 1000, rel=0.1) and before > 10
    run_worker(job, 0)
    assert sized(job, tokens).request.shard_mb == before == make_plan(job, tokens).shard_mb
    assert f", in files of {before} MB; " in " ".join(make_plan(job, tokens).lines())
    command = worker_command(sized(job, tokens), 1)
    assert command[command.index("--shard_mb") + 1] == str(before)
    asked = resolve(request(inputs, tmp_path / "other", shard_mb=7))
    assert sized(asked, tokens).request.shard_mb == make_plan(asked, tokens).shard_mb == 7


def test_what_is_done_is_not_planned_again(tmp_path, inputs):  # noqa: F811
    job = resolve(request(inputs, tmp_path / "store", npu_indices=(0, 1)))
    claim_outdir(job)
    tokens = encode_job(job)
    before = make_plan(job, tokens)
    run_worker(job, 0)
    after = make_plan(job, tokens)
    assert (after.workers[0].tokens, after.workers[0].bytes) == (0, 0)
    assert after.workers[1] == before.workers[1]
    assert missing(tmp_path / "store" / "0")[-1].begin.tokens == before.workers[0].tokens


def test_a_store_that_does_not_fit_is_refused(tmp_path, inputs):  # noqa: F811
    job = resolve(request(inputs, tmp_path / "store"))
    plan = make_plan(job, encode_job(job, save=False))
    plan.check_space(tmp_path)
    with pytest.raises(WorkError, match=r"its disk has 0.0 MB free.*--store_dtype int8 needs .*--end_num"):
        dataclasses.replace(plan, free=1).check_space(tmp_path)
    assert not (tmp_path / "store").exists()


def test_dry_run_writes_nothing(tmp_path, inputs, monkeypatch):  # noqa: F811
    monkeypatch.setattr("eagle.generate.plan.PROBE_SECONDS", 0.1)
    job = resolve(request(inputs, tmp_path / "store", npu_indices=(0, 1)))
    tokens = encode_job(job, save=False)
    lines = dry_run_lines(job, make_plan(job, tokens), tokens)
    assert "--worker 1" in lines[1] and "OMP_NUM_THREADS=" in lines[1] and "THP_MEM_ALLOC_ENABLE=" in lines[1]
    assert lines[2] == "base model: 32,160 values without its lm_head, 0.1 MB in bfloat16 for every worker"
    assert "tokens/s by each of 2 workers" in lines[3]
    assert not (tmp_path / "store").exists()


def test_dry_run_of_a_store_that_is_there(tmp_path, inputs, monkeypatch, capsys):  # noqa: F811
    """Finished, with other options, on a full disk: every file stays as it is, and none is added."""
    monkeypatch.setattr("eagle.generate.plan.PROBE_SECONDS", 0.1)
    job = resolve(request(inputs, tmp_path / "store"))
    claim_outdir(job)
    encode_job(job)
    run_worker(job, 0)
    finish(job)

    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "store").rglob("*")}

    def dry_run(*more, outdir="store"):
        words = ["--model_name", inputs[0], "--data_path", inputs[1], "--outdir", tmp_path / outdir, "--device", "cpu"]
        code = run(lambda: allocation.main([*map(str, [*words, *more]), "--dry_run"]))
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    before = files()
    code, out, _ = dry_run()
    assert code == 0 and "nothing is left to compute" in out
    code, _, err = dry_run("--max_length", 64)
    assert code == 2 and "max_length was 2048, now 64" in err
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    code, out, err = dry_run(outdir="new")
    assert code == 1 and "worker 0: " in out and "its disk has 0.0 MB free" in err
    assert files() == before and not (tmp_path / "new").exists()


def test_dry_run_of_nothing(tmp_path, inputs):  # noqa: F811
    """Conversations of which none can be used."""
    empty = write_sharegpt(tmp_path / "empty.json", [{"conversations": []}] * 3)
    job = resolve(request((inputs[0], empty), tmp_path / "store"))
    tokens = encode_job(job, save=False)
    lines = dry_run_lines(job, make_plan(job, tokens), tokens)
    assert lines[2] == "nothing is left to compute" and "3  " in lines[3] and lines[-1].startswith("dry run")


@pytest.mark.parametrize("name", ["llama_3.1_8B", "qwen3_8B"])
def test_a_plan_of_a_model_that_is_not_here_yet(tmp_path, inputs, name, capsys):  # noqa: F811
    """From config.json and tokenizer alone: disk, memory, and no time."""
    skip_unless_known(name)
    model = tmp_path / "model"
    shutil.copytree(inputs[0], model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (model / "config.json").write_text(json.dumps(base(name)))
    arguments = ["--outdir", str(tmp_path / "store"), "--model_name", str(model), "--data_path", str(inputs[1])]
    arguments += ["--device", "cpu", "--chat_template", "chatml"]
    assert allocation.main([*arguments, "--used_npus", "4", "--npu_indices", "0,1,2,3", "--dry_run"]) == 0
    found = capsys.readouterr().out
    values = PARAMETERS[name] - base(name)["vocab_size"] * 4096  # neither is tied
    assert f"base model: {values:,} values without its lm_head, {values * 2 / 1e9:.2f} GB in bfloat16" in found
    assert "8,197 bytes a token" in found and f"no probe, and so no time: {model} holds no weights" in found
    assert not (tmp_path / "store").exists()
    with pytest.raises((RequestError, FileNotFoundError), match="weights"):
        allocation.main(arguments)


def test_nodes_share_a_job(tmp_path, inputs):  # noqa: F811
    """On a shared disk the nodes' folders lie side by side and are one store."""
    from eagle.store.reader import FeatureStore

    def store(root, **changes):
        job = resolve(request(inputs, root, dtype="float32", batch_tokens=1, **changes))
        claim_outdir(job)
        encode_job(job)
        for number in range(len(job.groups)):
            run_worker(job, number)
        finish(job)
        return job

    store(tmp_path / "one")
    jobs = [
        store(tmp_path / "many", num_nodes=3, node_rank=rank, npu_indices=tuple(range(1 + rank))) for rank in range(3)
    ]
    assert sum(job.conversations for job in jobs) == 20
    one, many = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "many")
    assert [(r.conversation, r.crc32()) for r in one] == [(r.conversation, r.crc32()) for r in many]
    assert not many.notes() and check_store(tmp_path / "many").complete
    shutil.rmtree(tmp_path / "many" / "node-1")
    assert FeatureStore(tmp_path / "many").notes() == [f"the store of node 1 of 3 is not below {tmp_path / 'many'}"]
    found = check_store(tmp_path / "many")
    assert not found.complete and "the store of node 1 of 3 is not here" in found.lines()
    store(tmp_path / "many", num_nodes=3, node_rank=1, max_length=20, npu_indices=(0, 1))
    (note,) = FeatureStore(tmp_path / "many").notes()
    said = "the nodes' stores were made with different options: max_length is {} on node 0, 2; 20 on node 1"
    assert note == said.format(jobs[0].request.max_length)
    assert note in check_store(tmp_path / "many").lines()


def test_what_a_worker_died_of_behind_its_back_is_raised(tmp_path, inputs, monkeypatch):  # noqa: F811
    job = resolve(request(inputs, tmp_path / "store"))
    claim_outdir(job)
    encode_job(job)
    (tmp_path / "store" / "0").mkdir()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eagle.store.shard.write_pieces", full)
    with pytest.raises(WorkError, match=r"Could not write .*No space left"):
        run_worker(job, 0)
    assert not shard_paths(tmp_path / "store" / "0")


@pytest.mark.parametrize(
    ("mode", "kind", "tokens", "expected"),
    [
        ("off", "cuda", 10**12, False),
        ("auto", "npu", 10**12, False),
        ("auto", "cpu", 10**12, False),
        ("auto", "cuda", WORTH_TOKENS - 1, False),
        ("auto", "cuda", WORTH_TOKENS, True),
        ("on", "cuda", 1, True),
    ],
)
def test_when_to_compile(mode, kind, tokens, expected, monkeypatch):
    monkeypatch.setattr("eagle.target.compiled._missing", lambda kind: None)
    assert should_compile(mode, kind, tokens) is expected


def test_compiling_where_it_cannot_be(monkeypatch):
    from eagle.errors import RequestError

    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert should_compile("auto", "cuda", 10**12) is False
    with pytest.raises(RequestError, match=r"--compile on: there is no C\+\+ compiler"):
        should_compile("on", "cpu", 10)
    with pytest.raises(RequestError, match="no backend for NPUs"):
        should_compile("on", "npu", 10)
