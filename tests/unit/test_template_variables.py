"""``--chat_template_kwargs``: what is refused, and what it is part of; models whose template is not guessed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eagle.data import viewer
from eagle.data.chat_template import FOREIGN_TOKENS, choose_template
from eagle.data.loss_mask import load_encoder
from eagle.data.template_variables import parse_kwargs, variables_of
from eagle.data.tokens import key_of
from eagle.entry import run
from eagle.errors import RequestError
from eagle.generate import main as generate
from eagle.generate.job import check_outdir, claim_outdir, resolve
from eagle.generate.request import GenerationRequest
from eagle.store.manifest import MANIFEST
from eagle.target.config import load_config
from eagle.target.families import TARGET_FAMILIES
from eagle.train.arguments import read_options
from eagle.train.live_features import LiveFeatures, LiveSource
from tests.tiny import byte_level_tokenizer, conversations, make_target, write_sharegpt
from tests.unit.family_templates import QWEN_3
from tests.unit.test_job import finish_a_shard

OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with a template that asks for ``enable_thinking``."""
    folder = make_target(tmp_path_factory.mktemp("variables") / "model", "qwen2")
    (folder / "chat_template.jinja").write_text(QWEN_3, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharegpt(tmp_path_factory.mktemp("variables") / "d.json", conversations(6))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{enable_thinking: false}", "expected a JSON object"),
        ("enable_thinking=false", "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ('"enable_thinking"', "expected a JSON object"),
        ("", "expected a JSON object"),
        ("{}", "names no variable"),
        ('{"a": 1, "a": 2}', "a name stands in it twice"),
        ('{"enable_thinking": "false"}', 'enable_thinking is "false"; expected true or false'),
        ('{"thinking": 0}', "thinking is 0; expected true or false"),
        ("[" * 100_000, "expected a JSON object"),
    ],
)
def test_what_is_no_object_of_variables(text: str, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_kwargs(text)
    assert says in str(refused.value)
    assert str(refused.value).startswith("--chat_template_kwargs")


def test_objects() -> None:
    assert parse_kwargs(None) is None
    assert parse_kwargs('{"enable_thinking": false, "date_string": "x"}') == OFF | {"date_string": "x"}


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        ("{{ messages[0].content }}{{ bos_token }}{{ strftime_now('%Y') }}{{ raise_exception('x') }}", set()),
        ("{% if date_string is not defined %}{% set date_string = 'x' %}{% endif %}{{ date_string }}", {"date_string"}),
        ("{% set on = true %}{% if on %}x{% endif %}{% for m in messages %}{{ m }}{{ loop.index }}{% endfor %}", set()),
        ("{% for m in messages %}{% generation %}{{ on }}{% break %}{% endgeneration %}{% endfor %}", {"on"}),
        ("{% set ns = namespace(a=b) %}{% macro f(c) %}{{ c + d }}{% endmacro %}{{ f(ns.a) }}", {"b", "d"}),
        ("{{ tools }}{{ documents }}{{ padding }}", set()),
        ("{% if %}", set()),
    ],
)  # fmt: skip
def test_what_a_template_asks_for(template: str, asked: set[str]) -> None:
    assert variables_of(template, byte_level_tokenizer()) == asked


def test_what_a_template_does_not_ask_for_is_refused(model: Path) -> None:
    for variables in ({"enable_thinkin": False}, {"messages": []}, {"bos_token": "x"}, {"tools": []}):
        with pytest.raises(RequestError) as refused:
            load_encoder(model, load_config(model), chat_template_kwargs=OFF | variables)
        assert f"--chat_template_kwargs: {next(iter(variables))} would do nothing" in str(refused.value)
        assert "enable_thinking" in str(refused.value)
    with pytest.raises(RequestError, match="it asks for none"):
        load_encoder(model, load_config(model), "chatml", chat_template_kwargs=OFF)


def request(model: Path, data: Path, outdir: Path, **changes: object) -> GenerationRequest:
    return GenerationRequest(outdir=outdir, model_name=str(model), data_path=data, device="cpu", **changes)


