"""Tiny models of every type, built offline: no weights, no tokenizers, configs shrunk attribute by attribute."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

WIDTH, FFN, LAYERS, HEADS, VOCABULARY, POSITIONS = 32, 64, 3, 4, 99, 64
IMAGE, PATCH, LENGTH = 32, 8, 16
MOST_PARAMETERS = 60_000_000


class NotBuilt(Exception):
    """Why a type was not built."""


@dataclass
class Built:
    """A model with inputs that it runs on."""

    model: nn.Module
    inputs: dict[str, Any]
    kind: str


# ---- configs: what an attribute is at most, by its name; the first pattern that matches all of the name counts ------

_LIMITS: list[tuple[int | None, str]] = [
    (None, r"type_vocab_size .*_loss.* .*_cost initializer.* .*_prob .*dropout.*"),
    (VOCABULARY, r".*vocab_size(_per_layer_input)? n_vocab .*vocabulary_size"),
    (
        POSITIONS,
        r".*max_(2d_)?position_embeddings n_positions max_.*_positions n_ctx max_sequence_length max_seq_len(gth)?",
    ),
    (8, r"hidden_size_per_layer_input .*lora_rank.* .*(low_rank|lora|rank)_dim rank"),
    (16, r"(moe|expert|shared).*intermediate_size expert_ffn_hidden_size"),
    (
        FFN,
        r".*intermediate_(size|dim) .*ffn_(dim|hidden_size|size) d_ff .*mlp_(dim|hidden_size) dim_feedforward n_inner",
    ),
    (FFN, r"d_inner feed_?forward_.* .*ff_dim d_ffn .*inter_dim"),
    (0, r"num_kv_shared_layers"),
    (WIDTH // HEADS, r"rotary_dim rope_dim"),
    (16, r"qk_head_dim"),
    (8, r"index_topk .*head_dim d_kv .*head_size d_head qk_nope.*dim qk_rope.*dim v_head.* kv_channels kq?v_size"),
    (8, r"mamba_d_head d_qk d_v mamba_(n|num)_heads (bit_)?num_groups"),
    (2, r".*(num|n)_(key_value|kv)_heads num_.*key_value_heads kv_heads linear_num_key_heads index_n_heads"),
    (2, r"mamba_n_groups n_groups .*num_query_groups multi_query_group_num num_conv_pos_embedding_groups"),
    (HEADS, r".*(attention_|num_|n_)heads? n_heads? num_.*_heads nhead"),
    (4, r"(moe_)?num_(local_|routed_|moe_|total_)?experts n_routed_experts moe_num_experts num_expert n_experts"),
    (2, r".*experts_per_tok(en)? moe_top_?k top_k_experts num_selected_experts moe_k expert_top_k topk_experts"),
    (1, r"n_group topk_group num_expert_groups? expert_groups? .*shared_experts? first_k_dense_replace"),
    (1, r"num_nextn_predict_layers moe_layer_start_index num_dense_layers"),
    (None, r"moe_layer_end_index num_feature_levels .*_every .*interval .*_period .*_offset decoder_sparse_step"),
    (
        None,
        r"num_feat_extract_layers num_conv_layers iou_head_depth num_upsample_layers .*conv_pos.* max_window_layers",
    ),
    (None, r".*residual_layers"),
    (LAYERS, r".*layers n_layer depth num_(.*_)?blocks n_blocks .*_depth num_hidden_groups"),
    (8, r".*(d_state|state_size) state_dim"),
    (4, r"(mamba_)?dt_rank time_step_rank"),
    (8, r"(mamba_|ssm_)?chunk_size block_size attention_chunk_size sliding_window(_size)? attention_window"),
    (8, r"local_(attention_)?window(_size)? window_attention"),
    (WIDTH, r"n_embd d_model hidden_size dim n_embed .*hidden_(size|dim) .*embed(ding)?_(dim|size) .*_dim .*d_model"),
    (WIDTH, r".*proj(ection)?_(size|dim) emb_size .*width .*hidden_channels pooler_output_size bottleneck_size"),
]
_COMPILED = [(limit, re.compile("|".join(names.split()))) for limit, names in _LIMITS]
_IMAGE_SIZES = re.compile(r"(pretrain_|input_)?image_size|img_size|crop_size|spec_size")
_PATCH_SIZES = re.compile(r"patch_size|(encoder|patch)_stride")
_TOKENS = re.compile(r".*token_(id|index|ids)|.*_idx|.*_token|bos_index|eos_index|.*pad_index|unk_index|mask_index")


def _shrunk(name: str, value: Any, taken: dict[int, int]) -> Any:
    """The small value of an attribute, or the value itself."""
    if isinstance(value, bool) or value is None:
        return value
    if _TOKENS.fullmatch(name):
        if isinstance(value, int) and value >= VOCABULARY - 20:
            return taken.setdefault(value, VOCABULARY - 1 - len(taken) % 20)
        if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
            return [_shrunk(name, each, taken) for each in value]
        return value
    if _IMAGE_SIZES.fullmatch(name):
        return type(value)([IMAGE] * len(value)) if isinstance(value, list | tuple) else IMAGE
    if _PATCH_SIZES.fullmatch(name) and name == "patch_size":
        if isinstance(value, int):
            return min(value, PATCH)
        return type(value)(min(each, PATCH) for each in value) if len(value) <= 2 else value
    if isinstance(value, int):
        for limit, pattern in _COMPILED:
            if pattern.fullmatch(name):
                return value if limit is None else min(value, limit)
        return value
    return value


def _shrink_list(name: str, value: Any, layers: int) -> Any:
    """Lists with an entry per layer are cut, lists of depths and widths made small."""
    kind = type(value) if isinstance(value, list | tuple) else list
    if len(value) == layers and layers > LAYERS and not name.startswith("conv_"):
        return kind(value[:LAYERS])
    if "heads" in name and value and all(isinstance(each, int) and each > 0 for each in value):
        return kind(1 << min(3, each.bit_length() - 1) for each in value)
    if name in ("depths", "depth", "num_blocks", "layer_depths", "stage_depths") and all(
        isinstance(each, int) for each in value
    ):
        return kind(min(each, 2) for each in value)
    wide = name in (
        "hidden_sizes",
        "embed_dim",
        "embed_dims",
        "dims",
        "encoder_hidden_sizes",
        "neck_hidden_sizes",
        "decoder_hidden_sizes",
    )
    if wide and value and all(isinstance(each, int) for each in value) and min(value) > 0:
        return kind(max(16, round(each * 32 / min(value) / 16) * 16) for each in value)
    return value


_ABSENT = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "vocab_size": VOCABULARY,
    "num_experts": 4,
    "prediction_length": 8,
    "n_shared_experts": 1,
}
_BACKBONE = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [2, 2, 2, 2],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_STAGES = ("depths", "hidden_sizes", "embed_dims", "dims", "num_blocks_per_stage", "encoder_depths")
_COUNTS = re.compile(r"num_.*(layers|blocks|stages)|n_layers?|depth|hidden_size|embed_dim|num_channels|embedding_size")
_LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "depth",
    "num_decoder_layers",
)


def small_config(default: Any, *, mrope: bool = False) -> Any:
    """The config with every attribute made small by its name, and the configs within it likewise.

    Args:
        default: as the type makes it.
        mrope: give rotary embeddings of three axes sections that fit the small heads.
    """
    subs = {name for name in getattr(default, "sub_configs", {}) if getattr(default, name, None) is not None}
    counts = [getattr(default, name, None) for name in _LAYER_COUNTS]
    layers = next((count for count in counts if isinstance(count, int)), 0)
    taken: dict[int, int] = {}
    is_staged = any(isinstance(getattr(default, name, None), list | tuple) for name in _STAGES)
    heads = next((getattr(default, name, None) for name in ("num_attention_heads", "n_head", "num_heads")), None)
    changed: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name.startswith("_") or name in ("transformers_version", "dtype", "architectures", "model_type"):
            continue
        if name in subs:
            sub = value
            if hasattr(sub, "to_dict"):
                changed[name] = small_config(sub, mrope=mrope)
            continue
        if is_staged and (_COUNTS.fullmatch(name) or (isinstance(value, list | tuple) and name not in _STAGES)):
            continue
        if value is None and name in _ABSENT:
            changed[name] = _ABSENT[name]
            continue
        new = _shrunk(name, value, taken)
        if name == "num_key_value_heads" and value == heads:
            new = HEADS
        if is_staged and isinstance(value, int) and name in ("image_size", "patch_size", "window_size"):
            new = {"image_size": 2 * IMAGE, "patch_size": value, "window_size": 2}[name]
        if isinstance(new, list | tuple):
            new = _shrink_list(name, new, 0 if is_staged else layers)
        if new != value or isinstance(value, list | tuple):
            changed[name] = new
    _agree(default, changed, mrope=mrope)
    if "use_cache" in vars(default):
        changed["use_cache"] = False
    try:
        return type(default)(**changed)
    except Exception:  # some derive what others state: set the attributes one by one
        config = type(default)()
        for name, value in changed.items():
            try:
                setattr(config, name, value)
            except Exception:
                continue
        return config


def _agree(default: Any, changed: dict[str, Any], *, mrope: bool) -> None:
    """Numbers that depend on each other."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = getattr(default, key, None)
        if isinstance(rope, dict) and (mrope or "mrope_section" in rope):
            head = changed.get("head_dim") or getattr(default, "head_dim", None) or WIDTH // HEADS
            half = int(min(head, 8) * rope.get("partial_rotary_factor", 1.0)) // 2
            changed[key] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    if {"expand", "num_heads", "head_dim"} <= vars(default).keys():  # state-space mixers: heads x size = expand x width
        changed["num_heads"] = int(default.expand * WIDTH) // (changed.get("head_dim") or default.head_dim)
    for name in ("layer_types", "mlp_layer_types"):
        value = changed.get(name)
        if isinstance(value, list | tuple) and len(value) > LAYERS:
            changed[name] = list(value[:LAYERS])
    backbone = getattr(default, "backbone_config", 0)
    if backbone is None or getattr(backbone, "model_type", "") == "timm_backbone":
        changed.update({"backbone_config": _BACKBONE, "use_timm_backbone": False, "backbone": None})


