"""Load a base into a lane: weights, tokenizer, self-tests, scheduler."""

from __future__ import annotations

import logging
import time

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from editing.models.loading import load_model, load_tokenizer
from registry.bases import Base
from registry.settings import Settings
from serving.invariance import find_min_rows
from serving.lane import Lane
from serving.prompts import PromptReader
from serving.runner import Runner
from serving.scheduler import Limits, Scheduler
from serving.selftest import check_base
from serving.text import Decoder

#: Rows of a product where the machine offers no batch invariance.
FALLBACK_ROWS = 4

logger = logging.getLogger(__name__)


def load_lane(base: Base, settings: Settings) -> Lane:
    """A base ready to serve; call it in the thread that will step it, whose products it tries.

    Raises:
        UnsupportedModel: the packed step is not this model's forward, or memory lacks.
    """
    started = time.monotonic()
    model = load_model(base, settings.dtype)
    min_rows = find_min_rows(model)
    runner = Runner(model, slots=settings.kv_tokens, min_rows=min_rows or FALLBACK_ROWS)
    is_invariant = check_base(base.name, runner) and min_rows is not None
    tokenizer = load_tokenizer(base)
    limits = Limits(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        step_tokens=settings.step_tokens,
        kv_tokens=settings.kv_tokens,
        context_length=base.context_length,
    )
    logger.info(
        "base %s: %s, %s, batch-invariant: %s (products of %d rows and more), loaded in %.1f s",
        base.name,
        base.family,
        settings.dtype,
        is_invariant,
        runner.min_rows,
        time.monotonic() - started,
    )
    return Lane(
        base,
        runner,
        Scheduler(limits),
        PromptReader(tokenizer, model.config.vocab_size, base.context_length),
        Decoder(load_tokenizer(base)),  # its own: a tokenizer serves one thread
        _eos(model, tokenizer),
        batch_invariant=is_invariant,
    )


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion, by the generation config and the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(id for id in (*ids, tokenizer.eos_token_id) if id is not None)
