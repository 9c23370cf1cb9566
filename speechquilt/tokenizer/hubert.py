"""HuBERT units: the nearest k-means centroid to each frame of one layer of a `HubertModel`, as TWIST, SpiritLM and LST
use.

There is no training code and no way back to text. The folder is a Hugging Face HuBERT folder plus `units.json` and
`centroids.safetensors` (docs/how-to/public-tokenizers.md makes them).
Trap: HuBERT sees everything it is given, so the units depend on where long audio is cut. `windows.WindowRule` is the
rule, a short clip is one window; `step` waits for a whole window and `lookahead_s` says so.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from speechquilt import config
from speechquilt.nn.batching import valid_places
from speechquilt.nn.hugging_face import read_weights, weight_files
from speechquilt.nn.quantize import nearest_codes
from speechquilt.tokenizer import windows
from speechquilt.tokenizer.token_encoder import refuse_to_read, weights_fingerprint

if TYPE_CHECKING:
    from transformers import HubertConfig, HubertModel

UNITS, CENTROIDS = "units.json", "centroids.safetensors"
WINDOWS_PER_PASS = 16  # bounds memory on long audio
_ENCODING_KEYS = (  # what of HuBERT's config.json the shapes of its weights do not say
    "conv_stride", "num_attention_heads", "feat_extract_norm", "feat_extract_activation", "hidden_act", "layer_norm_eps",
    "do_stable_layer_norm", "num_conv_pos_embedding_groups",
)  # fmt: skip
_UNUSED = {"masked_spec_embed"}  # weights that only training reads


@dataclass(frozen=True, kw_only=True)
class HubertUnitsConfig:
    """How units are made from a HuBERT model: the content of `units.json` in its folder."""

    layer: int
    """Transformer layer whose output is clustered; 1 is the first. The output is taken before any final norm, as
    fairseq does."""
    normalize: bool = False
    """Whether each window gets zero mean and unit variance first, as `do_normalize` in the checkpoint's
    preprocessor_config.json says."""
    core_s: float = 20.0
    """Seconds of audio whose units one window gives. Longer: fewer cuts, more memory and a longer wait when
    streaming."""
    margin_s: float = 5.0
    """Seconds that a window hears more on either side, so that cuts do not change the units near them."""


class HubertUnits(nn.Module):
    """16 kHz audio -> unit ids, at the rate of the checkpoint's strides: 320 samples are 50 Hz, 640 are 25 Hz."""

    sample_rate = 16000
    centroids_KD: torch.Tensor

    def __init__(self, config: HubertUnitsConfig, hubert: "HubertModel", centroids_KD: torch.Tensor) -> None:
        """`hubert` is cut after `config.layer`, in place; `centroids_KD` float. Raises ValueError when they do not
        fit."""
        super().__init__()
        hf = hubert.config
        _check(config, hf, centroids_KD)
        self.config = config
        self.token_samples = prod(hf.conv_stride)
        self.vocab_size = len(centroids_KD)
        self.frame_rate = self.sample_rate / self.token_samples
        self.rule = windows.WindowRule(
            core=round(config.core_s * self.frame_rate), margin=round(config.margin_s * self.frame_rate)
        )
        self.lookahead_s = self.rule.lookahead_tokens / self.frame_rate
        self.field_samples = _receptive_field(hf)
        hubert.encoder.layers = hubert.encoder.layers[: config.layer]
        if hf.do_stable_layer_norm:
            hubert.encoder.register_module("layer_norm", nn.Identity())
        self.hubert = hubert.eval()
        self.register_buffer("centroids_KD", centroids_KD)

    @property
    def fingerprint(self) -> str:
        """12 hex digits of all weights in use, of the centroids and of every setting."""
        hf = self.hubert.config.to_dict()
        weights = {name: tensor for name, tensor in self.state_dict().items() if name.split(".")[-1] not in _UNUSED}
        return weights_fingerprint(asdict(self.config) | {key: hf[key] for key in _ENCODING_KEYS}, weights)

    @torch.no_grad()
    def encode(self, wav_BS: torch.Tensor, num_samples_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded 16 kHz audio -> `ids_BT` (int64, 0 in the padding), `num_tokens_B` = ceil(samples / token
        samples).

        Windows of equal length share a pass, so nothing depends on the batch: HuBERT's group norm would hear padding.
        Raises ValueError on empty or non-finite audio.
        """
        wav_BS = windows.checked_audio(wav_BS, num_samples_B)
        wav_BS = windows.to_whole_tokens(wav_BS[:, : int(num_samples_B.max())], self.token_samples)
        num_tokens_B = -(-num_samples_B // self.token_samples)
        by_length: dict[int, list[tuple[int, windows.Window]]] = defaultdict(list)
        for b, num_tokens in enumerate(num_tokens_B.tolist()):
            for window in self.rule.windows(num_tokens):
                by_length[window.stop - window.start].append((b, window))
        ids_BT = torch.zeros(len(wav_BS), int(num_tokens_B.max()), dtype=torch.long, device=wav_BS.device)
        for pieces in by_length.values():
            for i in range(0, len(pieces), WINDOWS_PER_PASS):
                self._fill(ids_BT, wav_BS, num_samples_B, pieces[i : i + WINDOWS_PER_PASS])
        return ids_BT, num_tokens_B

    def init_state(self) -> windows.WindowState:
        return windows.WindowState()

    @torch.no_grad()
    def step(
        self, wav_S: torch.Tensor, state: windows.WindowState, *, final: bool = False
    ) -> tuple[torch.Tensor, windows.WindowState]:
        """Any number of new samples -> the units of every window that is now complete, and the new state.

        The units of all steps together are those of `encode` on the whole audio; `final` flushes the rest.
        """
        device = self.centroids_KD.device
        return windows.step(self.rule, self.token_samples, self._alone, wav_S, state, final, device)

    def read_back(self, tokens: Sequence[np.ndarray]) -> list[str]:
        """Always a ValueError: units have no ASR half."""
        refuse_to_read()

    @classmethod
    def load(cls, folder: Path) -> "HubertUnits":
        """A HuBERT folder with `units.json` and `centroids.safetensors` (one tensor `centroids` [K, D]), in eval mode.

        Raises FileNotFoundError or ValueError naming the file, the rule and the remedy.
        """
        from transformers import HubertModel

        folder = Path(folder)
        units = config.load(HubertUnitsConfig, folder / UNITS)
        tensors = read_weights(folder / CENTROIDS)
        if set(tensors) != {"centroids"}:
            raise ValueError(f"{folder / CENTROIDS} holds {sorted(tensors)}; one tensor named 'centroids' is expected")
        weight_files(folder)  # says what is missing, and that pickled weights are not read
        from_pretrained: Any = HubertModel.from_pretrained  # its annotation knows only one of its two results
        hubert, loaded = from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        if missing := sorted(set(loaded["missing_keys"]) - _UNUSED):
            raise ValueError(
                f"the weights in {folder} lack {missing[0]} ({len(missing)} such); download the folder again"
            )
        return cls(units, hubert, tensors["centroids"].float()).eval()

    def _fill(
        self,
        ids_BT: torch.Tensor,
        wav_BS: torch.Tensor,
        num_samples_B: torch.Tensor,
        pieces: list[tuple[int, windows.Window]],
    ) -> None:
        """Write the units of windows of one length into their rows."""
        n = self.token_samples
        wav_PS = torch.stack([wav_BS[b, w.start * n : w.stop * n] for b, w in pieces])
        heard_P = torch.stack([(num_samples_B[b] - w.start * n).clamp(max=wav_PS.shape[1]) for b, w in pieces])
        ids_PT = self._units(wav_PS, heard_P.to(wav_PS.device))
        for (b, w), ids_T in zip(pieces, ids_PT):
            ids_BT[b, w.first : w.last] = ids_T[w.first - w.start : w.last - w.start]

    def _units(self, wav_PS: torch.Tensor, num_samples_P: torch.Tensor) -> torch.Tensor:
        """Windows of whole tokens, zeros beyond `num_samples_P` -> one unit per token."""
        wav_PS = wav_PS.float()
        if self.config.normalize:
            wav_PS = _normalized(wav_PS, num_samples_P)
        # The last frame's receptive field reaches beyond its token.
        wav_PS = F.pad(wav_PS, (0, self.field_samples - self.token_samples))
        return nearest_codes(self.hubert(wav_PS).last_hidden_state, self.centroids_KD)

    def _alone(self, wav_S: torch.Tensor) -> torch.Tensor:
        """The units of the samples of one window."""
        wav_PS = windows.to_whole_tokens(wav_S[None], self.token_samples).to(self.centroids_KD.device)
        return self._units(wav_PS, torch.tensor([len(wav_S)], device=wav_PS.device))[0]


def _check(config: HubertUnitsConfig, hf: "HubertConfig", centroids_KD: torch.Tensor) -> None:
    if not 1 <= config.layer <= hf.num_hidden_layers:
        raise ValueError(f"layer={config.layer} in {UNITS} must lie in 1..{hf.num_hidden_layers}, HuBERT's layers")
    if centroids_KD.ndim != 2 or centroids_KD.shape[1] != hf.hidden_size or len(centroids_KD) < 2:
        raise ValueError(
            f"centroids of shape {tuple(centroids_KD.shape)} do not fit HuBERT's hidden_size={hf.hidden_size}; "
            "take the k-means model that was fitted on this checkpoint"
        )
    if not torch.isfinite(centroids_KD).all():
        raise ValueError(f"{CENTROIDS} has NaN or infinite values; convert the k-means model again")


def _receptive_field(hf: "HubertConfig") -> int:
    """Samples under one frame of the convolutions."""
    strides = list(accumulate([1, *hf.conv_stride[:-1]], mul))
    return 1 + sum((kernel - 1) * stride for kernel, stride in zip(hf.conv_kernel, strides))


def _normalized(wav_PS: torch.Tensor, num_samples_P: torch.Tensor) -> torch.Tensor:
    """Wav2Vec2FeatureExtractor's `do_normalize`: over the valid samples, zeros beyond them."""
    valid_PS = valid_places(num_samples_P, wav_PS.shape[1])
    count_P1 = num_samples_P[:, None]
    centred_PS = (wav_PS - wav_PS.sum(1, keepdim=True) / count_P1) * valid_PS
    variance_P1 = centred_PS.square().sum(1, keepdim=True) / count_P1
    return centred_PS / (variance_P1 + 1e-7).sqrt()
