"""Load a base into a lane: weights, tokenizer, self-tests, scheduler."""

from __future__ import annotations

import logging
import time

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from editing.models.loading import load_model, load_tokenizer
from registry.bases import Base
from registry.settings import Settings
from serving.guides import Guides
from serving.invariance import find_min_rows
from serving.lane import Lane
from serving.prepack import prepack
from serving.prompts import PromptReader
from serving.runner import Runner
from serving.scheduler import CHUNK, Limits, Scheduler
from serving.selftest import check_base
from serving.text import Decoder

#: Rows of a product where the machine offers no batch invariance.
FALLBACK_ROWS = 4
#: Memory for a base's keys and values on a CPU, where nothing else is said.
CPU_KV_BYTES = 2**30

logger = logging.getLogger(__name__)


def load_lane(base: Base, settings: Settings) -> Lane:
    """A base ready to serve; call it in the thread that will step it, whose products it tries.

    Raises:
        UnsupportedModel: the packed step is not this model's forward, or memory lacks.
    """
    started = time.monotonic()
    model = load_model(base, settings.dtype, settings.device)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)  # a step's graphs are captured on the thread's own
    packed = prepack(model) if settings.prepack else 0
    min_rows: int | None = 1
    if settings.batch_invariant:
        min_rows = find_min_rows(model)
    runner = Runner(
        model,
        kv_bytes=_kv_bytes(model.device) if settings.kv_bytes is None else settings.kv_bytes,
        min_rows=min_rows or FALLBACK_ROWS,
        batch_invariant=settings.batch_invariant,
    )
    is_invariant = (
        check_base(base.name, runner) and settings.batch_invariant and min_rows is not None
    )
    tokenizer = load_tokenizer(base)
    eos = _eos(model, tokenizer)
    limits = Limits(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        step_tokens=settings.step_tokens,
        kv_blocks=runner.kv_blocks,
        context_length=base.context_length,
        grid=CHUNK if settings.batch_invariant else 1,
    )
    logger.info(
        "base %s: %s, %s on %s, %d MiB of weights prepacked, %d tokens of keys and values,"
        " batch-invariant: %s, loaded in %.1f s",
        base.name,
        base.family,
        settings.dtype,
        model.device,
        packed >> 20,
        limits.kv_tokens,
        is_invariant,
        time.monotonic() - started,
    )
    return Lane(
        base,
        runner,
        Scheduler(limits),
        PromptReader(tokenizer, model.config.vocab_size, base.context_length),
        Decoder(load_tokenizer(base)),  # its own: a tokenizer serves one thread
        eos,
        Guides(tokenizer, model.config.vocab_size, eos),
        batch_invariant=is_invariant,
    )


def _kv_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_KV_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion, by the generation config and the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(id for id in (*ids, tokenizer.eos_token_id) if id is not None)