# ---- transformers ---------------------------------------------------------------------------------------------------


def transformers_types() -> list[str]:
    """Every model type that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def _classes(kind: str, config: Any) -> list[Any]:
    """The model classes of a type, the preferred one first."""
    from transformers.models.auto import modeling_auto as auto

    order = [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_CTC_MAPPING,
        auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_PRETRAINING_MAPPING,
    ]
    if getattr(config, "is_encoder_decoder", False):
        order = [order[2], order[6], *[mapping for place, mapping in enumerate(order) if place not in (2, 6)]]
    found: list[Any] = []
    for mapping in order:
        try:
            if type(config) not in mapping:
                continue
            classes = mapping[type(config)]
        except Exception:  # a class that needs a package that is not there
            continue
        for each in classes if isinstance(classes, list | tuple) else (classes,):
            if each is not None and each not in found:
                found.append(each)
    return found[:3] or _unlisted(config)


def _unlisted(config: Any) -> list[Any]:
    """The model classes of a config that no auto class lists: parts of composite models."""
    from transformers import PreTrainedModel

    path = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(path)
    except Exception:
        return []
    return [
        each
        for name, each in vars(module).items()
        if inspect.isclass(each)
        and issubclass(each, PreTrainedModel)
        and each.config_class is type(config)
        and "forward" in vars(each)
        and not name.endswith("PreTrainedModel")
    ][:3]


def build_transformers(kind: str, noise: float = 0.1) -> Built:
    """A tiny random model of a type, perturbed, with inputs that it runs on.

    Raises:
        NotBuilt: with the last reason.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        default = CONFIG_MAPPING[kind]()
        wholes = [small_config(default, mrope=mrope) for mrope in (False, True)]
    except Exception as error:
        raise NotBuilt(f"config: {type(error).__name__}: {_line(error)}") from None
    reasons = []
    parts = list(wholes)
    for whole in wholes:
        for name in (
            "text_config",
            "thinker_config",
            "vision_config",
            "audio_config",
            "encoder",
            "decoder",
            "backbone_config",
        ):
            part = getattr(whole, name, None)
            if part is not None and hasattr(part, "to_dict"):
                parts.append(part)
    for part in parts:
        for model_class in _classes(kind, part):
            try:
                model = _instance(model_class, part, noise)
            except Exception as error:
                reasons.append(f"{model_class.__name__}: {type(error).__name__}: {_line(error)}")
                continue
            inputs, reason = _accepted(model, part)
            if inputs is not None:
                return Built(model, inputs, model_class.__name__)
            reasons.append(f"{model_class.__name__}: {reason}")
    raise NotBuilt(reasons[0] if reasons else "no model class among those tried (text, vision, audio, base)")


