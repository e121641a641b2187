# %% [markdown]
# # A ResNet and a ViT
# What to write is found in the dataflow: the last batch norm of a ResNet block, the last projections of a
# transformer's, the LayerScale of those that have one.

# %%
"""Switch off blocks, heads and channels of vision models."""

import torch
import torchvision
from torch import nn

import neutralize as nz

torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)
models: dict[str, tuple[nn.Module, list[str]]] = {
    "resnet18": (torchvision.models.resnet18(), ["layer1[1]", "layer3[1]", "layer1[0].conv1.channels[:16]"]),
    "vit": (
        torchvision.models.VisionTransformer(64, 16, 4, 4, 64, 128),
        ["encoder.layers.encoder_layer_2", "encoder.layers[1].self_attention.heads[0]"],
    ),
}

# %%
for name, (model, selections) in models.items():
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # fresh heads and gains are zeros and ones
        intact = model(images)
    for layers in selections:
        is_part = "channels" in layers or "heads" in layers  # which hands nothing on: its contribution becomes nothing
        plan = nz.plan(model, layers, "zero" if is_part else "auto", example_inputs=images)
        with torch.no_grad(), plan.applied(model):
            moved = (model(images) - intact).abs().max()
        kind, written = plan.certificates[0].kind, ", ".join(edit.parameter for edit in plan.edits)
        print(f"{name:9} {layers:42} {kind}, {plan.written_bytes} bytes ({written}); output moved by {moved:.3f}")
        assert kind == "exact"
        assert nz.verify(model, plan, images).exact
        assert moved > 0
    with torch.no_grad():
        assert torch.equal(model(images), intact)
