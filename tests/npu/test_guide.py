"""Every command of docs/ascend.md, in order and as it is written, on the simulated device.

What a user fills in is replaced (`replacements`). Programs that are not ours are stand-ins, which check what they are
given (`tests/npu/stand_ins.py`). No block of shell is left out; commands within a paragraph are not run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eagle.files import ROOT
from eagle.store.reader import FeatureStore
from tests.npu.guide import COUNT, Typist, checkout, data, free_port, losses, served, target
from tests.npu.simulated import environment
from tests.pages import shell_blocks
from tests.tiny import conversations, write_sharegpt

GUIDE = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
#: Where the second half begins: it needs nothing of the first but conversations, so that both may run side by side.
HALF = GUIDE.index("\n## 13. ")


def replacements(work: Path) -> dict[str, str]:
    return {
        "source /usr/local/Ascend/": f"source {work}/Ascend/",
        "MAIN_IP=10.0.0.1": "MAIN_IP=127.0.0.1",
        "SOCKET_IFNAME=eth0": "SOCKET_IFNAME=lo",
        "29500": str(free_port()),
        "export CARDS=8  ": "export CARDS=1  ",  # of each of two machines
        "export CARDS=8\n": "export CARDS=2\n",
    }


def typist(work: Path) -> Typist:
    checkout(work)
    data(work)
    return Typist(work, environment(cards=8), replacements(work), machines=2)


def type_all(shell: Typist, text: str) -> str:
    return "".join(map(shell.type, shell_blocks(text)))


def workers(said: str) -> list[int]:
    """How many each data generation started on NPUs, and none elsewhere."""
    assert "on cpu" not in said
    return [int(count) for count in re.findall(r"(\d+) worker\(s\) on npu", said)]


def trainings(said: str) -> list[str]:
    return re.findall(r"sequences on (\d+ x \w+)", said)


def learns(found: list[float]) -> bool:
    """Whether the last quarter of the losses is lower than the first."""
    part = len(found) // 4
    return sum(found[-part:]) < sum(found[:part])


def test_from_the_container_to_a_served_draft(tmp_path: Path) -> None:
    shell = typist(tmp_path)
    target(tmp_path, "llama-2-7b-chat", "llama_2_chat_7B_config.json")
    target(tmp_path, "Qwen2.5-7B-Instruct", "qwen2_7B_config.json", "qwen2")
    said = type_all(shell, GUIDE[:HALF])

    assert workers(said) == [1, 8, 8]  # the trial's, the dry run's, the job's
    assert trainings(said) == ["2 x npu", "1 x npu", "1 x npu", "1 x npu"]
    assert len(FeatureStore(tmp_path / "trial_tp8")) == len(FeatureStore(tmp_path / "features")) == COUNT
    for name in ("trial_checkpoints", "checkpoints", "checkpoints-one", "checkpoints-qwen"):
        assert learns(losses(tmp_path / name)), name
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert "npu" in json.dumps(report)
    assert "vllm:spec_decode_num_accepted_tokens" in said
    assert "loaded    yes, by vLLM 0.13.0 on npu: bfloat16" in said


@pytest.mark.long
def test_70b_and_several_machines(tmp_path: Path) -> None:
    shell = typist(tmp_path)
    target(tmp_path, "llama-2-70b-chat", "llama_2_chat_70B_config.json", layers=4)
    write_sharegpt(tmp_path / "sharegpt.json", conversations(COUNT, turns=1))
    said = type_all(shell, GUIDE[HALF:])

    assert workers(said) == [2, 2, 2]
    assert trainings(said) == ["2 x npu", "2 x npu"]
    assert len(FeatureStore(tmp_path / "features-two")) == COUNT
    assert sorted(path.name for path in (tmp_path / "features-two").glob("node-*")) == ["node-0", "node-1"]
    for name in ("checkpoints-70b", "checkpoints-two"):
        assert learns(losses(tmp_path / name)), name


@pytest.mark.parametrize(
    ("written", "misspelt"),
    [
        ("--device /dev/hisi_hdc", "--device /dev/hisi_hcd"),
        ("docker run --rm", "docker run --rn"),
        ("-v /usr/local/dcmi:/usr/local/dcmi", "-v /usr/local/dcmi:/usr/local/dcm"),
        ("npu-smi info", "npu-smi inf"),
        ("source /usr/local/Ascend/cann/", "source /usr/local/Ascend/can/"),
        ("pip install -r requirements-", "pip install -r requirement-"),
        ("|numpy|transformers", "|numpi|transformers"),
        ("tools/sharegpt_convert.py", "tools/sharegpt_converter.py"),
        ("--output sharegpt.json", "--ouput sharegpt.json"),
        ("curl -s http", "curl -S http"),
        ("grep vllm:spec_decode_num", "grep vllm:specdecode"),
        ("vllm serve ./llama", "vllm server ./llama"),
        ('"method": "eagle"', '"method": "eagel"'),
        ("--speculative-model", "--speculative-modle"),
    ],
)
def test_a_misspelt_command_is_noticed(tmp_path: Path, written: str, misspelt: str) -> None:
    """And only because it is misspelt."""
    block = next(block for block in shell_blocks(GUIDE) if written in block)
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
        served(tmp_path / name)
    typist(tmp_path / "right").type(block)
    with pytest.raises(AssertionError, match="exit code"):
        typist(tmp_path / "wrong").type(block.replace(written, misspelt))


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "written", "misspelt", "says"),
    [
        ("python -m eagle.device", "--device", "--devise", "unrecognized arguments: --devise"),
        ("python -m eagle.data.viewer", "--num ", "--nun ", "unrecognized arguments: --nun"),
        ("python allocation.py", "--used_npus", "--used_npsu", "unrecognized arguments: --used_npsu"),
        ("python reassign_data_num.py", "--old_folder", "--old_flder", "required: --old_folder"),
        ("accelerate launch", "--tmpdir", "--tmpdri", "unrecognized arguments: --tmpdri"),
        ("python -m eagle.store.verify", "eagle.store", "eagle.stor", "No module named 'eagle.stor'"),
        ("python -m eagle.evaluate", "--num_turns", "--num_tunrs", "unrecognized arguments: --num_tunrs"),
        ("python convert_eagle", "--base-weight-name", "--base-weigth-name", "unrecognized arguments: --base-weigth"),
        (
            "python -m eagle.vllm.verify",
            "--enforce-eager",
            "--enforce-eagre",
            "unrecognized arguments: --enforce-eagre",
        ),
    ],
)
def test_a_misspelt_command_of_ours_says_so(
    tmp_path: Path, command: str, written: str, misspelt: str, says: str
) -> None:
    commands = (line for block in shell_blocks(GUIDE) for line in re.split(r"\n(?! )", block))
    line = next(line for line in commands if line.startswith(command) and written in line)
    with pytest.raises(AssertionError, match="exit code") as failed:
        typist(tmp_path).type(line.replace(written, misspelt))
    assert says in str(failed.value)