def _instance(model_class: Any, config: Any, noise: float) -> nn.Module:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(0)
    return perturbed(model_class(config).float(), noise)


def _accepted(model: nn.Module, config: Any) -> tuple[dict[str, Any] | None, str]:
    """Inputs on which the model runs to a finite output; else why the most promising ones failed."""
    reason = "no inputs known for its signature"
    for inputs in _inputs(model, config):
        try:
            outputs = run(model, inputs)
        except Exception as error:
            if reason.startswith("no inputs"):
                reason = f"{type(error).__name__}: {_line(error)}"
            continue
        if outputs and all(bool(torch.isfinite(each).all()) for each in outputs if each.is_floating_point()):
            return inputs, ""
        reason = "its output is not finite"
    return None, reason


_TOGETHER = (
    ("decoder_input_ids",),
    ("attention_mask",),
    ("bbox",),
    ("decoder_input_ids", "attention_mask"),
    ("past_time_features", "past_observed_mask", "future_values", "future_time_features"),
    ("pixel_values",),
    ("visual_feats", "visual_pos"),
    ("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ("encoder_hidden_states",),
)


def _inputs(model: nn.Module, config: Any) -> list[dict[str, Any]]:
    """Candidates: what the signature requires, then more."""
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)

    def ids(length: int = LENGTH) -> torch.Tensor:
        return torch.randint(5, 70, (2, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def of(*names: str, default: int) -> int:
        for holder in (
            config,
            *(getattr(config, part, None) for part in ("vision_config", "audio_config", "backbone_config")),
        ):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, list | tuple):
                    value = value[0] if value else None
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return default

    channels, size = (
        of("num_channels", "in_channels", "in_chans", "in_channel", default=3),
        of("image_size", "img_size", default=IMAGE),
    )
    bins = of("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "input_feat_size", default=80)
    frames = of("num_frames", "max_source_positions", default=8)
    history = of("context_length", default=32) + max(getattr(config, "lags_sequence", None) or [0])
    ahead = of("prediction_length", default=8)
    series = of("num_input_channels", default=1)
    width = of("hidden_size", "d_model", "embed_dim", default=WIDTH)
    side = of("patch_size", default=PATCH)
    pixels = channels * side**2
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    count = int(grid.prod(-1).sum())
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).flatten(0, 1)
    known: dict[str, list[Any]] = {
        "input_ids": [ids(), ids(64)],
        "decoder_input_ids": [ids(8)],
        "attention_mask": [torch.ones(2, LENGTH, dtype=torch.long)],
        "bbox": [torch.arange(LENGTH)[None, :, None].repeat(2, 1, 4)],
        "pixel_values": [
            noise(2, channels, size, size), noise(2, frames, channels, size, size), noise(2, channels, 64, 64),
            noise(2, channels, 224, 224), noise(2, 1, channels, size, size), noise(2, channels, frames, size, size),
            noise(2, 2, channels, 64, 64), noise(2, 1, 1, channels, size, size), noise(2, 16, pixels),
            *(noise(count, each) for each in (pixels, pixels * of("temporal_patch_size", default=1))),
            noise(count, channels, side, side),
        ],
        "pixel_values_videos": [noise(2, frames, channels, size, size)],
        "input_features": [
            noise(2, bins, 2 * of("max_source_positions", default=32)), noise(2, 64, bins), noise(2, bins, 64),
            noise(2, 1, 64, bins),
        ],
        "input_values": [
            noise(2, 4000), noise(2, 1, 4000), noise(2, of("max_length", default=64), bins), noise(2, 64, bins),
            noise(2, 1, 3840),
        ],
        "past_values": [noise(2, history, series), noise(2, history)],
        "past_time_features": [noise(2, history, of("num_time_features", default=1))],
        "past_observed_mask": [torch.ones(2, history, series), torch.ones(2, history)],
        "past_values_padding": [torch.zeros(2, history)],
        "freq": [torch.zeros(2, 1, dtype=torch.long)],
        "future_values": [noise(2, ahead)],
        "future_time_features": [noise(2, ahead, of("num_time_features", default=1))],
        "inputs": [ids(), noise(2, channels, size, size), noise(2, LENGTH, of("d_model", default=WIDTH))],
        "inputs_embeds": [noise(2, LENGTH, width)],
        "hidden_states": [
            noise(2, LENGTH, width),
            *(noise(count, each) for each in (pixels, pixels * of("temporal_patch_size", default=1), width)),
        ],
        "encoder_hidden_states": [noise(2, LENGTH, of("cross_attention_hidden_size", "hidden_size", default=WIDTH))],
        "pixel_mask": [torch.ones(2, size, size, dtype=torch.long)],
        "audio_values": [noise(2, 1, 4000)],
        "spectrogram": [noise(2, 64, bins)],
        "decoder_input_values": [noise(2, 8, bins)],
        "grid_thw": [grid],
        "image_grid_thw": [grid],
        "merge_sizes": [torch.tensor([1, 1])],
        "pixel_position_ids": [places.repeat(2, 1, 1)],
        "pixel_attention_mask": [torch.ones(2, 16, dtype=torch.long)],
        "spatial_shapes": [torch.tensor([[4, 4], [4, 4]])],
        "flattened_patches": [torch.cat([places.repeat(2, 1, 1).float(), noise(2, 16, pixels)], -1)],
        "aspect_ratio_ids": [torch.ones(2, 1, dtype=torch.long)],
        "aspect_ratio_mask": [torch.ones(2, 1, of("max_num_tiles", default=1), dtype=torch.long)],
        "audio_mel": [noise(2, 64, of("input_feat_size", default=80))],
        "audio_mel_mask": [torch.zeros(2, 64, dtype=torch.bool)],
        "input_features_mask": [torch.ones(2, 64, dtype=torch.long)],
        "visual_feats": [noise(2, 9, of("visual_feat_dim", default=WIDTH))],
        "visual_pos": [noise(2, 9, of("visual_pos_dim", default=4))],
        "prompt_pixel_values": [noise(2, channels, size, size)],
        "prompt_masks": [noise(2, channels, size, size)],
        "context": [noise(2, LENGTH, width)],
        "states": [noise(2, LENGTH, of("state_dim", default=WIDTH))],
        "actions": [noise(2, LENGTH, of("act_dim", default=4))],
        "rewards": [noise(2, LENGTH, 1)],
        "returns_to_go": [noise(2, LENGTH, 1)],
        "timesteps": [torch.arange(LENGTH).repeat(2, 1)],
    }  # fmt: skip
    main = getattr(model, "main_input_name", "input_ids")
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if not isinstance(main, str):
        main = main[0]
    if main not in known or main not in parameters:
        main = next((name for name in parameters if name in known), "input_ids")
    starts = [
        main,
        *(
            name
            for name in (
                "input_ids",
                "pixel_values",
                "input_features",
                "input_values",
                "past_values",
                "hidden_states",
                "flattened_patches",
                "inputs_embeds",
            )
            if name in parameters
        ),
    ]
    candidates: list[dict[str, Any]] = []
    for start in dict.fromkeys(starts):
        for choice in known[start]:
            base = {start: choice, **{name: known[name][0] for name in required if name in known and name != start}}
            candidates.append(base)
            for more in _TOGETHER:
                extra = {name: known[name][0] for name in more if name in parameters and name not in base}
                if len(extra) == len(more):
                    candidates.append({**base, **extra})
    if getattr(config, "is_encoder_decoder", False):  # with its decoder, if there are inputs for it
        candidates.sort(key=lambda each: "decoder_input_ids" not in each)
    return candidates


# ---- timm -----------------------------------------------------------------------------------------------------------


def timm_modules() -> list[str]:
    """Every module of timm with models of its own."""
    import timm

    return sorted(timm.list_modules())


def build_timm(module: str, noise: float = 0.1) -> Iterator[Built]:
    """Small models of a timm module, the smallest one first, perturbed, each with an image that it takes.

    Raises:
        NotBuilt: there is none; with the last reason.
    """
    import timm

    names = timm.list_models(module=module)
    if not names:
        raise NotBuilt("no models in this module")
    sizes = {}
    for name in names[:40]:
        try:
            sizes[name] = _size(name, {})
        except Exception:
            continue
    reason, found = "none of its models could be made", 0
    for name in sorted(sizes, key=lambda each: sizes[each])[:3]:
        for options, is_slim in _TIMM_SIZES:
            try:
                with slim() if is_slim else nullcontext():
                    built = _timm(name, options, noise)
            except Exception as error:
                reason = f"{name}: {type(error).__name__}: {_line(error)}"
                continue
            found += 1
            yield built
            break
    if not found:
        raise NotBuilt(reason)


# Options for a model, and whether its channels are halved: the first that it takes, and that makes it small enough.
_TIMM_SIZES: list[tuple[dict[str, float], bool]] = [
    ({"img_size": 64, "depth": LAYERS}, False),
    ({"depth": LAYERS}, False),
    ({"img_size": 64}, False),
    ({}, False),
    ({"channel_multiplier": 0.25}, False),
    ({}, True),
]


def _size(name: str, options: dict[str, float]) -> int:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, **options)
    return sum(each.numel() for each in model.parameters())


