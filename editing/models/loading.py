"""Load a base: safetensors only, never remote code, offline; and check that it stayed untouched."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from registry.bases import Base
from registry.errors import UnsupportedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """What ``ERRATA_DEVICE`` names; ``auto`` is a GPU if there is one.

    Raises:
        UnsupportedModel: this machine has no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedModel(f"ERRATA_DEVICE={name}: this machine has no GPU of that number")
    return device


def load_model(base: Base, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The base's weights in ``dtype``, in evaluation mode, without gradients.

    Args:
        device: by the name that ``device_of`` knows.

    Raises:
        UnsupportedModel: its files lack weights, which would be filled with random ones; this
            machine lacks the device.
    """
    place = device_of(device)
    _log_as_this_process_does()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base.folder,
        dtype=DTYPES[dtype],
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UnsupportedModel(
            f"base {base.name!r}: the .safetensors files in {base.folder} lack {len(missing)} of"
            f" the model's weights ({missing[0]}, …); save the whole model again"
        )
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False).to(place)  # type: ignore[arg-type]
    return model


def _log_as_this_process_does() -> None:
    """The library has a handler of its own, unless it is told to leave that to the root."""
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    library_logging.disable_default_handler()
    library_logging.enable_propagation()


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        base.folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of the weights in memory: equal before and after every job."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