def test_data_generation_is_asked_for_them(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[GenerationRequest] = []

    def stop(request: GenerationRequest, **_: object) -> None:
        asked.append(request)
        raise RequestError("enough")

    monkeypatch.setattr(generate, "resolve", stop)
    argv = ["--outdir", "o", "--model_name", str(model), "--data_path", str(data)]
    for more in ([], ["--chat_template_kwargs", json.dumps(OFF)], ["--chat_template_kwargs", "x"]):
        assert run(lambda more=more: generate.main([*argv, *more])) == 2
    assert [request.chat_template_kwargs for request in asked] == [None, OFF]


def test_a_store_is_of_its_variables(model: Path, data: Path, tmp_path: Path) -> None:
    plain, off = tmp_path / "plain", tmp_path / "off"
    without = resolve(request(model, data, plain))
    given = resolve(request(model, data, off, chat_template_kwargs=OFF))
    assert "chat_template_kwargs" not in without.manifest["options"]
    assert given.manifest["options"]["chat_template_kwargs"] == '{"enable_thinking": false}'
    assert key_of(given.manifest) != key_of(without.manifest)
    assert given.manifest["tokenizer"]["digest"] != without.manifest["tokenizer"]["digest"]
    for job, outdir, other in ((without, plain, OFF), (given, off, None)):
        claim_outdir(job)
        finish_a_shard(outdir)
        assert check_outdir(
            resolve(request(model, data, outdir, chat_template_kwargs=job.request.chat_template_kwargs))
        )
        with pytest.raises(RequestError, match="chat_template_kwargs was"):
            check_outdir(resolve(request(model, data, outdir, chat_template_kwargs=other)))
    assert any('told {"enable_thinking": false}' in note for note in given.notes)
    assert not any("told" in note and "is not given" not in note for note in without.notes)
    assert json.loads((off / MANIFEST).read_text())["options"]["chat_template_kwargs"]


def test_training_without_a_store_is_of_them_too(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--basepath", str(model), "--cpdir", "c", "--data_path", str(data), "--chat_template_kwargs"]
    options = read_options([*argv, json.dumps(OFF)])
    assert options.chat_template_kwargs == OFF
    with pytest.raises(RequestError, match="expected a JSON object"):
        read_options([*argv, "x"])
    with pytest.raises(RequestError, match=r"--chat_template_kwargs .* would do nothing: it is for --data_path"):
        read_options(["--basepath", str(model), "--cpdir", "c", "--tmpdir", "s", *argv[-1:], json.dumps(OFF)])
    monkeypatch.setattr("eagle.train.live_features.open_source", lambda *_: None)
    source = LiveSource(data, None, 42, 2048, None, False, "float32")
    live = [
        LiveFeatures(one, model, "cpu", {"hidden_state": 32})  # type: ignore[arg-type]
        for one in (source, dataclasses.replace(source, chat_template_kwargs=OFF))
    ]
    assert live[1].identity() == [live[0].identity()[0] + ', its chat template told {"enable_thinking": false}']
    assert live[0].tokens < live[1].tokens


def test_the_viewer_renders_with_them(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_name", str(model), "--data_path", str(data), "--num", "1", "--chat_template_kwargs"]
    assert run(lambda: viewer.main([*argv, json.dumps(OFF)])) == 0
    shown = capsys.readouterr().out
    assert 'note: the chat template is told {"enable_thinking": false}' in shown
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦" in shown
    assert run(lambda: viewer.main([*argv, '{"enable": false}'])) == 2
    assert "enable would do nothing" in capsys.readouterr().err


@pytest.mark.parametrize("token", FOREIGN_TOKENS)
def test_no_template_is_guessed_for_the_tokens_of_another(token: str, tmp_path: Path) -> None:
    folder = make_target(tmp_path / "llama-2-vicuna", layers=1)
    config, tokenizer = load_config(folder), load_encoder(folder, load_config(folder)).tokenizer
    tokenizer.add_tokens([token], special_tokens=True)
    with pytest.raises(RequestError) as refused:
        choose_template(tokenizer, folder, config)
    assert token in str(refused.value) and "(--chat_template)" in str(refused.value)
    assert choose_template(tokenizer, folder, config, "vicuna").name == "vicuna", "it may be said"
    tokenizer.chat_template = "own"
    assert choose_template(tokenizer, folder, config).text == "own"


def test_a_family_without_a_built_in_template_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_target(tmp_path / "model", layers=1)
    monkeypatch.setitem(
        TARGET_FAMILIES, "llama", dataclasses.replace(TARGET_FAMILIES["llama"], template=lambda longest: None)
    )
    with pytest.raises(RequestError, match=r"none is that of Llama \(1, 2"):
        load_encoder(folder, load_config(folder))


def test_a_folder_that_vllm_renders_otherwise_is_named(model: Path) -> None:
    def notes() -> list[str]:
        return [note for note in load_encoder(model, load_config(model)).notes() if "mistral_common" in note]

    (model / "tekken.json").write_text("{}")
    assert notes() == []
    (model / "consolidated.safetensors").write_bytes(b"")
    try:
        (note,) = notes()
        assert "the tokenizer's own" in note and "--tokenizer-mode hf" in note
    finally:
        (model / "tekken.json").unlink()
        (model / "consolidated.safetensors").unlink()