@contextmanager
def slim(by: int = 2) -> Iterator[None]:
    """Let convolutions, batch norms and linear layers made meanwhile have a part of their channels.

    For networks without an argument for their width. What is not a multiple of ``by`` (colours) stays.
    """

    def narrower(made: Any, sizes: int) -> Any:
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(made).bind(self, *args, **kwargs)
            for name in list(bound.arguments)[1 : 1 + sizes]:
                if bound.arguments[name] % by == 0:
                    bound.arguments[name] //= by
            if bound.arguments.get("groups", 1) % by == 0:
                bound.arguments["groups"] //= by
            made(*bound.args, **bound.kwargs)

        return init

    with ExitStack() as stack:
        for kind, sizes in ((nn.Conv2d, 2), (nn.BatchNorm2d, 1), (nn.Linear, 2)):
            stack.enter_context(patch.object(kind, "__init__", narrower(kind.__init__, sizes)))
        yield


def _timm(name: str, options: dict[str, float], noise: float) -> Built:
    import timm

    size = _size(name, options)
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, num_classes=10, **options), noise)
    extents = [int(options["img_size"])] if "img_size" in options else [64, int(model.default_cfg["input_size"][-1])]
    for extent in extents:
        inputs = {"x": torch.randn(2, 3, extent, extent, generator=torch.Generator().manual_seed(1))}
        try:
            outputs = run(model, inputs)
        except Exception:
            if extent == extents[-1]:
                raise
            continue
        if all(bool(torch.isfinite(each).all()) for each in outputs):
            return Built(model, inputs, name)
    raise NotBuilt("its output is not finite")


