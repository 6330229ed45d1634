"""Reading a model from a folder in Hugging Face's layout, whole or not at all."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kvsuite import configs
from kvsuite.engines import ranks
from kvsuite.errors import UsageError, first_line


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice: what matters ends in a sentence of our own."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def read_config(folder: Path) -> Any:
    """A model's configuration. Raises UsageError for one that is not understood."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers finds wrong
        raise UsageError(f"transformers cannot read {str(folder / 'config.json')!r}: {first_line(error)}") from error
    configs.refuse(config.to_dict())
    return config


def auto_class(config: Any) -> Any:
    """By which of transformers' classes a model is made. One that reads images, too, is loaded with all that reads
    them, and given text alone. Raises UsageError where there is no decoder of text."""
    for found in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in found._model_mapping:
            return found
    raise UsageError(
        f"model type {config.model_type!r} is no causal language model in transformers {transformers.__version__}"
    )


def load_model(folder: Path, device: str | None = None) -> Any:
    """A model in its checkpoint's dtype, under torchrun a rank's part of it. Raises UsageError where its weights are
    damaged or not all there. On the ``device`` "meta" no weight is read: only names and sizes are held against the
    configuration's."""
    config = read_config(folder)
    made, where = auto_class(config), {"device_map": device} if device else ranks.split()
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            model, found = made.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **where,
            )
    except Exception as error:  # whatever transformers and safetensors find wrong
        raise UsageError(f"the weights in {str(folder)!r} cannot be read: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"the weights in {str(folder)!r} lack {missing[0]!r}{more}")
    return model
