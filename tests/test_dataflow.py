"""The traced graph: marks, inputs, in-place ops, and the recording that stands in for a failed export."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from networks import DataDependent, KeywordNet, PreNorm, perturbed
from torch import nn

import neutralize as nz
from neutralize.dataflow import op_name, trace


def x8(seed=0):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def ops_between(flow, call):
    found, node = [], call.entry.next
    while node is not call.exit:
        found.append(op_name(node))
        node = node.next
    return found


def test_the_marks_enclose_what_a_layer_computes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    flow = trace(model, nz.select(model, ["0", "1"]), x8())
    assert [ops_between(flow, flow.calls[name][0]) for name in ("0", "1")] == [["aten::linear"], ["aten::tanh"]]
    assert {flow.names[node] for node in flow.names} == set(dict(model.named_parameters()))


def test_a_layer_that_is_called_twice_has_two_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            return self.lin(self.lin(x))

    model = Twice()
    assert len(trace(model, nz.select(model, "lin"), x8()).calls["lin"]) == 2


def test_tracing_leaves_no_hook_and_computes_nothing():
    class Counting(nn.Module):
        def forward(self, x):
            assert x.__class__ is not torch.Tensor, "the trace computed with real tensors"
            return x

    model = nn.Sequential(nn.Linear(8, 8), Counting())
    trace(model, nz.select(model, "0"), x8())
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_a_model_is_traced_on_the_meta_device_with_ordinary_inputs():
    with torch.device("meta"):
        model = nn.Sequential(PreNorm(), nn.Linear(8, 2)).eval()
    assert trace(model, nz.select(model, "0"), x8()).calls["0"]


def test_control_flow_on_data_is_recorded_on_the_real_inputs(capfd):
    model, x = perturbed(DataDependent()), x8()
    before = x.clone()
    flow = trace(model, nz.select(model, "block"), x)
    assert {"aten::layer_norm", "aten::linear"} <= set(ops_between(flow, flow.calls["block"][0]))  # as an export has it
    assert torch.equal(x, before)
    assert capfd.readouterr() == ("", "")


def test_a_recording_forgets_views_of_what_was_overwritten():
    """The view of the input is written through the original: what the block hands on is not its input."""

    class Sly(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            copy = x.clone()
            view = copy.view(-1)
            copy += 1.0
            return view.view_as(x) + self.lin(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sly, self.head = Sly(), nn.Linear(8, 2)

        def forward(self, x):
            x = self.sly(x)
            if x.sum().item() > 1e9:
                x = x + 1
            return self.head(x)

    for model in (Model(), nn.Sequential(Sly(), nn.Linear(8, 2))):
        layer = "sly" if isinstance(model, Model) else "0"
        with pytest.raises(nz.NeutralizeError, match="expected a layer that can hand its input on"):
            nz.plan(model.eval(), layer, example_inputs=x8())


def test_in_place_ops_that_hide_nothing_keep_the_graph_as_it_is():
    class Inplace(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.lin(self.norm(x))
            y += x
            return y

    model, x = perturbed(nn.Sequential(Inplace(), nn.Linear(8, 2))), x8()
    flow = trace(model, nz.select(model, "0"), x)
    targets = [node.target for node in flow.graph.nodes]
    assert torch.ops.aten.add_.Tensor in targets
    assert nz.verify(model, nz.plan(model, "0", example_inputs=x), x).exact


@pytest.mark.parametrize(
    ("build", "layer", "strategy"),
    [
        (lambda: nn.Sequential(PreNorm(), nn.Linear(8, 2)), "0", "auto"),
        (lambda: nn.Sequential(nn.Embedding(9, 8), PreNorm(), nn.Linear(8, 2)), "1", "auto"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), "0", "zero"),
    ],
)
def test_the_first_layer_tells_the_inputs_of_a_plain_chain(build, layer, strategy):
    model = perturbed(build())
    assert nz.plan(model, layer, strategy).edits


def test_inputs_may_be_a_tensor_a_tuple_or_keywords():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = PreNorm()

        def forward(self, first, second=None):
            return self.block(first) + (0 if second is None else second)

    model = perturbed(Pair())
    plans = {
        nz.plan(model, "block", example_inputs=inputs).digest
        for inputs in (x8(), (x8(), x8()), [x8()], {"first": x8(), "second": x8()})
    }
    assert len(plans) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("text", r"expected a tensor, a tuple of positional arguments or a dict .* got str"),
        (torch.randn(3, 5), r"expected example_inputs that the model accepts, got a failing trace"),
        (None, r"expected example_inputs for a KeywordNet"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    model = perturbed(KeywordNet())
    if inputs is None:
        model.blocks = nn.ModuleList()  # no layer is left that tells the input
        model.forward = lambda x: model.head(x["no such key"])
        with pytest.raises(nz.NeutralizeError, match=message):
            nz.plan(model, "head", example_inputs=None)
        return
    with pytest.raises(nz.NeutralizeError, match=message):
        nz.plan(model, "blocks[0]", example_inputs=inputs)


def test_a_layer_that_is_not_reached_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(
        nz.NeutralizeError, match=r"to take and return a tensor on the example inputs, got none for 'idle'"
    ):
        nz.plan(Idle(), "idle", example_inputs=x8())


_SEVENTY_BILLION = """
import json, resource, torch, transformers, neutralize as nz
config = transformers.LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
plan = nz.plan(model, "model.layers[:]")
print(json.dumps({
    "parameters": sum(each.numel() for each in model.parameters()),
    "written": plan.written_bytes,
    "kinds": [certificate.kind for certificate in plan.certificates],
    "seconds": plan.planning_s,
    "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
"""


def test_all_layers_of_a_llama_of_70_billion_parameters_are_planned_in_a_minute_and_3_gigabytes():
    pytest.importorskip("transformers", reason="the Llama of transformers is the model planned for")
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", _SEVENTY_BILLION], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] > 67e9
    assert found["written"] == 80 * 2 * 8192 * 2  # two norm gains a block
    assert found["kinds"] == ["exact"] * 80
    assert found["seconds"] <= 60
    assert found["kilobytes"] <= 3e6


@pytest.mark.parametrize("first", [nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4), nn.LSTM(4, 4), nn.LayerNorm(4)])
def test_guessed_inputs_are_of_the_dtype_of_the_first_layer(first):
    model = nn.Sequential(first, nn.Identity()).double()
    model.forward = lambda x: model[0](x)
    assert trace(model, {"0": model[0]}, None).calls["0"]