# ---- both -----------------------------------------------------------------------------------------------------------


def build(family: str, kind: str, noise: float = 0.1) -> Iterator[Built]:
    """Models of a type of transformers, or of a module of timm, the preferred one first.

    Args:
        family: ``transformers`` or ``timm``.
        kind: model type, or module.
        noise: what the parameters are moved by.

    Raises:
        NotBuilt: with the reason.
    """
    if family == "timm":
        yield from build_timm(kind, noise)
    else:
        yield build_transformers(kind, noise)


def perturbed(model: nn.Module, amount: float) -> nn.Module:
    """Move every parameter, and every saved buffer, off its initial value: none is trivially 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    saved = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.mul_(1 + amount * torch.rand(buffer.shape, generator=generator))
                buffer.add_(amount * torch.rand(buffer.shape, generator=generator))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def run(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that the model returns, from copies of the inputs and in the same random state each time."""
    copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(model(**copies))


def others(built: Built) -> list[dict[str, Any]]:
    """Inputs that the model was not planned on: other tokens and pixels, and those of another length or extent.

    Those of another shape are left out where the model does not take them.
    """
    generator = torch.Generator().manual_seed(2)
    fresh = {name: _fresh(name, value, generator) for name, value in built.inputs.items()}
    found = []
    for inputs in (fresh, _resized(fresh, generator)):
        try:
            outputs = run(built.model, inputs)
        except Exception:
            continue
        if all(bool(torch.isfinite(each).all()) for each in outputs if each.is_floating_point()):
            found.append(inputs)
    return found


def _fresh(name: str, value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor) or "mask" in name or name == "bbox":
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    return torch.randint(5, 70, value.shape, generator=generator)


def _resized(inputs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Eleven of sixteen tokens; pictures, spectrograms and series of half as much again."""

    def resized(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if not value.is_floating_point() and name != "pixel_mask":
            return value[:, : max(1, value.shape[1] * 11 // 16)]
        if value.dim() < 4:
            return value
        extents = [extent * 3 // 2 for extent in value.shape[-2:]]
        if not value.is_floating_point():
            return torch.ones(*value.shape[:-2], *extents, dtype=value.dtype)
        return torch.randn(*value.shape[:-2], *extents, generator=generator)

    return {name: resized(name, value) for name, value in inputs.items()}


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested containers, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [each for value in tree.values() for each in tensors(value)]
    if isinstance(tree, list | tuple):
        return [each for value in tree for each in tensors(value)]
    return []


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return " ".join(text[:3])[:160] if text else ""
