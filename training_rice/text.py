"""Text encoder and tokenizer of a run: new and small, or taken from a pretrained text encoder."""

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from hub_rice.checkpoint import check_checkpoint
from hub_rice.repository import hub_errors
from modeling_rice import RiceConfig, RiceModel
from modeling_rice.text_rice import RiceTextEncoder
from processing_rice import train_tokenizer

from .arguments import DataArguments, ModelArguments

logger = logging.getLogger(__name__)


def complete_text_settings(settings: dict[str, Any], arguments: ModelArguments, data: DataArguments) -> dict[str, Any]:
    """
    The model section with a complete `text_config`: that of `init_text_from`, or the section's own; if it has no
    vocabulary size, that of the tokenizer to be trained is added.

    Raises:
        FileNotFoundError, ValueError: the encoder cannot be read, or is named twice.
    """
    text = settings.get("text_config")
    if arguments.init_text_from is not None:
        if text is not None:
            raise ValueError("init_text_from and model.text_config both name a text encoder; pass one of them.")
        with hub_errors(arguments.init_text_from):
            check_checkpoint(arguments.init_text_from)
            return settings | {
                "text_config": AutoConfig.from_pretrained(arguments.init_text_from, trust_remote_code=False)
            }
    if isinstance(text, dict):
        # Through RiceConfig, because a checkpoint's config would store a plain mapping.
        return settings | {"text_config": RiceConfig(text_config={"vocab_size": data.vocab_size} | text).text_config}
    return settings


def load_text_encoder(model: RiceModel, path: str) -> None:
    """
    Fills the text encoder with pretrained weights, float32.

    Raises:
        FileNotFoundError, ValueError: the encoder cannot be read, or does not fit.
    """
    with hub_errors(path):
        source = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    # The text tower of a model with both, such as CLIP.
    source = getattr(source, "text_model", source)
    try:
        found = model.text_model.model.load_state_dict(source.state_dict(), strict=False)
    except RuntimeError as error:
        raise ValueError(f"init_text_from: {' '.join(str(error).split())}") from error
    if found.missing_keys:
        raise ValueError(
            f"init_text_from: {path} lacks {len(found.missing_keys)} weights of its text encoder, such as "
            f"{found.missing_keys[0]}; choose another one."
        )
    logger.info("From %s: text encoder.", path)


def build_tokenizer(
    arguments: ModelArguments, data: DataArguments, config: RiceConfig, texts: list[str]
) -> PreTrainedTokenizerBase:
    """
    The requested tokenizer, else that of the pretrained text encoder, else a tokenizer trained on the texts. It cuts
    texts to `text_length` tokens, or to the maximum length of the encoder.

    Raises:
        ValueError: the named folder or repository has no tokenizer.
        PermissionError, FileNotFoundError, ConnectionError: errors of the Hub.
    """
    path = data.tokenizer or arguments.init_text_from
    if path is None:
        tokenizer = train_tokenizer(texts or ["rice"], vocab_size=data.vocab_size, fold=True)
    else:
        tokenizer = _read_tokenizer(path, "tokenizer" if data.tokenizer else "init_text_from")
    tokenizer.model_max_length = data.text_length
    if config.text_config is not None:
        with torch.device("meta"):
            longest = RiceTextEncoder(config).max_length
        tokenizer.model_max_length = min(data.text_length, longest or data.text_length)
    return tokenizer


def _read_tokenizer(path: str, argument: str) -> PreTrainedTokenizerBase:
    remedy = "name a folder that holds tokenizer.json, or the id of a published one, by --tokenizer."
    try:
        with hub_errors(path):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (PermissionError, FileNotFoundError, ConnectionError):
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: no tokenizer can be loaded from {path}; {remedy}") from error
    # From a folder with only a config, transformers creates a tokenizer with an empty vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{argument}: {path} has no tokenizer of its own; {remedy}")
    return tokenizer


def check_text(data: DataArguments, config: RiceConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        ValueError: texts are used, but the model has no text encoder, or the encoder has fewer entries than the
            tokenizer.
    """
    if config.text_config is None:
        if data.use_text:
            raise ValueError(
                "use_text needs a text encoder: set model.text_config (for a small, new encoder: {hidden_size: 128, "
                "num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 256}), or init_text_from."
            )
        return
    if not data.use_text:
        logger.warning("The model has a text encoder, but it is not trained, because use_text is false.")
    vocabulary = getattr(config.text_config, "vocab_size", None)
    if data.use_text and vocabulary is not None and len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, but the text encoder has {vocabulary}; set "
            f"model.text_config.vocab_size to that number, or choose the tokenizer of the encoder."
        )
