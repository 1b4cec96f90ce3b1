"""`torch.compile` of the trunk: only where its features are the eager ones."""

import shutil

import pytest
import torch

from eagle.target.compiled import compile_trunk

CPU = torch.device("cpu")


class Trunk(torch.nn.Module):
    """Looks like a trunk: features of token ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = torch.nn.Embedding(128, 16), torch.nn.Linear(16, 16)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        class Result:
            last_hidden_state = self.layer(self.embedding(input_ids))

        return Result


def test_a_failing_compiler_is_done_without(monkeypatch, capsys):
    def fails(module, dynamic):
        def call(**_):
            raise RuntimeError("no compiler for you")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    assert compile_trunk(Trunk(), CPU) is None
    assert "going on without it: no compiler for you" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "same"), [(0.0, True), (1e-5, True), (0.1, False)])
def test_other_features_are_not_accepted(monkeypatch, capsys, change, same):
    def compiles(module, dynamic):
        def call(**inputs):
            result = module(**inputs)
            result.last_hidden_state = result.last_hidden_state * (1 + change)
            return result

        return call

    monkeypatch.setattr(torch, "compile", compiles)
    assert (compile_trunk(Trunk(), CPU) is not None) is same
    assert ("compiled features differ by" in capsys.readouterr().err) is not same


def test_a_feature_that_rounding_turns_over_is_no_reason(monkeypatch):
    def compiles(module, dynamic):
        def call(**inputs):
            result = module(**inputs)
            result.last_hidden_state[0, 0] *= -1
            return result

        return call

    monkeypatch.setattr(torch, "compile", compiles)
    assert compile_trunk(Trunk(), CPU) is not None


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_for_every_shape():
    class Simple(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = Trunk()

        def get_input_embeddings(self):
            return self.trunk.embedding

        def forward(self, input_ids, use_cache):
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=self.trunk.layer(self.trunk.embedding(input_ids)).relu())

    trunk = Simple()
    compiled = compile_trunk(trunk, CPU)
    assert compiled is not None
    with torch.inference_mode():
        for shape in ((3, 32), (1, 96), (7, 64)):
            ids = torch.randint(128, shape)
            found, expected = (run(input_ids=ids, use_cache=False).last_hidden_state for run in (compiled, trunk))
            torch.testing.assert_close(found, expected)
