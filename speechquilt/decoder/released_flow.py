"""The released GLM-4-Voice decoder's `flow.pt` as a `FlowDecoder` (spec 1, 3.1): convert once, then use our own folder.

The checkpoint is a torch pickle of plain tensors. It is read with `weights_only=True`, so it cannot run code.
Trap: tensors do not say everything. Heads of the estimator, block size, rates and guidance come from the config, whose
defaults are the release's; only what changes a shape is noticed when it is wrong.
"""

import re
from pathlib import Path

from speechquilt.decoder import flow_folder
from speechquilt.decoder.checked_weights import read_pickle
from speechquilt.decoder.flow import FlowConfig, FlowDecoder

RELEASED = FlowConfig()
# Their names -> ours, one after the other; a level's parts are residual block, transformers, resampling.
_RULES = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^input_embedding\.", "tokens.embedding."),
        (r"^encoder_proj\.", "tokens.to_mel."),
        (r"^spk_embed_affine_layer\.", "speaker."),
        (r"^encoder\.embed\.out\.0\.", "tokens.input."),
        (r"^encoder\.embed\.out\.1\.", "tokens.input_norm."),
        (r"^encoder\.after_norm\.", "tokens.norm."),
        (r"^encoder\.encoders\.", "tokens.layers."),
        (r"\.self_attn\.linear_(q|k|v|out|pos)\.", r".attention.\1."),
        (r"\.self_attn\.pos_bias_u$", ".attention.content_bias_HK"),
        (r"\.self_attn\.pos_bias_v$", ".attention.distance_bias_HK"),
        (r"\.feed_forward\.w_1\.", ".ffn_in."),
        (r"\.feed_forward\.w_2\.", ".ffn_out."),
        (r"\.norm_mha\.", ".attention_norm."),
        (r"\.norm_ff\.", ".ffn_norm."),
        (r"^decoder\.estimator\.", "unet."),
        (r"^unet\.time_mlp\.linear_1\.", "unet.time_in."),
        (r"^unet\.time_mlp\.linear_2\.", "unet.time_out."),
        (r"^unet\.final_block\.block\.0\.", "unet.final.conv."),
        (r"^unet\.final_block\.block\.1\.", "unet.final.norm."),
        (r"^unet\.final_proj\.", "unet.out."),
        (r"^unet\.(down|mid|up)_blocks\.(\d+)\.0\.", r"unet.\1.\2.residual."),
        (r"^unet\.(down|mid|up)_blocks\.(\d+)\.1\.", r"unet.\1.\2.blocks."),
        (r"^unet\.down_blocks\.(\d+)\.2\.(?:conv\.)?", r"unet.shrink.\1."),
        (r"^unet\.up_blocks\.(\d+)\.2\.(?:conv\.)?", r"unet.grow.\1."),
        (r"\.residual\.mlp\.1\.", ".residual.time."),
        (r"\.residual\.res_conv\.", ".residual.shortcut."),
        (r"\.residual\.block1\.block\.0\.", ".residual.first.conv."),
        (r"\.residual\.block1\.block\.1\.", ".residual.first.norm."),
        (r"\.residual\.block2\.block\.0\.", ".residual.second.conv."),
        (r"\.residual\.block2\.block\.1\.", ".residual.second.norm."),
        (r"\.norm1\.", ".attention_norm."),
        (r"\.norm3\.", ".ffn_norm."),
        (r"\.attn1\.to_out\.0\.", ".out."),
        (r"\.attn1\.to_(q|k|v)\.", r".\1."),
        (r"\.ff\.net\.0\.proj\.", ".ffn_in."),
        (r"\.ff\.net\.2\.", ".ffn_out."),
        (r"\.q\.", ".query."),
        (r"\.k\.", ".key."),
        (r"\.v\.", ".value."),
        (r"\.pos\.", ".distance."),
    )
]
_REGULATOR = re.compile(r"^length_regulator\.model\.(\d+)\.")


def convert(path: Path, folder: Path, config: FlowConfig = RELEASED) -> FlowDecoder:
    """Read `flow.pt`, write our folder, and give the decoder in eval mode. Raises as `read_released`."""
    model = read_released(path, config)
    flow_folder.save(model, folder)
    return model


def read_released(path: Path, config: FlowConfig = RELEASED) -> FlowDecoder:
    """The decoder of `flow.pt`. `config` may say whose tokens it takes and how it streams.

    Raises FileNotFoundError, or ValueError when the file is damaged, holds more than tensors, or does not fit `config`.
    """
    path = Path(path)
    return flow_folder.filled(
        config,
        {our_name(name): x for name, x in read_pickle(path, "flow.pt of the folder glm-4-voice-decoder").items()},
        path,
    )


def our_name(theirs: str) -> str:
    """The name of one of their tensors in `FlowDecoder`; of an unknown one, something that is not there."""
    if place := _REGULATOR.match(theirs):
        number, part = divmod(int(place[1]), 3)  # convolution, norm, Mish, four times; then the last convolution
        ours = "regulator.out." if int(place[1]) == 12 else f"regulator.convs.{number}.{('conv', 'norm', '')[part]}."
        return ours + theirs[place.end() :]
    for pattern, ours in _RULES:
        theirs = pattern.sub(ours, theirs)
    return theirs
